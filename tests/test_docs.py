"""Every snippet of the documents does what they say.

Each document is done from its beginning to its end, in a folder with copies of ``run.py`` and ``configs``. Commands of
``run.py`` run in this process, and where they train on digits, that is made :data:`SHORT` behind the command
line's back, so that tables and summaries know nothing of it. Left to the slow tests is what begins with one of
:data:`SLOW`: ``torchrun`` (with two processes), reports, the README's two tables of 25 runs each, and the check of an
experiment with two large detectors. Nothing is run of :data:`SETTING_UP`, nor of blocks that are marked with one of
:data:`NOT_TESTED`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from markdown_helper import Session, blocks
from torchdistill.losses.registry import LOSS_DICT, LOW_LEVEL_LOSS_DICT

from vkd_plugin.cli import main
from vkd_plugin.config import trust
from vkd_plugin.engine import run as engine_run
from vkd_plugin.results.table import running

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BASE = (ROOT / "configs" / "digits" / "vkd" / "vit_from_cnn.yaml").read_text()

SHORT = ["train.num_epochs=2", "datasets.digits/train.init.kwargs.fraction=0.1"]
NOT_TESTED = {"for several nodes", "for a Slurm cluster", "it takes minutes"}
SLOW = (
    "torchrun",
    "python run.py report",
    "OMP_NUM_THREADS=1 python run.py table",
    "python run.py check configs/coco2017/vkd/vidt_swin_nano_from_vidt_swin_base.yaml",
)
SETTING_UP = ("python3 -m venv", "pip install", "python -m pytest")
EXAMPLES = "VKD_TORCHDISTILL_EXAMPLES"
"""Names the folder ``examples/torchvision`` of a checkout of torchdistill, whose script is run if it is there."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder; what is registered from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copytree(ROOT / "configs", "configs")
    shutil.copy(ROOT / "run.py", "run.py")
    registered = [(registry, dict(registry)) for registry in (LOSS_DICT, LOW_LEVEL_LOSS_DICT)]
    yield tmp_path
    for registry, before in registered:
        registry.clear()
        registry.update(before)
    sys.modules.pop("my_losses", None)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs on digits :data:`SHORT`, and runs those of tables in this process."""
    load = engine_run.load_experiment

    def load_short(path: str, overrides: Sequence[str], trusted: Sequence[str]) -> Any:
        is_long = "digits/train" in Path(path).read_text()
        return load(path, [*overrides, *(SHORT if is_long else [])], trusted)

    def run_here(self: Any, command: Sequence[str]) -> int:
        return main(command[len(running.PROGRAM) :])

    monkeypatch.setattr(engine_run, "load_experiment", load_short)
    monkeypatch.setattr(running._Relay, "run", run_here)


def _torchdistill(command: str) -> tuple[str, int] | None:
    """Runs torchdistill's example script, if there is one."""
    if EXAMPLES not in os.environ:
        return None
    if not Path("torchdistill").exists():
        Path("torchdistill").symlink_to(Path(os.environ[EXAMPLES]).parents[1])
    return _elsewhere(command)


def _torchrun(command: str) -> tuple[str, int]:
    """With two processes on CPUs, whatever their number in the document."""
    launcher = "python -m torch.distributed.run --standalone --nproc_per_node=2"
    return _elsewhere(f"{launcher} run.py {command.partition(' run.py ')[2]} --device cpu --set train.num_epochs=1")


def _elsewhere(command: str) -> tuple[str, int]:
    """Runs a command in a shell, with this Python."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(["bash", "-ec", command], env=variables, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode


def _nothing(command: str) -> None:
    return None


def _do(document: str, session: Session) -> None:
    found = blocks(ROOT / document)
    assert found
    for block in found:
        if block.reason is None:
            session.do(block)
        else:
            assert block.reason in NOT_TESTED, block.where


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document(folder: Path, document: str) -> None:
    instead = dict.fromkeys((*SETTING_UP, *SLOW), _nothing)
    _do(document, Session(folder, BASE, instead | {"python torchdistill/": _torchdistill}))


@pytest.mark.slow
@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_all_of_a_document(folder: Path, document: str) -> None:
    instead = dict.fromkeys(SETTING_UP, _nothing)
    _do(document, Session(folder, BASE, instead | {"torchrun": _torchrun, "python torchdistill/": _torchdistill}))


@pytest.mark.slow
def test_the_first_section_of_the_readme_word_for_word(folder: Path) -> None:
    """With this Python instead of a new environment."""
    first, second = [block for block in blocks(ROOT / "README.md") if block.language == "sh"][:2]
    lines = [line for line in (first.text + second.text).splitlines() if not line.startswith(SETTING_UP)]
    printed, code = _elsewhere("\n".join(lines))
    assert code == 0, printed
    assert "VkD, from a CNN" in printed
    assert (folder / "runs/digits/vkd/vit_from_cnn/summary.json").exists()


# --- what stands between the snippets -------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        linked = (path.parent / name) if name else path
        assert linked.exists(), f"{document}: {target}"
        assert not heading or heading in _headings(linked), f"{document}: {target}"


def _headings(path: Path) -> set[str]:
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_trust_names_what_is_allowed_and_what_is_not() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    for name in (*trust.PACKAGES, *trust.NAMESPACES, *trust.EXCEPTIONS, *trust.ATTRIBUTES, *trust.ARGUMENTS):
        assert f"`{name}`" in text, name
