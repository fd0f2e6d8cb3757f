"""What becomes one shard: its clips, the files that hold them, and their texts."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from dalle2_video.data.sources.member import (
    MOST_BYTES,
    READ_ERRORS,
    ArchiveError,
    Member,
    Problem,
    tar_members,
    tar_stamp,
)

FOLDER_SHARD = 2000  # a folder of more clips becomes 64 shards, so a stop loses little
LONGEST_NAME = 120  # bytes of a shard's name: file systems allow 255, and suffixes are added

Texts = dict[str, Member]  # category -> the file or cell with its lines


@dataclass(frozen=True)
class Source:
    """One archive or folder that holds clips, which becomes the shard `name`.

    archive: as people know it. videos: clip id -> file, images too. texts: clip id -> category ->
    member, wherever those lie. groups: clip id -> group of the split, where it is not the id of
    the video. categories: those that every clip should have. columns: keys of a JSON text that hold
    captions, None: all with words.
    """

    name: str
    archive: str
    videos: dict[str, Member]
    texts: dict[str, Texts]
    groups: dict[str, str] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None

    def fingerprint(self) -> str:
        """Changes when a clip, a text or a group is added, taken away or has another length."""
        return self._digest(lambda member: member.size)

    def stamp(self) -> str:
        """Changes when a file may have another content; nothing is read."""
        return self._digest(lambda member: (member.size, member.stamp))

    def content(self) -> str:
        """Changes when a file has another content; both ends of every file are read."""
        return self._digest(lambda member: (member.size, member.content()))

    def _digest(self, mark) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for clip in sorted(self.videos):
            texts = self.texts.get(clip, {})
            row = [clip, mark(self.videos[clip]), *((c, mark(texts[c])) for c in sorted(texts))]
            row += [self.groups[clip]] if clip in self.groups else []
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def stream(self) -> Iterator[tuple[str, Member, bytes | None]]:
        """(clip id, member, bytes) of each clip; bytes None: not read yet."""
        rest = dict(self.videos)
        packed = {member.archive for member in rest.values() if member.kind == "stream"}
        for archive in sorted(packed):
            clip_of = {
                member.name: clip for clip, member in rest.items() if member.archive == archive
            }
            with suppress(*READ_ERRORS), tarfile.open(archive, "r|*") as tar:
                for info in tar_members(tar):
                    clip = clip_of.get(info.name) if info.isreg() else None
                    file = tar.extractfile(info) if clip in rest else None
                    if clip is not None and file is not None and info.size <= MOST_BYTES:
                        if info.size != rest[clip].size or tar_stamp(info) != rest[clip].stamp:
                            continue  # an earlier member of the same name
                        data = file.read()
                        yield clip, rest.pop(clip), data
        # What a broken compressed tar did not give is among the rest: reading it names the cause.
        for clip in sorted(rest):
            yield clip, rest[clip], None


@dataclass
class Catalogue:
    """All that lies under a root: the sources with clips, what was left out, the layout that they
    were read by, what it found in words, and suffix -> number of files of no concern.
    """

    sources: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    layout: str = ""
    found: str = ""
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class Clips:
    """Clips as a layout collects them, to be parted into sources.

    categories, columns: as in Source. root_name: of the shard of a folder's own clips. texts: all
    files of a clip and category; a source takes the one in its own archive, else the first.
    """

    root_name: str
    problems: list[Problem]
    categories: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    videos: dict[str, dict[str, Member]] = field(default_factory=dict)  # by shard
    archive: dict[str, str] = field(default_factory=dict)  # of a shard
    texts: dict[str, dict[str, list[Member]]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def add(self, shard: str, clip: str, member: Member) -> None:
        """Adds a clip; a second file of the same id in its shard is a problem."""
        shard = shard_name(shard or self.root_name).lstrip(".") or "root"  # no hidden file
        other = self.archive.setdefault(shard, member.shown_archive)
        if other != member.shown_archive:
            raise ArchiveError(
                f"{other} and {member.shown_archive} have one name: rename one of them"
            )
        first = self.videos.setdefault(shard, {}).setdefault(clip, member)
        if first is not member:
            self.leave_out(member, f"a second copy: {first.name} is used")

    def leave_out(self, member: Member, cause: str) -> None:
        """Lists a file as a problem."""
        self.problems.append(Problem(member.shown_archive, member.name, cause))

    def sources(self) -> list[Source]:
        """By name; a folder of many clips in 64 parts, by a hash of the clip's id."""
        found = []
        for shard, videos in self.videos.items():
            parts = {shard: videos}
            if len(videos) > FOLDER_SHARD and next(iter(videos.values())).kind == "folder":
                parts = {f"{shard}-{i:02d}": {} for i in range(64)}
                for clip, member in videos.items():
                    bucket = hashlib.blake2b(clip.encode(), digest_size=1).digest()[0] % 64
                    parts[f"{shard}-{bucket:02d}"][clip] = member
            for name, some in parts.items():
                if some:
                    found.append(self._source(name, self.archive[shard], some))
        return sorted(found, key=lambda source: source.name)

    def _source(self, name: str, archive: str, videos: dict[str, Member]) -> Source:
        texts = {
            clip: {
                category: next((m for m in members if m.shown_archive == archive), members[0])
                for category, members in self.texts.get(clip, {}).items()
            }
            for clip in videos
        }
        groups = {clip: self.groups[clip] for clip in videos if clip in self.groups}
        return Source(name, archive, videos, texts, groups, self.categories, self.columns)


def shard_name(path: str) -> str:
    """A folder's or archive's path as the name of a file, with a hash where it is too long."""
    name = path.replace("/", "__")
    raw = name.encode()
    if len(raw) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return raw[: LONGEST_NAME - 20].decode(errors="ignore") + "__" + digest
