"""What the folders of runs hold, finished or not, read without building or executing anything of theirs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config.graph import check_graph
from ..config.nodes import TEXT_TAGS, entries, is_active, is_null, is_private, plain_value
from ..config.problems import ConfigErrors, KeyPath, Problems, dotted
from ..config.source import compose
from ..engine.checkpoint import read_run_checkpoint
from ..engine.records import read_metrics
from ..errors import UserError
from ..suggest import nearest
from ..tasks import METRICS
from .summary import read_summary

_SEARCHED = 2000
"""Folders that are looked at for one whose name is near."""


@dataclass
class Run:
    """One run.

    Attributes:
        path: its folder, as the user named it.
        name: the part of the path that tells it from the other runs.
        records: the lines of ``metrics.jsonl``, one per epoch.
        summary: ``summary.json``; of an unfinished run what its last checkpoint knows of it.
        finished: whether there is a ``summary.json``.
        config: the text of ``config.yaml``, None without one.
        problem: why ``config`` cannot be read as an experiment, None if it can.
        epochs: how many there are to be, None if that is not known.
        projectors: ``{feature: 'OrthogonalProjector (matrix_exp)'}`` as configured, of the last stage that has any.
        is_detection: whether it trains a detector.
    """

    path: Path
    name: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    config: str | None = None
    problem: str | None = None
    epochs: int | None = None
    projectors: dict[str, str] = field(default_factory=dict)
    is_detection: bool = False

    def __post_init__(self) -> None:
        by_epoch = {record["epoch"]: record for record in read_metrics(self.path)}
        self.records = [by_epoch[epoch] for epoch in sorted(by_epoch)]
        self._read_summary()
        self._read_config()

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last epoch; empty before there is one."""
        return as_mapping(self.summary.get("last")) or (self.records[-1] if self.records else {})

    @property
    def best(self) -> dict[str, Any]:
        """The record of the best epoch, by which ``best.pt`` was chosen; empty before there is one."""
        return as_mapping(self.summary.get("best")) or max(self.records, key=_score, default={})

    @property
    def status(self) -> str:
        """``finished``, or how far it has come."""
        if self.finished:
            return "finished"
        of = f" of {self.epochs}" if self.epochs is not None else ""
        return f"unfinished, epoch {self.last.get('epoch', 0)}{of}"

    def _read_summary(self) -> None:
        file = self.path / "summary.json"
        self.finished = file.is_file()
        if not self.finished:
            try:
                state = read_run_checkpoint(self.path / "checkpoints" / "last.pt")
            except UserError:  # none yet, or damaged: less is known
                return
            self.summary = {key: state[key] for key in ("seed", "versions", "resumed") if key in state}
            self.summary["wall_seconds"] = state.get("seconds")
            return
        self.summary = read_summary(file)

    def _read_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            self.problem = f"{file}: no such file"
            return
        try:
            self.config = file.read_text("utf-8")
            train = _at(_root(self), "train")
        except (OSError, ValueError) as error:
            self.problem = f"{file}: {error}"
            return
        self.is_detection = _plain(_at(train, "task")) == "detection"
        stages = [_at(train, f"stage{number}") for number in range(1, 100)]
        sections: list[yaml.Node | None] = [stage for stage in stages if stage is not None] or [train]
        epochs = [_plain(_at(section, "num_epochs")) for section in sections]
        if all(isinstance(number, int) for number in epochs):
            self.epochs = sum(epochs)
        for section in sections:
            features = _at(section, "student", "auxiliary_model_wrapper", "kwargs", "features")
            found = dict(_projectors(features))
            self.projectors = found or self.projectors


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in folders; one that is named twice counts once.

    Raises:
        UserError: a folder that holds no run (the nearest that does is named), or a summary that cannot be read.
    """
    folders = {os.path.realpath(path): Path(path) for path in paths}
    for folder in folders.values():
        if not is_run(folder):
            raise UserError(f"{folder}: {_no_run(folder)}")
    runs = [Run(folder) for folder in folders.values()]
    for run, name in zip(runs, _names(runs), strict=True):
        run.name = name
    return runs


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is the output folder of a run, which may have just begun."""
    has = [(folder / name).is_file() for name in ("metrics.jsonl", "summary.json", "config.yaml", "log.txt")]
    return has[0] or has[1] or (has[2] and has[3])


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """What the configurations say differently, value by value.

    Returns:
        ``(key, values)`` in the order of the files, keys as ``--set`` takes them, a value per run: None where it has
        no such key. Runs whose configuration cannot be read have none at all and make no difference.
    """
    leaves = [{} if run.problem else dict(_leaves(_root(run))) for run in runs]
    read = [found for found in leaves if found]
    keys = dict.fromkeys(key for found in read for key in found)
    return [
        (dotted(key), [found.get(key) for found in leaves])
        for key in keys
        if len({found.get(key) for found in read}) > 1
    ]


def _score(record: Mapping[str, Any]) -> float:
    """As the trainer scores an epoch; one whose figures are not finite comes last."""
    for name in (f"{prefix}/{metric}" for metric in METRICS for prefix in ("val_ema", "val")):
        if name in record:
            return record[name] if is_number(record[name]) else -float("inf")
    return -record["loss"] if is_number(record.get("loss")) else -float("inf")


def as_mapping(value: object) -> dict[str, Any]:
    """``value``; empty if it is something else than a mapping."""
    return value if isinstance(value, dict) else {}


def is_number(value: object) -> bool:
    """Whether a value of a record is a finite number; what was not finite is null in JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _root(run: Run) -> yaml.MappingNode:
    """The nodes of the run's configuration.

    Raises:
        ValueError: there are none.
    """
    problems = Problems()
    try:
        root = compose(run.config or "", "config.yaml")
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("holds no experiment")
        check_graph(root, problems)
        problems.raise_if_any()
    except ConfigErrors as error:
        raise ValueError(str(error.problems[0])) from None
    return root


def _leaves(node: yaml.Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Each value of a tree, and each tag that makes something of what is below it, as text."""
    if is_active(node):
        yield path, node.tag
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, (key_node, value) in entries(node).items():
            if not is_private(key):
                yield from _leaves(value, (*path, key_node.value if isinstance(key, yaml.Node) else key))
    elif isinstance(node, yaml.SequenceNode) and node.value and node.tag not in TEXT_TAGS:
        for index, item in enumerate(node.value):
            yield from _leaves(item, (*path, index))
    elif not (is_active(node) and is_null(node)):
        value = plain_value(node)
        yield path, "null" if value is None else repr(value)


def _at(node: yaml.Node | None, *path: str) -> yaml.Node | None:
    for part in path:
        node = entries(node).get(part, (None, None))[1] if isinstance(node, yaml.MappingNode) else None
    return node


def _plain(node: yaml.Node | None) -> Any:
    return None if node is None else plain_value(node)


def _projectors(features: yaml.Node | None) -> Iterator[tuple[str, str]]:
    if not isinstance(features, yaml.MappingNode):
        return
    for name, (_, feature) in entries(features).items():
        kind = _plain(_at(feature, "projector", "key")) or "OrthogonalProjector"
        chosen = _plain(_at(feature, "projector", "orthogonal_map")) or "matrix_exp"
        yield str(name), f"{kind} ({chosen})" if kind == "OrthogonalProjector" else str(kind)


def _names(runs: Sequence[Run]) -> list[str]:
    """Paths without the folders above all of them; of a single run the path itself."""
    real = [os.path.abspath(run.path) for run in runs]
    if len(runs) == 1:
        return [str(runs[0].path) if runs[0].path.name else os.path.basename(real[0])]
    above = os.path.commonpath([os.path.dirname(path) for path in real])
    return [os.path.relpath(path, above) for path in real]


def _no_run(folder: Path) -> str:
    if not folder.exists():
        why = "no such folder"
    elif not folder.is_dir():
        why = "is a file, not the folder of a run"
    else:
        why = "holds no run (no metrics.jsonl, summary.json or config.yaml with log.txt)"
    above = folder
    while not above.is_dir():
        above = above.parent
    candidates = [str(path) for path in _runs_below(above)]
    if folder.is_dir():
        return why + (f"; below it: {', '.join(sorted(candidates)[:5])}" if candidates else "")
    return why + nearest(folder, candidates, show=5)


def _runs_below(folder: Path) -> Iterator[Path]:
    for number, (path, inside, _) in enumerate(os.walk(folder)):
        if number >= _SEARCHED:
            return
        if is_run(Path(path)):
            inside.clear()
            yield Path(path)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
