"""What tags have made, against the tables of the schema: before construction nobody can tell."""

from collections.abc import Iterator
from typing import Any

from ..config import Experiment
from ..config.nodes import is_private
from ..config.schema import experiment as schema
from ..config.spec import Anything, Either, Items, Named, Section, Spec, Text
from ..config.structure import fits_value
from .places import Path


def misfits(experiment: Experiment) -> Iterator[tuple[str, Path]]:
    """``(message, path)`` of each value that is not what stands at its place."""
    yield from _misfits(schema(experiment.root), experiment.data, ())
    datasets = experiment.data["datasets"]
    for section, loader in _loaders(experiment.data) if isinstance(datasets, dict) else ():
        name = loader["dataset_id"]
        if name not in datasets:
            yield f"no dataset {_shown(name)} under datasets", (*section, "dataset_id")


def _misfits(spec: Spec, value: Any, path: Path) -> Iterator[tuple[str, Path]]:
    if isinstance(spec, Either):
        found = [list(_misfits(option, value, path)) for option in spec.options]
        if value is not None and all(any(at == path for _, at in wrong) for wrong in found):
            yield f"expected {spec.expected}, got {_shown(value)}", path
            return
        yield from min(found, key=len) if value is not None or not spec.nullable else ()
    elif isinstance(spec, Anything) or (value is None and spec.nullable) or _is_component(spec, value):
        return
    elif isinstance(spec, Section | Named) and isinstance(value, dict):
        if isinstance(spec, Section):
            yield from ((f"missing key '{name}'", path) for name in spec.required if name not in value)
        for name, inner in value.items():
            entry = spec.keys.get(name) if isinstance(spec, Section) else spec.entry
            if entry is not None and not is_private(name):
                yield from _misfits(entry, inner, (*path, name))
    elif isinstance(spec, Items) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _misfits(spec.item, item, (*path, index))
    elif isinstance(spec, Section | Named | Items) or not fits_value(spec, value):
        yield f"expected {spec.expected}, got {_shown(value)}", path


def _is_component(spec: Spec, value: Any) -> bool:
    """Whether ``value`` is an object where torchdistill would make one, or takes one that is made."""
    kind = spec.component if isinstance(spec, Section) else spec.role if isinstance(spec, Text) else None
    return kind in ("loss", "collate function") and callable(value)


def _loaders(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    sections: dict[Path, Any] = {("train",): data["train"], ("test",): data["test"]}
    sections |= {("train", name): section for name, section in data["train"].items()}
    for path, section in sections.items():
        for name in ("train_data_loader", "val_data_loader", "test_data_loader"):
            loader = section.get(name) if isinstance(section, dict) else None
            if isinstance(loader, dict) and "dataset_id" in loader:
                yield (*path, name), loader


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
