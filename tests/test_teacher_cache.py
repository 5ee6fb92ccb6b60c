"""Teacher outputs that are kept: the run is the same, and nothing is used for what it was not computed for.

Runs are of the command line, in this process, on 65 augmented digits: epochs of five batches, in float32, where a
sample's outputs are the same to the last bit only if its batch is. A third epoch shows the first one's views again.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes_helper import work_together
from torch import Tensor, nn
from torchdistill.losses.high_level import WeightedSumLoss

from vkd_plugin import check
from vkd_plugin.cli import main
from vkd_plugin.engine import run as engine_run
from vkd_plugin.engine.box import EngineBox
from vkd_plugin.engine.randomness import SAMPLE, VIEW, Repeated, Views
from vkd_plugin.engine.records import MEASURED
from vkd_plugin.errors import UserError
from vkd_plugin.losses.feature_pair import Feature, FeaturePair
from vkd_plugin.models import digits_cnn
from vkd_plugin.models.weights import read_checkpoint
from vkd_plugin.teacher_cache import TeacherCache
from vkd_plugin.teacher_cache.rows import Rows

ROOT = Path(__file__).parents[1]
VKD = "configs/digits/vkd/vit_from_cnn.yaml"
KD = "configs/digits/kd/vit_from_cnn.yaml"
CE = "configs/digits/ce/vit.yaml"
SAMPLES, BATCH, EPOCHS, VIEWS = 65, 13, 3, 2
DATA = "datasets.digits/train.init.kwargs"
TRANSFORMS = f"{DATA}.transform.init.kwargs.transforms"
AUGMENTATION = """
                - !import_call
                  key: 'torchvision.transforms.RandomAffine'
                  init:
                    kwargs: {degrees: 10, translate: [0.1, 0.1]}"""
SHORT = (
    f"train.num_epochs={EPOCHS}",
    f"{DATA}.fraction=0.05",
    f"train.train_data_loader.kwargs={{batch_size: {BATCH}, num_workers: 0}}",
    "train.val_data_loader.dataset_id=digits/train",
    "test.test_data_loader.dataset_id=digits/train",
    "train.scheduler={key: StepLR, kwargs: {step_size: 1, gamma: 0.9}, scheduling_step: 1}",
    "models.student_model.kwargs.depth=1",
    "models.student_model.dst_ckpt=null",
)


@pytest.fixture(autouse=True)
def _in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine_run, "prove", lambda experiment: [])  # the dry run, as long as the run itself


@dataclass(frozen=True)
class Left:
    """What a run left: its lines of ``metrics.jsonl``, its ``last.pt``, and what it found of each epoch."""

    records: list[dict[str, Any]]
    last: dict[str, Any]
    shares: list[float]


def augmented(path: Path, config: str = VKD) -> str:
    """A copy of a configuration whose training images are augmented."""
    file = path / "augmented.yaml"
    file.write_text((ROOT / config).read_text().replace("transforms:", "transforms:" + AUGMENTATION, 1))
    return str(file)


def cache(folder: Path, **changes: Any) -> str:
    options = {"folder": str(folder), "views": VIEWS, "dtype": "float32"} | changes
    return f"train.teacher_cache={json.dumps(options)}"


def arguments(config: str, output: Path, *overrides: str, flags: tuple[str, ...] = ()) -> list[str]:
    sets = [word for override in (*SHORT, *overrides) for word in ("--set", override)]
    return ["--config", config, "--output", str(output), "--device", "cpu", "-student_only", *flags, *sets]


def train(config: str, output: Path, *overrides: str, flags: tuple[str, ...] = (), expect: int = 0) -> Left:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(engine_run, "prove", lambda experiment: [])
        assert main(arguments(config, output, *overrides, flags=flags)) == expect
    return left(output)


def left(output: Path) -> Left:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    shares = [line.get("teacher_cached_share") for line in lines]
    return Left(records, read_checkpoint(output / "checkpoints" / "last.pt"), shares)


def assert_same(one: Left, two: Left) -> None:
    """To the last bit, optimizer included."""
    assert one.records == two.records
    for part in ("model", "projectors", "optimizer"):
        assert _bits(one.last[part]) == _bits(two.last[part])


def _bits(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {name: _bits(value) for name, value in state.items()}
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass(frozen=True)
class Filled:
    """The run that filled a cache.

    Args:
        config: its file.
        folder: the cache.
        run: what it left.
    """

    config: str
    folder: Path
    run: Left


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    path = tmp_path_factory.mktemp("filled")
    config = augmented(path)
    run = train(config, path / "run", cache(path / "cache"), "train.checkpoint={keep: 2}")
    assert run.shares == [0, 0, 1]
    return Filled(config, path / "cache", run)


# The same run.


def test_a_run_that_finds_all_is_the_run_that_filled_it(filled: Filled, tmp_path: Path) -> None:
    """In a worker process too. The first batch always goes through the teacher."""
    before = contents(filled.folder)
    workers = "train.train_data_loader.kwargs.num_workers=1"
    found = train(filled.config, tmp_path / "run", cache(filled.folder), workers)
    assert found.shares == [1 - BATCH / SAMPLES, 1, 1]
    assert_same(found, filled.run)
    assert contents(filled.folder) == before


def test_it_is_the_run_of_a_teacher_that_computes_every_batch(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit until a view comes again, whose rows were computed in other batches, with other roundings."""

    def computed(self: TeacherCache, supplement: Any, device: Any, compute: Callable[[Tensor], Any]) -> Any:
        io_dict = compute(torch.arange(len(supplement[SAMPLE])))
        return io_dict["."]["output"], io_dict

    monkeypatch.setattr(TeacherCache, "outputs", computed)
    run = train(filled.config, tmp_path / "run", cache(tmp_path / "unused"), "train.checkpoint={keep: 2}")
    assert run.records[:VIEWS] == filled.run.records[:VIEWS]
    second, expected = (
        read_checkpoint(path / "run" / "checkpoints" / "epoch2.pt") for path in (tmp_path, filled.folder.parent)
    )
    assert _bits(second["model"]) == _bits(expected["model"])
    # Of the same rows in other company a convolution takes its sums, of up to 576 terms, in another order: that moves
    # them by 576 x 2^-24 = 3e-5 at worst, by far less in a mean.
    assert run.records[2]["loss"] == pytest.approx(filled.run.records[2]["loss"], rel=1e-6)
    assert [file.name for file in (tmp_path / "unused").iterdir()] == ["manifest.json"]


def test_views_come_again_and_differ(filled: Filled) -> None:
    """That is, images are augmented at all: else the other tests would show little."""
    rows = Rows(next(filled.folder.glob("final_conv*/*")), SAMPLES, 128 * 4)
    first, second = (rows.read(view, np.arange(SAMPLES)) for view in range(VIEWS))
    assert first[1].all()
    assert second[1].all()
    assert (first[0] != second[0]).any(axis=1).mean() > 0.5  # small shifts of 8 x 8 pixels round to none


def test_bfloat16_rounds_rows_and_nothing_else(filled: Filled, tmp_path: Path) -> None:
    run = train(filled.config, tmp_path / "run", cache(tmp_path / "cache", dtype="bfloat16"))
    assert run.records != filled.run.records
    for one, two in zip(run.records, filled.run.records, strict=True):
        # Each entry of a row moves by 2^-9 of itself at most, and a mean of them by no more.
        assert one["loss"] == pytest.approx(two["loss"], rel=2**-9)
    outputs = {file.name: file / f"float32-1x{width}" for file, width in _kept(filled.folder)}
    assert len(outputs) == 2
    for name, folder in outputs.items():
        (rounded,) = (tmp_path / "cache" / name).iterdir()
        for file in folder.glob("*.rows"):
            exact = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
            found = torch.frombuffer(bytearray((rounded / file.name).read_bytes()), dtype=torch.bfloat16)
            # The third epoch's rows are those of the first: each was written once, by the same batch in both runs.
            assert torch.equal(found, exact.to(torch.bfloat16))


def _kept(folder: Path) -> Iterator[tuple[Path, int]]:
    yield folder / "final_conv-output-spatial_mean", 128
    yield folder / "outputs-output-identity", 10


def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_had_happened(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the second epoch of five steps."""
    step, steps = EngineBox.post_forward_process, 0

    def counted(self: EngineBox, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        step(self, *args, **kwargs)
        steps += 1
        if steps == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    run = cache(tmp_path / "cache"), "train.checkpoint={keep: 2}"
    with monkeypatch.context() as patch:
        patch.setattr(EngineBox, "post_forward_process", counted)
        assert main(arguments(filled.config, tmp_path / "run", *run)) == 75
    assert_same(train(filled.config, tmp_path / "run", *run, flags=("--resume", "auto")), filled.run)
    assert contents(tmp_path / "cache") == contents(filled.folder)


def test_runs_of_two_seeds_share_the_views(filled: Filled, tmp_path: Path) -> None:
    run = train(filled.config, tmp_path / "run", cache(filled.folder), flags=("--seed", "5"))
    assert run.shares == [1 - BATCH / SAMPLES, 1, 1]
    assert run.records != filled.run.records


def test_accumulation_mixed_precision_and_a_sampler_that_repeats(filled: Filled, tmp_path: Path) -> None:
    switches = (
        cache(tmp_path / "cache"),
        "train.optimizer.grad_accum_step=2",
        "train.amp={dtype: bfloat16}",
        "train.channels_last=True",
        "train.train_data_loader.sampler.kwargs.replacement=True",
        "train.num_epochs=2",
    )
    first, second = (train(filled.config, tmp_path / name, *switches) for name in ("a", "b"))
    assert first.shares[0] < second.shares[0] == 1 - BATCH / SAMPLES
    assert second.shares[1] == 1
    assert_same(second, first)


def test_a_repeated_sample_goes_on_to_the_next_view() -> None:
    order = Repeated.numbered([4, 2, 4, 4])
    assert [Views(3).at(5, index) for index in order] == [2, 2, 0, 1]


# What is kept.


def test_rows_and_not_the_map(filled: Filled) -> None:
    expected = {"manifest.json"}
    for path, width in _kept(filled.folder):
        for view in range(VIEWS):
            folder = path.relative_to(filled.folder) / f"float32-1x{width}"
            expected |= {f"{folder}/view-{view:04d}.{what}" for what in ("rows", "sums")}
            assert (filled.folder / folder / f"view-{view:04d}.rows").stat().st_size == SAMPLES * width * 4
    assert contents(filled.folder).keys() == expected


def test_a_loss_that_does_not_say_what_it_reads_gets_every_hooked_output(tmp_path: Path) -> None:
    loss = {"student_module_path": ".", "student_module_io": "output", "temperature": 4.0, "alpha": 0.5}
    loss |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
    switches = (
        cache(tmp_path / "cache"),
        f"train.criterion.kwargs.sub_terms={json.dumps(terms)}",
        "train.teacher.forward_hook={input: [head], output: [final_conv]}",
        "train.num_epochs=1",
    )
    first, second = (train(augmented(tmp_path, KD), tmp_path / name, *switches) for name in ("a", "b"))
    assert_same(second, first)
    kept = {f"{file.parent.name}/{file.name}" for file in (tmp_path / "cache").glob("*/*")}
    assert kept == {
        "outputs-output-identity/float32-1x10",
        "final_conv-output-identity/float32-1x128x4x4",
        "head-input-identity/float32-1x128",
    }


def test_a_criterion_that_reads_nothing_of_the_teacher(tmp_path: Path) -> None:
    term = {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}}
    wrapper = {"key": "SimpleLossWrapper", "kwargs": term}
    terms = {
        "ce": {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": 1.0}
    }
    switches = f"train.criterion.kwargs.sub_terms={json.dumps(terms)}", "train.num_epochs=1"
    assert train(KD, tmp_path / "run", cache(tmp_path / "cache"), *switches).shares == [1]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["manifest.json"]


# The cache on its own, with a teacher of four samples in two views.


def supplement(indices: list[int], views: list[int] | None = None) -> dict[str, Tensor]:
    return {SAMPLE: torch.tensor(indices), VIEW: torch.tensor(views or [0] * len(indices))}


class Teacher:
    """Hooked outputs: a map (B, 3, 2, 2) and a tuple of two, looked up by view and sample.

    Args:
        change: what else happens to the outputs of a batch.

    Attributes:
        computed: how many samples, pass by pass.
    """

    def __init__(self, change: Callable[[Tensor], Any] = lambda value: value) -> None:
        self.maps = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.change = change
        self.computed: list[int] = []

    def of(self, batch: dict[str, Tensor]) -> Callable[[Tensor], dict[str, dict[str, Any]]]:
        def compute(places: Tensor) -> dict[str, dict[str, Any]]:
            self.computed.append(len(places))
            maps = self.maps[batch[VIEW][places], batch[SAMPLE][places]]
            return {
                ".": {"output": self.change(maps.flatten(1))},
                "map": {"output": maps},
                "pair": {"output": (maps.flatten(1), -maps.flatten(1))},
            }

        return compute


def opened(path: Path, *features: dict[str, Any], dtype: str = "float32") -> TeacherCache:
    """With FeaturePairs that read ``features``; with none, a criterion that says nothing."""
    terms = {
        str(place): {"criterion": FeaturePair(nn.MSELoss(), {"module": "."}, feature), "weight": 1.0}
        for place, feature in enumerate(features)
    }
    return TeacherCache(path, 4, dtype, WeightedSumLoss(sub_terms=terms) if features else nn.MSELoss())


def outputs(cache: TeacherCache, teacher: Teacher, indices: list[int], views: list[int] | None = None) -> Any:
    batch = supplement(indices, views)
    return cache.outputs(batch, torch.device("cpu"), teacher.of(batch))[1]


LOGITS: dict[str, Any] = {"module": "."}


def test_several_features_of_one_module(tmp_path: Path) -> None:
    read = [
        {"module": "map", "readout": "spatial_mean"},
        {"module": "map", "readout": "every_location"},
        {"module": "map"},
        {"module": "pair", "index": 0},
        {"module": "pair", "index": 1},
        {"module": "pair", "index": 0, "num_prefix_tokens": 1},
    ]
    for fills in (True, False):
        cache, teacher = opened(tmp_path, *read), Teacher()
        for indices, views in (([0, 1], [0, 0]), ([2, 0, 3], [1, 0, 0])):
            found = outputs(cache, teacher, indices, views)
            whole = teacher.of(supplement(indices, views))(torch.arange(len(indices)))
            for config in read:
                feature = Feature.from_config("teacher", config)
                assert torch.equal(feature.read(found), feature.read(whole))
        # A batch, its half as a proof, this test; then those that are missing.
        assert teacher.computed == ([2, 1, 2, 2, 3] if fills else [2, 1, 2, 3])


def test_no_two_features_share_their_rows(tmp_path: Path) -> None:
    """A number after the readout may be that of prefix tokens or of a part."""
    terms = {"module": ".", "num_prefix_tokens": 1}, {"module": "pair", "num_prefix_tokens": 1}
    outputs(opened(tmp_path, terms[0], LOGITS, {"module": "pair", "index": 1}), Teacher(), [0, 1])
    names = {file.name for file in tmp_path.iterdir()}
    assert len(names) == 3
    one, two = (
        opened(tmp_path / "other", {"module": module, "readout": "identity", **more})
        for module, more in (("pair", {"index": 1}), (".", {"num_prefix_tokens": 1}))
    )
    outputs(one, Teacher(), [0])
    outputs(two, Teacher(), [0])
    assert len({file.name.replace("pair", "x").replace("outputs", "x") for file in (tmp_path / "other").iterdir()}) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_outputs_have_the_type_that_the_teacher_gives_them(dtype: torch.dtype, tmp_path: Path) -> None:
    for _ in range(2):
        teacher = Teacher(lambda value: (4 * value).round().to(dtype))
        found = outputs(opened(tmp_path, LOGITS), teacher, [3, 1])["."]["output"]
        (value,) = found.values()
        assert value.dtype == dtype
        assert torch.equal(value, (4 * teacher.maps[0, [3, 1]].flatten(1)).round().to(dtype))


def test_a_sample_twice_in_a_batch_and_outputs_of_zeros(tmp_path: Path) -> None:
    for _ in range(2):
        found = outputs(opened(tmp_path, LOGITS), Teacher(torch.zeros_like), [1, 1, 2])["."]["output"]
        assert not next(iter(found.values())).any()


def test_what_is_missing_is_computed_and_nothing_else(tmp_path: Path) -> None:
    outputs(opened(tmp_path, LOGITS), Teacher(), [1, 3])
    cache, teacher = opened(tmp_path, LOGITS), Teacher()
    for indices in ([1], [0, 1, 3], [0, 1, 3]):
        outputs(cache, teacher, indices)
    assert teacher.computed == [1, 1, 1]
    assert (cache.found, cache.computed) == (5, 2)
    assert cache.share_found() == 5 / 7
    assert cache.share_found() == 0


def _not_kept(cache: TeacherCache, teacher: Teacher, match: str, indices: list[int] | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        outputs(cache, teacher, indices or [0, 1, 2])
    assert "\n" not in str(caught.value)


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    _not_kept(opened(tmp_path), Teacher(), "output of module 'pair' of the teacher is a tuple for 3 samples")
    _not_kept(opened(tmp_path, LOGITS), Teacher(torch.sum), r"output of module '\.' .* is \(\) for 3 samples")


def test_outputs_of_another_first_dimension(tmp_path: Path) -> None:
    _not_kept(opened(tmp_path, LOGITS), Teacher(lambda value: value[:2]), r"is \(2, 12\) for 3 samples")
    _not_kept(opened(tmp_path, LOGITS), Teacher(lambda value: value[:0]), r"is \(0, 12\) for 3 samples")


def test_outputs_whose_shape_changes(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path, LOGITS), Teacher()
    outputs(cache, teacher, [0, 1])
    teacher.change = lambda value: value[:, :11]
    _not_kept(cache, teacher, "of one shape", [2, 3])


DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "statistics of the batch": lambda value: value - value.mean(dim=0),
    "samples second": lambda value: value.T,
    "whatever it draws": lambda value: value + torch.rand(len(value), 1),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_outputs_that_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """Even where their first dimension is a multiple of the number of samples."""
    _not_kept(opened(tmp_path, LOGITS), Teacher(DEPENDENT[name]), "is another in another batch")


def test_outputs_too_large_for_their_dtype(tmp_path: Path) -> None:
    large = Teacher(lambda value: 1e5 * value)
    _not_kept(opened(tmp_path, LOGITS, dtype="float16"), large, r"not finite as torch\.float16")
    outputs(opened(tmp_path, LOGITS, dtype="bfloat16"), large, [0, 1, 2])


def test_rows_that_another_run_is_about_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that fill a cache at the same time may meet at a row, with other roundings."""
    write, torn = Rows.write, [True]

    def meeting(self: Rows, view: int, indices: Any, values: Any) -> None:
        write(self, view, indices, values)
        if torn.pop():
            with self._file(view, "rows").open("r+b") as file:
                file.write(b"another run's")

    monkeypatch.setattr(Rows, "write", meeting)
    torn[:0] = [False, False]
    found = outputs(opened(tmp_path, LOGITS), Teacher(), [0, 1])["."]["output"]
    assert torch.equal(next(iter(found.values())), Teacher().maps[0, :2].flatten(1))
    torn[:] = [True] * 100
    _not_kept(opened(tmp_path / "always", LOGITS), Teacher(), "is the disk full?")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    _not_kept(opened(tmp_path, LOGITS), Teacher(), "No space left on device")


# Another's cache.


def refusal(capfd: pytest.CaptureFixture[str], config: str, output: Path, *overrides: str) -> str:
    """The one line in which a run ends before it begins."""
    capfd.readouterr()
    assert main(arguments(config, output, *overrides)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "rror" in line or "Traceback" in line]
    assert not (output / "metrics.jsonl").exists()
    return line


OTHERS = {
    "weights": ("models.teacher_model.src_ckpt={}", "the teacher is another one, or has other weights"),
    "augmentation": (f"{TRANSFORMS}.0.init.kwargs.degrees=11", "images come out of the data set's transforms"),
    "normalisation": (f"{TRANSFORMS}.2.init.kwargs.std=[0.38]", "images come out of the data set's transforms"),
    "number of samples": (f"{DATA}.fraction=0.06", "another number of samples"),
    "samples": (f"{DATA}.seed=1", "the data set lists other files or labels"),
    "amp": ("train.amp={dtype: bfloat16}", "in another precision"),
    "teacher_amp": ("train.teacher_amp={dtype: bfloat16}", "in another precision"),
    "views": ("train.teacher_cache.views=3", "another number of views"),
    "seed": ("train.teacher_cache.seed=1", "another seed of the views"),
    "dtype": ("train.teacher_cache.dtype=bfloat16", "another dtype"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_used_for_another_purpose(
    name: str, filled: Filled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    override, why = OTHERS[name]
    teacher = digits_cnn(checkpoint="configs/digits/ce/digits_cnn.safetensors")
    teacher.head.bias.data[3] = torch.nextafter(teacher.head.bias[3].detach(), torch.tensor(torch.inf))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    before = contents(filled.folder)
    override = override.replace("{}", str(tmp_path / "teacher.pt"))
    line = refusal(capfd, filled.config, tmp_path / "run", cache(filled.folder), override)
    assert line.startswith("error: --set train.teacher_cache=")
    assert f"'{filled.folder}' is the cache of something else: " in line
    assert why in line
    assert line.endswith("; delete it or name another folder")
    assert contents(filled.folder) == before


DAMAGED = {
    "something else": ("notes.txt", b"mine", "holds something else than a cache of teacher outputs"),
    "half a manifest": ("manifest.json", b'{"format": 1, "tea', "manifest.json is damaged"),
    "bytes": ("manifest.json", b"\xff\xfe\x00", "manifest.json is damaged"),
    "another JSON": ("manifest.json", b"[1, 2]", "manifest.json is damaged"),
    "another version": ("manifest.json", b"{}", "the cache is of another version of this package"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_that_is_no_cache(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, data, why = DAMAGED[name]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / file).write_bytes(data)
    line = refusal(capfd, VKD, tmp_path / "run", cache(tmp_path / "cache"))
    assert line.startswith("error: --set train.teacher_cache=")
    assert why in line
    assert contents(tmp_path / "cache") == {file: data}


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("mine")
    assert str(tmp_path / "cache") in refusal(capfd, VKD, tmp_path / "run", cache(tmp_path / "cache"))
    assert (tmp_path / "cache").read_text() == "mine"


def test_samples_that_are_no_tensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, KD, tmp_path / "run", cache(tmp_path / "cache"), f"{DATA}.transform=null")
    assert "teacher_cache needs samples that are tensors" in line


def test_rows_that_are_whole_and_not_the_teachers(
    filled: Filled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As if the images had changed where nothing in the manifest shows it."""
    shutil.copytree(filled.folder, tmp_path / "cache")
    for path, width in _kept(tmp_path / "cache"):
        rows = Rows(path / f"float32-1x{width}", SAMPLES, width * 4)
        found, _ = rows.read(0, np.arange(SAMPLES))
        rows.write(0, np.arange(SAMPLES), np.roll(found, 1, axis=0))
    before = contents(tmp_path / "cache")
    line = refusal(capfd, filled.config, tmp_path / "run", cache(tmp_path / "cache"))
    assert "images, libraries or code have changed" in line
    assert contents(tmp_path / "cache") == before


# What cannot be kept, by its configuration alone.

STATIC = {
    "a teacher that trains": ("train.teacher.requires_grad=True", "the teacher trains (requires_grad)"),
    "a teacher's wrapper": (
        "train.teacher.auxiliary_model_wrapper={key: 'Teacher4FactorTransfer', kwargs: {minimal: null, "
        "input_module_path: 'final_conv', uses_decoder: True, paraphraser_ckpt: '', "
        "paraphraser_kwargs: {k: 0.5, num_input_channels: 128}}}",
        "the teacher is changed by auxiliary_model_wrapper",
    ),
    "a part of a teacher": ("train.teacher.sequential=[stem, pool]", "the teacher is changed by sequential"),
    "more than images": ("train.teacher.forward_proc=forward_batch_target", "the teacher is given more than images"),
    "collate_fn": ("train.train_data_loader.collate_fn=coco_collate_fn", "collate_fn may mix a batch's images"),
    "detection": ("train.task=detection", "a detector's images are padded to their batch"),
}


@pytest.mark.parametrize("name", STATIC)
def test_what_no_cache_can_be_right_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Said by a check, of which the dry step is left out here, and by a run."""
    override, why = STATIC[name]
    monkeypatch.setattr(check, "dry_run", lambda experiment, facts: None)
    assert main(["check", VKD, "--set", cache(tmp_path / "cache"), "--set", override]) == 2
    captured = capfd.readouterr()
    line = refusal(capfd, VKD, tmp_path / "run", cache(tmp_path / "cache"), override)
    for text in (captured.out + captured.err, line):
        assert f"{why}, so teacher_cache cannot keep its outputs" in text
        assert f"--set {override.partition('=')[0]}=" in text
    assert not (tmp_path / "cache").exists()


def test_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "dry_run", lambda experiment, facts: None)
    assert main(["check", CE, "--set", cache(tmp_path / "cache")]) == 2
    captured = capfd.readouterr()
    assert "there is no models.teacher_model, so teacher_cache" in captured.out + captured.err


def test_the_line_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "dry_run", lambda experiment, facts: None)
    text = (ROOT / VKD).read_text().replace("requires_grad: False", "requires_grad: True")
    (tmp_path / "trains.yaml").write_text(text.replace("  log_freq: 10\n", f"  {in_yaml(tmp_path / 'cache')}\n"))
    place = next(number for number, line in enumerate(text.splitlines(), 1) if "requires_grad: True" in line)
    assert main(["check", str(tmp_path / "trains.yaml")]) == 2
    captured = capfd.readouterr()
    assert f"trains.yaml:{place}:" in captured.out + captured.err


def in_yaml(folder: Path) -> str:
    return cache(folder).removeprefix("train.").replace("=", ": ", 1)


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "dry_run", lambda experiment, facts: None)
    before, train_and_rest = (ROOT / VKD).read_text().split("train:\n  log_freq: 10\n")
    stage, rest = train_and_rest.split("\ntest:")
    lines = ["train:", f"  {in_yaml(tmp_path / 'cache')}", "  stage1:", *(f"  {line}" for line in stage.splitlines())]
    (tmp_path / "staged.yaml").write_text(before + "\n".join(lines) + "\n\ntest:" + rest)
    place = len(before.splitlines()) + 2
    assert main(["check", str(tmp_path / "staged.yaml")]) == 2
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "stages may differ in teacher and data, so teacher_cache cannot keep its outputs" in text
    assert f"staged.yaml:{place}:" in text


# Two processes.

WORLD = 2
JOBS = {"first": (), "second": (), "refused": ("train.teacher_cache.seed=1",)}


def _work(rank: int, path: Path, config: str) -> None:
    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    engine_run.prove = lambda experiment: []
    codes = {}
    for name, overrides in JOBS.items():
        flags = "--dist_url", f"file://{path / name}.meet"
        with (path / f"{name} {rank}.err").open("w") as file, contextlib.redirect_stderr(file):
            codes[name] = main(arguments(config, path / name, cache(path / "cache"), *overrides, flags=flags))
    (path / f"codes {rank}.json").write_text(json.dumps(codes))


def test_two_processes_fill_and_read_one_cache(filled: Filled, tmp_path: Path) -> None:
    """Each its half of the samples; one sample is given to both, as 65 cannot be halved."""
    work_together(_work, (tmp_path, filled.config), WORLD)
    for rank in range(WORLD):
        assert json.loads((tmp_path / f"codes {rank}.json").read_text()) == {"first": 0, "second": 0, "refused": 2}
    first, second = left(tmp_path / "first"), left(tmp_path / "second")
    assert first.shares[:VIEWS] == [0, 0]
    assert second.shares[1:] == [1, 1]
    assert_same(second, first)
    for path, width in _kept(tmp_path / "cache"):
        rows, alone = (
            Rows(folder / path.name / f"float32-1x{width}", SAMPLES, width * 4)
            for folder in (tmp_path / "cache", filled.folder)
        )
        for view in range(VIEWS):
            (found, whole), (expected, _) = rows.read(view, np.arange(SAMPLES)), alone.read(view, np.arange(SAMPLES))
            assert whole.all()
            # The batches were others: sums of up to 576 terms in another order (3e-5 at worst).
            np.testing.assert_allclose(found.view(np.float32), expected.view(np.float32), rtol=1e-5, atol=1e-5)
    errors = "".join((tmp_path / f"refused {rank}.err").read_text() for rank in range(WORLD)).splitlines()
    (line,) = [line for line in errors if "rror" in line or "Traceback" in line]
    assert "another seed of the views" in line
