"""What a cache of teacher outputs belongs to: whatever decides them, so that none is ever used for another's."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..engine.randomness import AddressedDataset
from ..errors import BadValue, UserError
from ..teacher import state_digest

MANIFEST = "manifest.json"
_UNFINISHED = ".part"
PROBES = 16
"""Samples that are loaded, in the first view and the last, and compared to the last value."""

WHAT = {
    "format": "the cache is of another version of this package",
    "teacher": "the teacher is another one, or has other weights",
    "precision": "the teacher computes in another precision (amp, channels_last)",
    "samples": "the data set has another number of samples",
    "data": "the data set lists other files or labels",
    "probes": "images come out of the data set's transforms otherwise",
    "views": "another number of views",
    "seed": "another seed of the views",
    "dtype": "another dtype",
}
"""Part of an identity -> what it means that it differs."""


def identity(
    teacher: nn.Module,
    described: Mapping[str, Any],
    precision: str,
    dataset: AddressedDataset,
    views: int,
    seed: int,
    dtype: str,
) -> dict[str, Any]:
    """Everything that decides what a frozen teacher puts out for a data set's samples.

    Weights and buffers count with every bit, and so do labels and names of files where the data set has a list of
    them. Of the images themselves :data:`PROBES` are looked at, as the transforms put them out: another
    resolution, normalisation or crop is found, one exchanged image among a million is not.

    Args:
        teacher: on any device.
        described: the teacher's section of the configuration.
        precision: of its forward pass, in words.
        dataset: with the views' addresses.
        views, seed, dtype: of the cache.
    """
    return {
        "format": 1,
        "teacher": _digest(type(teacher).__qualname__, json.dumps(described, default=_plain), state_digest(teacher)),
        "precision": precision,
        "samples": len(dataset),
        "data": _digest(*_listing(dataset)),
        "probes": _digest(*_probes(dataset, views)),
        "views": views,
        "seed": seed,
        "dtype": dtype,
    }


def sign(folder: Path, own: Mapping[str, Any]) -> None:
    """Makes ``folder`` the cache of ``own``, or finds that it is.

    Raises:
        BadValue: it is another's; the message says what differs. Nothing in it is touched.
        UserError: something else lies there, or it cannot be written.
    """
    file, other = folder / MANIFEST, "delete it or name another folder"
    try:
        if not file.exists():
            _claim(folder, json.dumps(own, indent=1) + "\n")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error
    try:
        found = dict(json.loads(data))
    except (ValueError, TypeError):
        raise BadValue(f"{file} is damaged; {other}", str(folder)) from None
    differing = [name for name in own if found.get(name) != own[name]]
    if differing:
        why = "; ".join(WHAT[name] for name in differing)
        raise BadValue(f"'{folder}' is the cache of something else: {why}; {other}", str(folder))


def _claim(folder: Path, text: str) -> None:
    """Writes the manifest of a new cache, unless another run comes first."""
    if (
        folder.is_dir()
        and any(item.suffix != _UNFINISHED for item in folder.iterdir())
        and not (folder / MANIFEST).exists()
    ):
        raise BadValue(f"'{folder}' holds something else than a cache of teacher outputs", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{uuid4().hex}{_UNFINISHED}"
    try:
        whole.write_text(text)
        with suppress(FileExistsError):
            os.link(whole, folder / MANIFEST)  # all of it or nothing, and never over another's
    finally:
        whole.unlink(missing_ok=True)


def _plain(value: Any) -> str:
    """Of what JSON does not have: a name that stays the same from run to run, without addresses."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _listing(dataset: Any) -> Iterable[Any]:
    """What a data set says of its samples without loading one: names of files, labels, or the data themselves."""
    root = str(getattr(dataset, "root", ""))
    for name in ("samples", "targets", "data"):
        value = getattr(dataset, name, None)
        if isinstance(value, Tensor | np.ndarray):
            yield np.ascontiguousarray(value)
        elif isinstance(value, list | tuple):
            yield "\n".join(str(item).replace(root, "", 1) for item in value)


def _probes(dataset: Dataset[Any], views: int) -> Iterable[Any]:
    """Samples spread evenly over the data set, in the first view and the last, as the teacher would see them."""
    count = min(PROBES, len(dataset))  # type: ignore[arg-type]
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():  # type: ignore[arg-type]
        for view in sorted({0, views - 1}):
            sample = dataset.in_epoch(view, index)[0]  # type: ignore[attr-defined]
            if not isinstance(sample, Tensor):
                raise UserError(f"teacher_cache needs samples that are tensors, got a {type(sample).__name__}")
            yield sample.contiguous().view(torch.uint8).numpy() if sample.ndim else np.asarray(sample)


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        shape = f"{part.shape}{part.dtype}" if isinstance(part, np.ndarray) else ""
        digest.update(f"{len(data)}{shape};".encode())
        digest.update(data)
    return digest.hexdigest()
