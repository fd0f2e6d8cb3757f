"""Every file below a root, in folders and in archives, read in place.

Archives appear as the folders that they would unpack to: member a/b.mp4 of x/y.zip has the path
x/y/a/b.mp4. An archive inside an archive is copied out for as long as it is read; nothing else is
ever extracted, and the inputs are only read.

A zip or a plain tar is read at random. A compressed tar has no index, so it is read from front to
back, twice in all: prefer a plain tar.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from dalle2_video.data.sources.member import (
    READ_ERRORS,
    ArchiveError,
    Member,
    Problem,
    escaped,
    tar_members,
    tar_stamp,
)
from dalle2_video.data.sources.suffixes import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    UNFINISHED,
    UNREAD_ARCHIVES,
    UNREAD_MEDIA,
    VIDEO_SUFFIXES,
    archive_suffix,
)

NESTED = 3  # archives inside one another
ROOM = 0.8  # of the free disk, for the copy of an archive inside another one
TEXT_BYTES = 1 << 20  # of a text file: a caption is below 10 kB
TABLE_BYTES = 1 << 30


class File(NamedTuple):
    """One file: where it would lie if all archives were unpacked, the archive's own such path ("":
    it lies in a folder), and how it is read.
    """

    path: str
    container: str
    member: Member


@dataclass
class Listing:
    """All files below a root. problems: what was left out; ignored: suffix -> number of files that
    are neither video, image, text, table nor archive.
    """

    root: Path
    files: list[File] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, container: str, member: Member) -> None:
        """Sorts one file in, by its name."""
        path = _normal(member)
        if any(_hidden(part) for part in path.split("/")):
            return
        lower = path.lower()
        known = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES)
        if lower.endswith(known):
            self.files.append(File(f"{container}/{path}" if container else path, container, member))
        elif UNREAD_MEDIA.search(lower):
            self.leave_out(member, "a format that is not read: convert it to mp4, jpg or png")
        elif UNFINISHED.search(lower):
            self.leave_out(member, "an unfinished download")
        else:
            self.ignored[PurePosixPath(lower).suffix or "no suffix"] += 1

    def leave_out(self, member: Member, cause: str) -> None:
        """Lists a file as a problem."""
        self.problems.append(Problem(member.shown_archive, member.name, cause))


def list_files(
    root: str | os.PathLike[str], scratch: Path | None = None, store: Path | None = None
) -> Listing:
    """All files below a folder, or in one archive; ArchiveError where it does not exist.

    Files that are no archive in spite of their names, members with unsafe names, links that lead
    nowhere and what cannot be read are problems. scratch: a folder for archives that lie inside
    others, to be deleted after the last read; None: these are problems. store: where the clips go,
    whose own files are no concern.
    """
    listing = Listing(Path(root))
    root = listing.root
    if not root.exists():
        raise ArchiveError(f"{root} does not exist")
    for path in [root] if root.is_file() else _walk(root, listing.problems):
        name = path.name if path == root else path.relative_to(root).as_posix()
        suffix = archive_suffix(name)
        if store is not None and _is_of_store(path, store):
            continue
        if cause := _left_out(path, name):
            listing.problems.append(Problem(str(root), name, cause))
        elif suffix:
            _Archive(str(path), str(path), name[: -len(suffix)], listing, scratch).list()
        elif path != root:
            status = path.stat()
            stamp = status.st_mtime_ns
            listing.add("", Member(str(root), "folder", name, status.st_size, stamp=stamp))
        else:
            raise ArchiveError(f"{root} is neither a folder nor an archive")
    return listing


def _walk(root: Path, problems: list[Problem]) -> Iterator[Path]:
    """All files under root, in sorted order; a linked folder is followed once, and one that cannot
    be read is a problem.
    """
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        folder = os.path.relpath(str(error.filename), root)
        problems.append(Problem(str(root), folder, f"cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in sorted(files) if not _hidden(name))


def _is_of_store(path: Path, store: Path) -> bool:
    """Whether a file is one that preprocess wrote there."""
    if path.parent == store:
        return path.name in ("manifest.json", "check.json", "check.png")
    own = {"index": ".json", "videos": ".h5", "texts": ".pt"}
    return path.parent.parent == store and own.get(path.parent.name) == path.suffix


def _left_out(path: Path, name: str) -> str:
    """Why a file is not looked into, or ""."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    if not path.is_file():
        return "is no plain file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if UNREAD_ARCHIVES.search(name) and not archive_suffix(name):
        return "an archive that is not read: unpack it into this folder"
    return _undecodable(name)


def _undecodable(name: str) -> str:
    return "" if escaped(name) == name else "its name is not UTF-8: rename it"


def _hidden(part: str) -> bool:
    return (part.startswith(".") and part not in ("..", ".")) or part == "__MACOSX"


def _normal(member: Member) -> str:
    """Its path with "/" between folders; zips made on Windows may have backslashes."""
    name = member.name.replace("\\", "/") if member.kind == "zip" else member.name
    return PurePosixPath(name).as_posix()


# ---------------------------------------------------------------- inside an archive


@dataclass(frozen=True)
class _Archive:
    """Lists one archive. path: where it is read; origin: its name for people; container: the
    path of the folder that it would unpack to.
    """

    path: str
    origin: str
    container: str
    listing: Listing
    scratch: Path | None
    depth: int = 1

    def list(self) -> None:
        """Adds its members, the last one of each name, as unpacking would leave them."""
        members: dict[str, tuple[Member, str]] = {}
        try:
            for member, cause in self._members():
                first, _ = members.pop(member.name, (None, ""))
                if first is not None:
                    self.listing.leave_out(first, "a second member of the same name follows it")
                members[member.name] = member, cause
        except READ_ERRORS as error:
            _raise_if_full(error)
            cause = f"no whole archive: {error or type(error).__name__}"
            self.listing.problems.append(Problem(self.origin, "", cause))
        for member, cause in members.values():
            if cause:
                self.listing.leave_out(member, cause)
            elif not archive_suffix(member.name):
                self.listing.add(self.container, member)
            elif not any(_hidden(part) for part in _normal(member).split("/")):
                self._list_nested(member)

    def _members(self) -> Iterator[tuple[Member, str]]:
        """(member, why it is left out, or "") by the file's content, not its suffix."""
        with open(self.path, "rb") as file:
            begin = file.read(4)
        if self.path.lower().endswith(".zip") or begin in (b"PK\3\4", b"PK\5\6", b"PK\7\x08"):
            found = self._zip()
        else:
            found = self._tar()
        for member, cause in found:
            cause = cause or _unsafe(member.name) or _undecodable(member.name)
            if not cause and UNREAD_ARCHIVES.search(member.name):
                if not archive_suffix(member.name):
                    cause = "an archive that is not read: unpack it beside this one"
            yield member, cause

    def _zip(self) -> Iterator[tuple[Member, str]]:
        with zipfile.ZipFile(self.path) as packed:
            for info in packed.infolist():
                link = stat.S_ISLNK(info.external_attr >> 16)
                if not info.is_dir() and not info.filename.endswith("\\"):
                    cause = "is a link, which is not followed" if link else ""
                    size, place = info.file_size, info.header_offset
                    yield self._member("zip", info.filename, size, place, None, info.CRC), cause

    def _tar(self) -> Iterator[tuple[Member, str]]:
        try:
            tar, kind = tarfile.open(self.path, "r:"), "tar"
        except tarfile.ReadError:
            tar, kind = tarfile.open(self.path, "r|*"), "stream"
        with tar:
            for info in tar_members(tar):
                if info.isdir():
                    continue
                cause = ""
                if info.issym() or info.islnk():
                    cause = f"is a link to {info.linkname}, which is not followed"
                elif not info.isreg() or info.issparse():
                    cause = "is no plain file"
                data = None
                if kind == "stream" and not cause:
                    data = self._kept(tar, info)
                stamp = tar_stamp(info)
                yield self._member(kind, info.name, info.size, info.offset_data, data, stamp), cause

    def _member(
        self, kind: str, name: str, size: int, offset: int, data: bytes | None, stamp: int
    ) -> Member:
        origin = "" if self.origin == self.path else self.origin
        return Member(self.path, kind, name, size, offset, data, stamp, origin)

    def _kept(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | None:
        """The bytes of a text in a compressed tar; an archive in it is copied out at once."""
        lower = info.name.lower()
        file = tar.extractfile(info)
        if file is not None and lower.endswith(TEXT_SUFFIXES):
            return file.read(TEXT_BYTES + 1)
        if file is not None and lower.endswith(TABLE_SUFFIXES):
            return file.read(TABLE_BYTES)
        if file is not None and archive_suffix(lower) and not self._why_not_copied(info.size):
            self._copy(file, info.name)
        return None

    # -------------------------------------------------------- archives inside it

    def _why_not_copied(self, size: int) -> str:
        """Why an archive of so many bytes inside this one is not copied out, or ""."""
        if self.scratch is None or self.depth == NESTED:
            return "an archive inside an archive: unpack the outer one"
        place = next(path for path in self.scratch.parents if path.exists())
        if size > ROOM * shutil.disk_usage(place).free:
            return f"an archive of {size / 1e9:.1f} GB inside an archive: no room for a copy"
        return ""

    def _inner_path(self, name: str) -> Path:
        assert self.scratch is not None
        digest = hashlib.blake2b(f"{self.origin}/{name}".encode(), digest_size=8).hexdigest()
        return self.scratch / (digest + archive_suffix(name).lower())

    def _copy(self, file: IO[bytes], name: str) -> None:
        place = self._inner_path(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)

    def _list_nested(self, member: Member) -> None:
        if cause := self._why_not_copied(member.size):
            self.listing.leave_out(member, cause)
            return
        try:
            if member.kind == "zip":
                with zipfile.ZipFile(self.path) as packed:
                    infos = {info.header_offset: info for info in packed.infolist()}
                    with packed.open(infos[member.offset]) as file:
                        self._copy(file, member.name)
            elif member.kind == "tar":
                with tarfile.open(self.path, "r:") as tar:
                    for info in tar_members(tar):
                        file = tar.extractfile(info) if info.offset_data == member.offset else None
                        if file is not None:
                            self._copy(file, member.name)
        except READ_ERRORS as error:
            _raise_if_full(error)
            self.listing.leave_out(member, f"unreadable in its archive: {error}")
            return
        name = _normal(member)
        inner = name[: -len(archive_suffix(name))]
        origin = f"{self.origin}/{name}"
        place = str(self._inner_path(member.name))
        _Archive(
            place, origin, f"{self.container}/{inner}", self.listing, self.scratch, self.depth + 1
        ).list()


def _raise_if_full(error: Exception) -> None:
    """The disk of the copies is full: no fault of the archive."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error


def _unsafe(name: str) -> str:
    """Why a member's name must not be trusted, or ""; zips of Windows may hold backslashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or re.match(r"[A-Za-z]:", name):
        return "its name is absolute: it points outside the archive"
    if ".." in path.parts:
        return "its name holds '..': it points outside the archive"
    return ""
