"""Archives as ``torch.save`` writes them: where each member lies in the file, checked before any is read.

A zip archive says some things twice, and readers differ in which they take.  One that could be read in two ways is
refused, and so is whatever torch never writes: compressed members, members that overlap, several directories.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from spectra.errors import CorruptFileError, UnsafeFileError
from spectra.files.values import stamp_of

MAX_DIRECTORY_BYTES = 16_000_000  # of the archive: some 150 bytes a storage
LARGEST = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)  # what stands in 16 and 32 bits for a number that zip64 has elsewhere


@dataclass
class Archive:
    """The members of a torch archive: name after the first folder → (place, bytes) of its content in the file.

    ``stamp`` is the file's size and time of change.
    """

    path: Path
    stamp: tuple[int, int]
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_members(path: Path, file: BinaryIO, size: int) -> Archive:
    """The members of an open archive of that many bytes.

    Raises
    ------
    CorruptFileError : it is broken, or no archive that torch.save writes.
    UnsafeFileError : a pickle without an archive, or a program of TorchScript.
    """
    start = file.read(4)
    if start != b"PK\x03\x04":
        if not start:
            raise CorruptFileError(path, "the file is empty")
        if start[:1] == b"\x80":
            raise UnsafeFileError(
                path,
                "this is a bare pickle, or what torch.save wrote before 1.6: neither can be bounded before it is read; "
                "load it with torch.load(path, weights_only=True) and save it again",
            )
        raise CorruptFileError(path, "not an archive as torch.save writes it")
    count = _check_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as opened:
            infos = opened.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise CorruptFileError(path, f"truncated or malformed archive: {str(error)[:100]}") from None
    if len(infos) != count:
        raise CorruptFileError(path, f"malformed: its directory has {len(infos):,} members, and should have {count:,}")
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1 or "data.pkl" not in {info.filename.partition("/")[2] for info in infos}:
        raise CorruptFileError(path, "not an archive as torch.save writes it: it has no data.pkl in its one folder")
    archive = Archive(path, stamp_of(os.fstat(file.fileno())))
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in archive.members:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} occurs twice in the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} is compressed, which torch.save never does")
        if info.external_attr & 0x10 or name.endswith("/"):  # of which torch reads nothing
            raise CorruptFileError(path, f"malformed: {name[:80]!r} is marked as a folder of the archive")
        archive.members[name] = (_content(path, file, info, size), info.file_size)
    program = next((name for name in archive.members if name.startswith("code/") or name == "constants.pkl"), None)
    if program is not None:
        raise UnsafeFileError(path, f"this is a TorchScript program ({program[:80]!r}), not a dictionary of tensors")
    end = 0
    for name, (place, length) in sorted(archive.members.items(), key=lambda item: item[1]):
        if place < end:
            raise CorruptFileError(path, f"malformed: {name[:80]!r} overlaps another member of the archive")
        end = place + length
    if "byteorder" in archive.members:  # archives of before 2.1 have none, and are little-endian
        place, length = archive.members["byteorder"]
        file.seek(place)
        order = file.read(min(length, 16))
        if order != b"little":
            raise CorruptFileError(path, f"its numbers are stored in byte order {order!r}, which is not read")
    return archive


def _check_directory(path: Path, file: BinaryIO, size: int) -> int:
    """How many members the directory at the end of the archive says it has.

    Raises CorruptFileError unless there is one directory, of a bounded length, that ends where its end is described:
    in 22 bytes, or (zip64) in 56, 20 that say where those begin, and 22.
    """
    file.seek(max(0, size - 98))
    tail = file.read()
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise CorruptFileError(path, "truncated: the directory at the end of the archive is missing")
    count: int
    _, _, _, count, length, begin = struct.unpack("<4H2I", end[4:20])
    place = size - 22
    if tail[-42:-38] == b"PK\x06\x07":
        place = size - 98
        _, at, _ = struct.unpack("<IQI", tail[-38:-22])
        if at != place or tail[:4] != b"PK\x06\x06" or int.from_bytes(tail[4:12], "little") != 44:
            raise CorruptFileError(path, "malformed: the end of its directory is not where the archive says")
        for field64, said, most in zip(struct.unpack("<3Q", tail[32:56]), (count, length, begin), LARGEST, strict=True):
            if said not in (most, field64):
                raise CorruptFileError(path, f"malformed: its directory is described as of {said:,} and {field64:,}")
        count, length, begin = struct.unpack("<3Q", tail[32:56])
    if length > min(MAX_DIRECTORY_BYTES, size):
        raise CorruptFileError(path, f"malformed: its directory has {length:,} bytes")
    if begin + length != place:
        raise CorruptFileError(
            path, f"malformed: the archive's directory ends at {begin + length:,}, and not at {place:,}"
        )
    return count


def _content(path: Path, file: BinaryIO, info: zipfile.ZipInfo, size: int) -> int:
    """Where a member's content begins, behind a header of its own that repeats its name."""
    file.seek(max(0, info.header_offset))  # negative, where the directory lies about itself
    header = file.read(30) if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CorruptFileError(path, f"malformed: {info.filename[:80]!r} is not where the archive's directory says")
    place = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if place + info.file_size > size:
        raise CorruptFileError(path, f"truncated: {info.filename[:80]!r} would end behind the file")
    return place
