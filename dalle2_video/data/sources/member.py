"""A file of an archive or a folder, read in place, and what is said of one that is left out."""

from __future__ import annotations

import hashlib
import lzma
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dalle2_video.errors import UserError

MOST_BYTES = 2 << 30  # of one member; a clip has about 10 MB, so more is damage or a bomb
END_BYTES = 1 << 16  # read at both ends of a large file to tell whether it has changed
READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,  # an encrypted zip
    NotImplementedError,  # an unknown compression
    ValueError,  # names and numbers of damaged headers, as are the next two
    OverflowError,
    IndexError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)


class ArchiveError(UserError):
    """Nothing to read, or a member that cannot be read; the message is the cause."""


class NoClipsError(ArchiveError):
    """There is nothing that could be a clip."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside an archive or folder.

    kind: zip, tar, stream (a compressed tar), folder or cell (of a table). offset: of its bytes in
    a plain tar, of its header in a zip. data: its bytes, kept for a cell, and for the texts of a
    compressed tar. stamp: changes with its content: the checksum of a zip, the time of last change
    elsewhere. origin: the archive as it is shown, where `archive` is a copy of one that lay inside
    another.
    """

    archive: str
    kind: str
    name: str
    size: int
    offset: int = 0
    data: bytes | None = None
    stamp: int = 0
    origin: str = ""

    @property
    def shown_archive(self) -> str:
        """The archive as people know it."""
        return self.origin or self.archive

    def read(self) -> bytes:
        """All its bytes; ArchiveError where the archive does not give them whole."""
        if self.size > MOST_BYTES:
            raise ArchiveError(f"too large: {self.size / 1e9:.1f} GB")
        try:
            if self.data is not None:
                return self.data
            if self.kind == "zip":
                packed, infos = _open_zip(self.archive)
                return packed.read(infos[self.offset])
            if self.kind == "folder":
                return (Path(self.archive) / self.name).read_bytes()
            if self.kind != "tar":
                raise ArchiveError("truncated: its archive ends before it")  # see Source.stream
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except KeyError as error:
            raise ArchiveError("its archive has changed since it was listed") from error
        except READ_ERRORS as error:
            raise ArchiveError(f"unreadable in its archive: {error}") from error
        if len(data) != self.size:
            raise ArchiveError(
                f"truncated: its archive ends after {len(data)} of {self.size} bytes"
            )
        return data

    def content(self) -> str:
        """Hex digits that tell another content of the same size: of all bytes of a small file, of
        both ends of a large one, and the checksum that a zip holds anyway.
        """
        if self.data is not None:
            return hashlib.blake2b(self.data, digest_size=8).hexdigest()
        if self.kind in ("zip", "stream"):
            return f"{self.stamp:x}"
        place = Path(self.archive) / self.name if self.kind == "folder" else Path(self.archive)
        digest = hashlib.blake2b(digest_size=8)
        try:
            with open(place, "rb") as file:
                for start in (0, max(0, self.size - END_BYTES)):
                    file.seek(self.offset + start)
                    digest.update(file.read(min(END_BYTES, self.size)))
        except OSError as error:
            return f"unreadable: {error.strerror}"
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was left out: which archive, which member of it ("" = all), why. Bytes of a
    name that are not UTF-8 are escaped.
    """

    archive: str
    member: str
    cause: str

    def __post_init__(self) -> None:
        for name in ("archive", "member", "cause"):
            object.__setattr__(self, name, escaped(getattr(self, name)))


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar; ReadError where a damaged header leads back, without an end."""
    place = -1
    for info in tar:
        if info.size < 0 or info.offset <= place:
            raise tarfile.ReadError("damaged header")
        place = info.offset
        yield info


def tar_stamp(info: tarfile.TarInfo) -> int:
    """The time of last change, 0 where it is no number."""
    return int(info.mtime) if math.isfinite(info.mtime) else 0


def escaped(name: str) -> str:
    """A name of a file system or an archive as text that every file can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name


def _open_zip(archive: str) -> tuple[zipfile.ZipFile, dict[int, zipfile.ZipInfo]]:
    """An open zip per process and state of the file: a fork must not share its parent's offset.

    Its entries are found by their place: a zip may hold one name twice.
    """
    status = os.stat(archive)
    return _cached_zip(archive, os.getpid(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _cached_zip(
    archive: str, pid: int, mtime: int, size: int
) -> tuple[zipfile.ZipFile, dict[int, zipfile.ZipInfo]]:
    packed = zipfile.ZipFile(archive)
    return packed, {info.header_offset: info for info in packed.infolist()}
