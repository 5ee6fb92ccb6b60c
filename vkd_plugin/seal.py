"""A digest over all bytes of a checkpoint, inside the checkpoint.

torch's files are zip archives whose checksums ``torch.load`` does not look at, and which do not cover everything that
it reads: a flipped bit can become a weight. A zip archive may end in a comment; ours is ``sha256:`` and the digest of
all that stands before it. ``torch.load`` reads such a file as any other.
"""

import hashlib
import struct
import zipfile
from pathlib import Path

_MARK = b"sha256:"
_HEX = 64
_CHUNK = 1 << 20
_DAMAGED = "it was damaged after it was written (its digest is another)"


def sealed(content: bytes | memoryview) -> bytearray:
    """What ``torch.save`` wrote, with its digest.

    Raises:
        ValueError: not a zip archive without a comment.
    """
    archive = bytearray(content)
    if archive[-22:-18] != b"PK\5\6" or archive[-2:] != b"\0\0":
        raise ValueError("not a zip archive that can be sealed")
    struct.pack_into("<H", archive, len(archive) - 2, len(_MARK) + _HEX)  # the length of the comment
    archive += _MARK
    archive += hashlib.sha256(archive).hexdigest().encode()
    return archive


def broken(path: Path) -> str | None:
    """What is wrong with a file that is sealed and other bytes than were sealed; None for any other.

    Raises:
        OSError: it cannot be read.
    """
    return _DAMAGED if _verified(path) is False else None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is known to be. One without a seal is checked as zip archive.

    Raises:
        OSError: it cannot be read.
    """
    intact = _verified(path)
    if intact is not None:
        return None if intact else _DAMAGED
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            # With this flag torch reads nothing, and uninitialised memory becomes the tensor.
            bad = bad or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
    except Exception as error:  # a damaged archive can raise nearly anything
        return str(error).strip() or type(error).__name__
    return f"wrong checksum of {bad}" if bad is not None else None


def _verified(path: Path) -> bool | None:
    """Whether the digest fits; None without one."""
    size = path.stat().st_size
    if size < len(_MARK) + _HEX:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(size - _HEX - len(_MARK))
        if file.read(len(_MARK)) != _MARK:
            return None
        found = file.read(_HEX)
        file.seek(0)
        left = size - _HEX
        while chunk := file.read(min(left, _CHUNK)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest().encode() == found
