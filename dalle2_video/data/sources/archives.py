"""Where the clips and their texts lie: zips, tars or an extracted folder -> members, read in place.

CelebV-Text comes as zips or tars, whose folders have several spellings. What
counts here is only the end of a member's path: a video is <clip id>.mp4 in any folder, a text is
<clip id>.txt in a folder named for a category. Texts may lie in the same archive as the videos, in
another one, or in a folder beside. Nothing is ever extracted; the inputs are only read.

A zip or a plain tar is read at random. A compressed tar has no index, so it is read from front to
back, twice in all: prefer a plain tar.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dalle2_video.data.config import CATEGORIES
from dalle2_video.data.sources.member import (
    MOST_BYTES,
    READ_ERRORS,
    ArchiveError,
    Member,
    Problem,
    escaped,
)

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"),
    *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".ogv", ".wmv", ".3gp"),
)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Archives that Python cannot read in place, and pieces of split ones.
UNREAD_ARCHIVES = re.compile(r"\.(7z|rar|zst|lz4|lzma|z\d\d|\d{3})$", re.I)
CLIP_NAME = re.compile(r".{11}(_\d+){1,2}")
FOLDER_SHARD = 2000  # an extracted folder of more clips becomes 64 shards, so a stop loses little
_TEXT_LIMIT = 1 << 20  # bytes; a text file is below 10 kB

_CATEGORY_OF = {
    **{name: name for name in CATEGORIES},
    "face40_details_new": "face40_details",
    "light_colot_temp": "light_color_temp",
}


@dataclass(frozen=True)
class Source:
    """One archive or folder that holds videos, which becomes the shard `name`.

    videos: clip id -> member. texts: clip id -> category -> member, wherever those lie.
    """

    name: str
    archive: str
    videos: dict[str, Member]
    texts: dict[str, dict[str, Member]]

    def fingerprint(self) -> str:
        """Changes when a clip or a text is added, taken away or has another length."""
        digest = hashlib.blake2b(digest_size=8)
        for clip in sorted(self.videos):
            texts = self.texts.get(clip, {})
            row = [clip, self.videos[clip].size, *((c, texts[c].size) for c in sorted(texts))]
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def stream(self) -> Iterator[tuple[str, Member, bytes | None]]:
        """(clip id, member, bytes) of each video; bytes None: not read yet."""
        rest = dict(self.videos)
        if any(member.kind == "stream" for member in self.videos.values()):
            clip_of = {member.name: clip for clip, member in self.videos.items()}
            with suppress(*READ_ERRORS), tarfile.open(self.archive, "r|*") as tar:
                for info in tar:
                    clip = clip_of.pop(info.name, None) if info.isreg() else None
                    file = tar.extractfile(info) if clip is not None else None
                    if clip is not None and file is not None and info.size <= MOST_BYTES:
                        data = file.read()
                        yield clip, rest.pop(clip), data
        # What a broken compressed tar did not give is among the rest: reading it names the cause.
        for clip in sorted(rest):
            yield clip, rest[clip], None


@dataclass
class Catalogue:
    """All that lies under a root: the sources with videos, and what was left out."""

    sources: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find_sources(root: str | os.PathLike[str]) -> Catalogue:
    """Looks through a folder (or one archive) for videos and texts.

    Files that are no archive in spite of their names, members with unsafe names, links, videos
    whose names are no clip names, second copies and unknown text folders are listed as problems.
    ArchiveError where there is nothing at all.
    """
    root = Path(root)
    if not root.exists():
        raise ArchiveError(f"{root} does not exist")
    catalogue = Catalogue()
    members = _Members(catalogue.problems)
    for path in [root] if root.is_file() else _files(root, catalogue.problems):
        lower = path.name.lower()
        member = path.name if path == root else path.relative_to(root).as_posix()
        if cause := _left_out(path, member):
            catalogue.problems.append(Problem(str(root), member, cause))
        elif lower.endswith(ARCHIVE_SUFFIXES):
            suffix = next(s for s in ARCHIVE_SUFFIXES if lower.endswith(s))
            _list_archive(path, member[: -len(suffix)], members)
        elif path != root and lower.endswith((*VIDEO_SUFFIXES, ".txt")):
            shard = str(Path(member).parent) if "/" in member else root.name
            members.add(shard, Member(str(root), "folder", member, path.stat().st_size))
    catalogue.sources = members.sources()
    if not catalogue.sources and not catalogue.problems:
        raise ArchiveError(
            f"{root} holds no clips: expected zips or tars of CelebV-Text, or its folders videos/ "
            "and texts/"
        )
    return catalogue


def _files(root: Path, problems: list[Problem]) -> Iterator[Path]:
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


def _left_out(path: Path, name: str) -> str:
    """Why a file is not looked into, or ""."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    if not path.is_file():
        return "is no plain file"
    if not os.access(path, os.R_OK):
        return "cannot be read: permission denied"
    if UNREAD_ARCHIVES.search(name):
        return "an archive that is not read: unpack it into this folder"
    return _undecodable(name)


def _undecodable(name: str) -> str:
    return "" if escaped(name) == name else "its name is not UTF-8: rename it"


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


class _Members:
    """Sorts members into videos by shard and texts by clip; lists what it leaves out."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.videos: dict[str, dict[str, Member]] = {}
        self.archive: dict[str, str] = {}
        self.texts: dict[str, dict[str, list[Member]]] = {}
        self.unknown: set[tuple[str, str]] = set()

    def add(self, shard: str, member: Member) -> None:
        path = _path_of(member)
        if any(_hidden(part) for part in path.parts if part not in ("..", ".")):
            return
        if path.suffix.lower() in VIDEO_SUFFIXES:
            self._add_video(shard.replace("/", "__"), path, member)
        elif path.suffix.lower() == ".txt" and CLIP_NAME.fullmatch(path.stem):
            names = [part.lower() for part in reversed(path.parts[:-1])]
            category = next((_CATEGORY_OF[name] for name in names if name in _CATEGORY_OF), None)
            if category is not None:
                self.texts.setdefault(path.stem, {}).setdefault(category, []).append(member)
            elif (member.archive, str(path.parent)) not in self.unknown:
                self.unknown.add((member.archive, str(path.parent)))
                known = ", ".join(_CATEGORY_OF)
                cause = f"texts of no known category ({known})"
                self.problems.append(Problem(member.archive, str(path.parent), cause))

    def _add_video(self, shard: str, path: PurePosixPath, member: Member) -> None:
        cause = ""
        if not CLIP_NAME.fullmatch(path.stem):
            cause = "its name is no clip name, {11-character id}_{n}_{m}"
        elif path.stem in self.videos.get(shard, {}):
            cause = f"a second copy: {self.videos[shard][path.stem].name} is used"
        if cause:
            self.problems.append(Problem(member.archive, member.name, cause))
            return
        other = self.archive.setdefault(shard, member.archive)
        if other != member.archive:
            raise ArchiveError(f"{other} and {member.archive} have one name: rename one of them")
        self.videos.setdefault(shard, {})[path.stem] = member

    def sources(self) -> list[Source]:
        found = []
        for shard, videos in self.videos.items():
            archive = self.archive[shard]
            parts = {shard: videos}
            if len(videos) > FOLDER_SHARD and next(iter(videos.values())).kind == "folder":
                parts = {f"{shard}-{i:02d}": {} for i in range(64)}
                for clip, member in videos.items():
                    bucket = hashlib.blake2b(clip.encode(), digest_size=1).digest()[0] % 64
                    parts[f"{shard}-{bucket:02d}"][clip] = member
            for name, some in parts.items():
                texts = {clip: self._texts_of(clip, archive) for clip in some}
                if some:
                    found.append(Source(name, archive, some, texts))
        return sorted(found, key=lambda source: source.name)

    def _texts_of(self, clip: str, archive: str) -> dict[str, Member]:
        """One member per category: the one in the videos' own archive, else the first found."""
        return {
            category: next((m for m in members if m.archive == archive), members[0])
            for category, members in self.texts.get(clip, {}).items()
        }


# ---------------------------------------------------------------- listing an archive


def _list_archive(path: Path, shard: str, members: _Members) -> None:
    archive = str(path)
    try:
        for member, cause in _zip_or_tar(archive):
            cause = cause or _unsafe(member.name) or _undecodable(member.name)
            if not cause and UNREAD_ARCHIVES.search(member.name):
                cause = "an archive that is not read: unpack it beside this one"
            if not cause and member.name.lower().endswith(ARCHIVE_SUFFIXES):
                cause = "an archive inside an archive: unpack the outer one"
            if cause:
                members.problems.append(Problem(archive, member.name, cause))
            else:
                members.add(shard, member)
    except READ_ERRORS as error:
        cause = f"no whole archive: {error or type(error).__name__}"
        members.problems.append(Problem(archive, "", cause))


def _zip_or_tar(archive: str) -> Iterator[tuple[Member, str]]:
    """(member, why it is no plain file or "") by the file's content, not its suffix."""
    if archive.lower().endswith(".zip") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                link = stat.S_ISLNK(info.external_attr >> 16)
                if not info.is_dir():
                    cause = "is a link, which is not followed" if link else ""
                    yield Member(archive, "zip", info.filename, info.file_size), cause
        return
    try:
        tar, kind = tarfile.open(archive, "r:"), "tar"
    except tarfile.ReadError:
        tar, kind = tarfile.open(archive, "r|*"), "stream"
    with tar:
        for info in tar:
            if info.isdir():
                continue
            cause = ""
            if info.issym() or info.islnk():
                cause = f"is a link to {info.linkname}, which is not followed"
            elif not info.isreg() or info.issparse():
                cause = "is no plain file"
            data = None
            if kind == "stream" and not cause and info.name.lower().endswith(".txt"):
                file = tar.extractfile(info)
                data = file.read(_TEXT_LIMIT) if file is not None else None
            yield Member(archive, kind, info.name, info.size, info.offset_data, data), cause


def _path_of(member: Member) -> PurePosixPath:
    """Its path; zips made on Windows may have backslashes between folders."""
    name = member.name.replace("\\", "/") if member.kind == "zip" else member.name
    return PurePosixPath(name)


def _unsafe(name: str) -> str:
    """Why a member's name must not be trusted, or ""; zips of Windows may hold backslashes."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or re.match(r"[A-Za-z]:", name):
        return "its name is absolute: it points outside the archive"
    if ".." in path.parts:
        return "its name holds '..': it points outside the archive"
    return ""
