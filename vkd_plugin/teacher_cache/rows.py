"""Rows of bytes in memory-mapped files, believed only with their checksum.

One folder holds what was kept of one output of the teacher, two files for each view of the data set::

    view-0003.rows     row i is sample i's, all of them of the same size
    view-0003.sums     CRC-32 of each row, 0 where nothing has been written

The files are sparse: they take room on the disk as they are filled. Several processes may read and write them at
once, and any of them may be killed: what was torn fails its checksum and is written again. Reading is by memory map,
writing is not: on a full disk a write to a map ends the process with a signal, a write to a file with an error.
"""

import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_MAPPED = 4
"""Views that are mapped at a time; epochs use one, and a process may have few files open."""


class Rows:
    """The rows of one folder.

    Args:
        folder: made if it does not exist.
        samples: rows of a view.
        size: of a row, in bytes.
    """

    def __init__(self, folder: Path, samples: int, size: int) -> None:
        self.folder = folder
        self.samples = samples
        self.size = size
        self._views: dict[int, tuple[Bytes, NDArray[np.uint32]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, view: int, indices: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.bool_]]:
        """The rows (N, size) of samples (N,) in a view, and which of them (N,) are there and whole."""
        rows, sums = self._view(view)
        found, expected = rows[indices], sums[indices]
        whole = [known != 0 and _checksum(row) == known for row, known in zip(found, expected, strict=True)]
        return found, np.array(whole, bool)

    def write(self, view: int, indices: NDArray[np.int64], values: Bytes) -> None:
        """Keeps ``values`` (N, size) as the rows of samples (N,) in a view.

        Raises:
            OSError: they cannot be written.
        """
        self._view(view)  # its files are there
        with open(self._file(view, "rows"), "r+b") as rows, open(self._file(view, "sums"), "r+b") as sums:
            for index, row in zip(indices.tolist(), values, strict=True):
                os.pwrite(rows.fileno(), row, index * self.size)
                os.pwrite(sums.fileno(), np.uint32(_checksum(row)).tobytes(), index * 4)

    def _view(self, view: int) -> tuple[Bytes, NDArray[np.uint32]]:
        """Rows and checksums as the files have them now, and will have them."""
        if view not in self._views:
            if len(self._views) == _MAPPED:
                del self._views[next(iter(self._views))]
            rows = _mapped(self._file(view, "rows"), self.samples * self.size)
            sums = _mapped(self._file(view, "sums"), self.samples * 4)
            self._views[view] = rows.reshape(self.samples, self.size), sums.view(np.uint32)
        return self._views[view]

    def _file(self, view: int, what: str) -> Path:
        return self.folder / f"view-{view:04d}.{what}"


def _checksum(row: Bytes) -> int:
    return zlib.crc32(row.data) or 1  # 0 stands for a row that is not there


def _mapped(file: Path, size: int) -> Bytes:
    """The file's bytes, zeros where nothing was ever written."""
    with open(file, "ab") as opened:  # appending: made if it is not there, and nothing of it lost if it is
        opened.truncate(size)
    return np.memmap(file, np.uint8, "r", shape=(size,))
