"""Report pages: what they show of runs, that they need nothing else, run nothing of a run's, and replace nothing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from vkd_plugin.cli import main
from vkd_plugin.engine.progress import setup_logging
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.results import convergence, landscape, opened, samples
from vkd_plugin.results.embedding import TSNEs, principal_components
from vkd_plugin.results.runs import Run, differences, read_runs
from vkd_plugin.results.samples import chosen_samples

ROOT = Path(__file__).parents[1]
SHORT = (
    "--set", "train.num_epochs=2", "--set", "datasets.digits/train.init.kwargs.fraction=0.3",
    "--set", "train.train_data_loader.kwargs.batch_size=32", "--device", "cpu",
)  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``vkd`` and ``linear``."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for method in ("vkd", "linear"):
            student = f"models.student_model.dst_ckpt={folder}/{method}-student.pt"
            config = f"configs/digits/{method}/vit_from_cnn.yaml"
            assert main(["--config", config, *SHORT, "--set", student, "--output", str(folder / method)]) == 0
    setup_logging(is_main=True)  # lets go of log.txt, as the end of a process does
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few samples and steps."""
    for module in (samples, opened):
        monkeypatch.setattr(module, "SAMPLES", 60)
    monkeypatch.setattr(landscape, "DRAWS", 2)
    monkeypatch.setattr(landscape, "SIZES", (0.0, 0.5, 2.0))
    monkeypatch.setattr(convergence, "STEPS", 5)


class _Page(HTMLParser):
    """Titles of the charts and what they draw, rows of the tables, and what the page refers to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text("utf-8")
        self.specs: list[dict[str, Any]] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.marked: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.notes: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [str(values[name]) for name in ("src", "href", "action", "data") if name in values]
        if tag == "tr":
            self.rows.append([])
            self.marked += ["?"] if values.get("class") == "differs" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h4":
            self.titles.append("")
        if values.get("class") == "note":
            self.notes.append("")
        if tag not in ("meta", "link", "input"):
            self._open.append((tag, values))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, "the page is well formed"

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self._open]
        if inside[-1:] == ["script"]:
            if self._open[-1][1].get("type") == "application/json":
                self.specs.append(json.loads(data))
            return
        self.text += data
        if ("p", {"class": "note"}) in self._open:
            self.notes[-1] += data
        if "h4" in inside:
            self.titles[-1] += data
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
            if self.marked[-1:] == ["?"]:
                self.marked[-1] = data

    def chart(self, title: str) -> dict[str, Any]:
        return self.specs[self.titles.index(title)]

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def _report(*arguments: str | Path, expect: int = 0) -> None:
    assert main(["report", *map(str, arguments)]) == expect


def _copy(trained: Path, to: Path, name: str = "vkd") -> Path:
    return Path(shutil.copytree(trained / name, to))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# What is recorded.


def test_a_page_shows_every_figure_of_every_run(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    _report(trained / "vkd", trained / "linear", "--no-figures", "--output", file)
    page = _Page(file)
    records = [json.loads(line) for line in (trained / "vkd" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for key in records[0].keys() - {"epoch", "step"}:
        chart = page.chart(key)
        assert chart["data"][0]["x"] == [1, 2]
        assert chart["data"][0]["y"] == [record[key] for record in records]
        assert len(chart["data"]) == (1 if key.startswith("orthogonality_error") else 2)
    assert page.chart("orthogonality_error/tokens")["layout"]["yaxis"]["type"] == "log"
    colours = [[trace["line"]["color"] for trace in spec["data"] if trace["meta"] == 1] for spec in page.specs]
    assert len({colour for of_chart in colours for colour in of_chart}) == 1, "a run has one colour in all charts"
    summary = json.loads((trained / "vkd" / "summary.json").read_text())
    assert page.row("student top1")[0] == f"{summary['test']['student']['top1']:.5g}"
    assert page.row("val/top1")[:2] == [f"{summary[which]['val/top1']:.5g}" for which in ("best", "last")]
    place = "train.student.auxiliary_model_wrapper.kwargs.features.tokens.projector."
    assert page.row(place + "key") == ["'OrthogonalProjector'", "'LinearProjector'"]
    assert page.row(place + "orthogonal_map") == ["'matrix_exp'", "–"]
    assert page.row("versions: torch") == [torch.__version__] * 2
    assert page.row("seed") == ["0", "0"]
    assert {"config", "projector of tokens"} <= set(page.marked)
    assert not {"versions: torch", "wall time", "seed"} & set(page.marked)


def test_a_page_needs_nothing_else_and_is_always_the_same(trained: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    for file in (one, two):
        _report(trained / "vkd", trained / "linear", "--no-figures", "--output", file)
    page = _Page(one)
    assert page.references == ["data:,"]
    assert "@import" not in page.html.split("</style>")[0]
    assert page.html.count("* plotly.js v") == 1
    assert "default-src 'none'" in page.html[:1000]
    assert two.read_bytes() == one.read_bytes()
    for spec in page.specs:
        go.Figure(spec)  # raises on what plotly does not know


def test_unfinished_runs_and_bad_numbers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _copy(trained, tmp_path / "run")
    (run / "summary.json").unlink()
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    bad = json.loads(second) | {"loss": None, "gradient_norm": float("nan"), "loss/new": 1.0}
    (run / "metrics.jsonl").write_text("\n".join([first, second, json.dumps(bad), first[: len(first) // 2]]))
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text((run / "config.yaml").read_text())
    (started / "log.txt").touch()
    file = tmp_path / "page.html"
    _report(run, trained / "linear", started, "--no-figures", "--output", file)
    page = _Page(file)
    assert "unfinished, epoch 2 of 2" in page.text
    assert "unfinished, epoch 0 of 2" in page.text
    assert page.chart("loss")["data"][0]["x"] == [1, 2], "an epoch that is told twice counts once"
    assert page.chart("loss")["data"][0]["y"][1] is None
    assert [trace["meta"] for trace in page.chart("loss/new")["data"]] == [0]
    assert page.text.count("not finite in epoch 2") == 2
    assert page.row("loss")[1] == "not finite"
    assert page.row("seed") == ["0", "0", "–"], "what summary.json would tell, the checkpoint does"
    _report(started, "--no-figures", "--output", file)
    assert "no epoch is done yet" in _Page(file).text
    (run / "summary.json").write_text("{")
    _report(run, "--no-figures", expect=2)
    assert "summary.json: not a run's summary: " in capsys.readouterr().err


def test_what_a_run_says_is_never_markup(trained: Path, tmp_path: Path) -> None:
    page = _Page(_hostile_page(trained, tmp_path))
    assert page.html.count(EVIL) == 0
    assert sum(EVIL in title for title in page.titles) == 1
    assert page.row(f"train.{EVIL}") == [repr(EVIL), "–"]
    assert page.row(f"student {EVIL}")[0] == EVIL
    name = page.chart("loss")["data"][0]["name"]
    assert "&lt;img" in name, "plotly.js reads some markup"
    assert "<" not in name


EVIL = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>"


def _hostile_page(trained: Path, tmp_path: Path, *more: str) -> Path:
    run = _copy(trained, tmp_path / "<img src=x onerror=document.title='run'>")
    config = (run / "config.yaml").read_text().replace("\ntest:", f'\n  "{EVIL}": "{EVIL}"\ntest:', 1)
    (run / "config.yaml").write_text(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {f"loss/{EVIL}": 1}) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"device": EVIL, "test": {"student": {EVIL: EVIL}}, "best": EVIL}
    (run / "summary.json").write_text(json.dumps(summary))
    file = tmp_path / "page.html"
    _report(run, trained / "vkd", "--output", file, *(more or ["--no-figures"]))
    return file


def test_differences_are_told_value_by_value(tmp_path: Path) -> None:
    texts = [
        "train: {num_epochs: 2, optimizer: {key: SGD, kwargs: {lr: 1.0e-3}}, list: [a, b]}",
        "train: {num_epochs: 2, optimizer: {key: SGD, kwargs: {lr: 0.001}}, list: [a, c, d]}",
        "train: {num_epochs: 2, model: !import_get {key: 'torch.nn.Linear'}, list: [a, b], _anchor: 1}",
        "train: [",
    ]
    runs = []
    for index, text in enumerate(texts):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "config.yaml").write_text(text)
        runs.append(Run(folder))
    assert differences(runs) == [
        ("train.optimizer.key", ["'SGD'", "'SGD'", None, None]),
        ("train.optimizer.kwargs.lr", ["0.001", "0.001", None, None]),
        ("train.list.1", ["'b'", "'c'", "'b'", None]),
        ("train.list.2", [None, "'d'", None, None]),
        ("train.model", [None, None, "!import_get", None]),
        ("train.model.key", [None, None, "'torch.nn.Linear'", None]),
    ]
    assert [run.problem is None for run in runs] == [True, True, True, False]
    assert [run.epochs for run in runs] == [2, 2, 2, None]


# Files.


def test_nothing_is_written_but_the_page(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _copy(trained, tmp_path / "run")
    before = _contents(tmp_path)
    _report(run, "--no-figures")
    page = run / "report.html"
    assert _contents(tmp_path) == before | {str(page): page.read_bytes()}
    _report(run, "--no-figures")  # its own page may be written over
    monkeypatch.chdir(tmp_path)
    _report(run, trained / "linear", "--no-figures")
    assert _contents(tmp_path) == before | {str(f): f.read_bytes() for f in (page, tmp_path / "report.html")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--output", "mine.html"], "mine.html: is there already and no report; choose another"),
        (["run", "--output", "run/summary.json"], "run/summary.json: is there already and no report"),
        (["run", "--output", "run"], "--output run: is a folder; name the file, e.g. run/report.html"),
        (["run", "--output", "nowhere/page.html"], "--output nowhere/page.html: there is no folder nowhere"),
        (["rnu"], "rnu: no such folder (did you mean 'run'?)"),
        (["run", "below/rnu"], "below/rnu: no such folder (did you mean 'below/run'?)"),
        (["below"], "below: holds no run (no metrics.jsonl, summary.json or config.yaml with log.txt); below it: "),
        (["mine.html"], "mine.html: is a file, not the folder of a run"),
        (["run", "--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "below/run"):
        Path(folder).mkdir(parents=True)
        Path(folder, "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
        Path(folder, "summary.json").write_text("{}")
    Path("mine.html").write_text("<p>mine</p>")
    before = _contents(tmp_path)
    _report(*arguments, expect=2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert _contents(tmp_path) == before


def test_without_plotly(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    _report(trained / "vkd", expect=2)
    assert capsys.readouterr().err == "error: the report needs plotly: pip install 'vkd-plugin[report]'\n"


# Figures.


@pytest.mark.usefixtures("quick")
def test_figures_of_two_projectors(trained: Path, tmp_path: Path) -> None:
    before = _contents(trained)
    _report(trained / "vkd", trained / "linear", "--output", tmp_path / "page.html")
    assert _contents(trained) == before
    page = _Page(tmp_path / "page.html")
    for spec in page.specs:
        go.Figure(spec)
    panels = ["student, 48 channels", "student, projected", "teacher, 128 channels"]
    assert [title for title in page.titles if ":" in title] == [
        *(f"{method}: {panel}" for _ in range(2) for method in ("PCA", "t-SNE") for panel in panels),
        "vkd: vkd, OrthogonalProjector (matrix_exp)",
        "linear: vkd, LinearProjector",
    ]
    assert page.titles.count("loss/vkd") == 3, "by epoch, its landscape, and beside those of other projectors"
    assert page.text.count("60 of the 500 test samples") == 2
    fits = page.chart("vkd: vkd, OrthogonalProjector (matrix_exp)")["data"]
    kinds = ["matrix_exp", "cayley", "householder", "cholesky_qr", "polar", "LinearProjector", "MLPProjector"]
    assert [trace["name"] for trace in fits] == [*kinds, "its own, as trained"]
    points = page.chart("t-SNE: teacher, 128 channels")["data"]
    assert sum(len(trace["x"]) for trace in points) == 60


@pytest.mark.usefixtures("quick")
def test_figures_of_one_run_compare_with_a_projector_fitted_to_it(trained: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.html", tmp_path / "two.html"]
    for file in files:
        torch.rand(1)
        state = torch.get_rng_state()
        _report(trained / "vkd", "--output", file)
        assert torch.equal(torch.get_rng_state(), state)
    assert files[0].read_bytes() == files[1].read_bytes()
    page = _Page(files[0])
    assert "t-SNE: LinearProjector, fitted afterwards" in page.titles
    assert "The given runs do not differ in their projector. All have the same one" in page.text


def test_what_cannot_be_built_is_a_note(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _copy(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)  # the teacher's weights are named by a path in the checkout
    _report(run)
    text = _Page(run / "report.html").text
    assert f"{run}: configs/digits/ce/digits_cnn.safetensors: no such checkpoint" in text
    assert _Page(run / "report.html").titles, "what is recorded is there all the same"
    shutil.rmtree(run / "checkpoints")
    _report(run)
    assert f"{run}: it has no checkpoint yet" in _Page(run / "report.html").text


def test_a_run_without_features_still_has_a_landscape(tmp_path: Path, quick: None) -> None:
    student = f"models.model.dst_ckpt={tmp_path}/student.pt"
    run = tmp_path / "ce"
    less = ("--set", "train.num_epochs=1", "--set", student, "--output", str(run))
    assert main(["--config", "configs/digits/ce/vit.yaml", *SHORT, *less]) == 0
    _report(run)
    page = _Page(run / "report.html")
    assert f"{run}: it distils no projected feature" in page.text
    assert "None of the runs has recorded one: they have no orthogonal projector." in page.text
    assert page.titles.count("loss/ce") == 2


def test_features_are_those_of_the_best_checkpoint(trained: Path) -> None:
    (run,) = read_runs([str(trained / "vkd")])
    with opened.opened(run, "cpu", []) as models:
        (feature,) = models.distilled()
        images, targets = models.samples.some(500)
        losses = models.losses_at(images, targets)
        fits = convergence.fit_projectors(feature)
    assert (feature.term, feature.feature, len(feature.labels)) == ("vkd", "tokens", 500)
    raw = read_checkpoint(trained / "vkd" / "checkpoints" / "best.pt")["projectors"]["tokens.projector.raw_weight"]
    assert torch.equal(feature.projector.raw_weight, raw)
    torch.testing.assert_close(feature.projected, feature.source @ feature.projector.weight.mT)
    summary = json.loads((trained / "vkd" / "summary.json").read_text())
    assert losses["loss/ce"] == pytest.approx(summary["test"]["student"]["loss"], rel=1e-4)
    weighted = losses["loss/ce"] + losses["loss/kl"] + 4 * losses["loss/vkd"]
    assert losses["loss"] == pytest.approx(weighted, rel=1e-5)
    assert losses["loss/vkd"] == pytest.approx(convergence.trained_loss(feature), rel=1e-5)
    plain = torch.nn.functional.smooth_l1_loss(feature.projected, feature.teacher)
    assert losses["loss/vkd, normalization none"] == pytest.approx(float(plain), rel=1e-5)
    for fit in fits:
        assert fit.losses[-1] < 0.9 * fit.losses[0]
        kept = torch.allclose(fit.projected.norm(dim=1), feature.source.norm(dim=1), rtol=1e-4)
        assert kept == (fit.name not in ("LinearProjector", "MLPProjector"))


def test_of_stages_the_last_counts(trained: Path, tmp_path: Path) -> None:
    head, _, rest = (trained / "vkd" / "config.yaml").read_text().partition("\ntrain:\n")
    train, _, tail = rest.partition("\ntest:")
    train = train.replace("num_epochs: 2", "num_epochs: 1").replace("  log_freq: 10\n", "")
    stage = indent(train, "  ")
    second = stage.replace("weight: 4.0", "weight: 2.0")
    for anchor in re.findall(r"&(\w+)", stage):  # a name may be given once
        second = re.sub(rf"([&*]){anchor}\b", rf"\1{anchor}again", second)
    config = tmp_path / "staged.yaml"
    config.write_text(f"{head}\ntrain:\n  stage1:\n{stage}\n  stage2:\n{second}\ntest:{tail}")
    assert main(["--config", str(config), "--device", "cpu", "--output", str(tmp_path / "run")]) == 0
    (run,) = read_runs([str(tmp_path / "run")])
    assert run.epochs == 2
    assert run.projectors == {"tokens": "OrthogonalProjector (matrix_exp)"}
    with opened.opened(run, "cpu", []) as models:
        losses = models.losses_at(*models.samples.some(50))
    weighted = losses["loss/ce"] + losses["loss/kl"] + 2 * losses["loss/vkd"]
    assert losses["loss"] == pytest.approx(weighted, rel=1e-5)


def test_code_that_is_not_trusted_does_not_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(trained, tmp_path / "run")
    call = f"!import_call {{key: 'os.system', init: {{args: ['touch {tmp_path}/ran']}}}}"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("\ndatasets:\n", f"\ndatasets:\n  evil: {call}\n"))
    assert "os.system" in (run / "config.yaml").read_text()
    _report(run)
    assert "'os.system'" in " ".join(_Page(run / "report.html").notes)
    assert not (tmp_path / "ran").exists()
    capsys.readouterr()
    _report(run, "--trust", "no package", expect=2)
    assert capsys.readouterr().err.startswith("error: --trust 'no package': ")


def test_noise_moves_the_loss(trained: Path, quick: None) -> None:
    (run,) = read_runs([str(trained / "vkd")])
    with opened.opened(run, "cpu", []) as models:
        found = landscape.landscape(models)
        clean = models.losses_at(*models.samples.some(landscape.SAMPLES))
    assert found.keys() == clean.keys()
    for name, values in found.items():
        assert values.shape == (3, 2)
        np.testing.assert_allclose(values[0], clean[name], rtol=1e-6)
        assert values[2, 0] != values[2, 1] != clean[name]


def test_an_orthonormal_projection_does_not_move_principal_components() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 5)) * [5, 3, 1, 1, 1]
    q = np.linalg.qr(random.normal(size=(9, 5)))[0]
    points, share = principal_components(x)
    moved, of_moved = principal_components(x @ q.T)
    np.testing.assert_allclose(moved, points, atol=1e-10)
    np.testing.assert_allclose(of_moved, share)
    np.testing.assert_allclose(share, points.var(axis=0) / x.var(axis=0).sum())
    assert principal_components(x[:, :1])[0].shape == (40, 2)
    tsnes = TSNEs()
    assert tsnes(x) is tsnes(x.copy())
    np.testing.assert_array_equal(tsnes(x), TSNEs()(x))


def test_samples_are_few_of_few_classes_and_always_the_same() -> None:
    targets = [index % 40 for index in range(4000)]
    chosen = chosen_samples(4000, targets, 500)
    assert chosen == chosen_samples(4000, targets, 500) == sorted(set(chosen))
    assert len(chosen) == 500
    assert len({targets[index] for index in chosen}) == 10
    assert chosen_samples(30, None, 500) == list(range(30))


# In a browser.


def _browse(file: Path) -> tuple[str, list[str]]:
    """The page as it is after its scripts, and what the browser complains of."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={file.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, "--virtual-time-budget=20000", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@needs_browser
@pytest.mark.usefixtures("quick")
def test_a_browser_draws_all_charts_and_asks_for_nothing(trained: Path, tmp_path: Path) -> None:
    """With a hostile run. What the policy refuses, a request among it, would be a message on the console."""
    file = _hostile_page(trained, tmp_path, "--device", "cpu")
    charts = _Page(file).specs
    dom, complaints = _browse(file)
    assert complaints == []
    assert f'data-drawn="{len(charts)}"' in dom
    assert dom.count('class="plot-container') == len(charts)
    assert dom.count('class="scatterlayer') >= len(charts)
    assert "<title>Report: 2 runs</title>" in dom


@needs_browser
@pytest.mark.slow
def test_a_browser_runs_and_loads_nothing_that_slips_in(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    _report(trained / "vkd", "--no-figures", "--output", file)
    slipped = "<main><img src='https://example.invalid/x.png'><script>document.title = 'run'</script>"
    file.write_text(file.read_text("utf-8").replace("<main>", slipped), "utf-8")
    dom, complaints = _browse(file)
    assert len(complaints) == 2
    assert all("Content Security Policy" in line for line in complaints)
    assert "<title>run</title>" not in dom
