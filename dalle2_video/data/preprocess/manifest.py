"""manifest.json: what a store holds, and all that was left out of it and why, over all shards."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import DataConfig
from dalle2_video.data.sources.source import Catalogue
from dalle2_video.data.store.shard import (
    FORMAT,
    StoreError,
    index_paths,
    is_whole_index,
    read_index,
    shard_paths,
)


@dataclass(frozen=True)
class Summary:
    """What one run found and did; skipped counts clips and members by kind of cause;
    most is a cause of the most common kind.
    """

    clips: int
    made: int
    shards: int
    shards_kept: int
    skipped: dict[str, int]
    texts_left_out: int
    converted: dict[str, int]
    lines_split: int
    gigabytes: float
    minutes: float
    ignored: dict[str, int]
    most: str
    store: str

    def raise_if_empty(self) -> None:
        """StoreError where there were archives and no clip of them is usable."""
        if self.clips == 0 and (self.skipped or self.shards):
            raise StoreError(
                f"{self.store}: no clip is usable, mostly: {self.most}; all causes are in "
                f"{self.store}/manifest.json"
            )

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.skipped.items()))
        converted = ", ".join(f"{how} {count}" for how, count in self.converted.items())
        ignored = ", ".join(f"{suffix} {count}" for suffix, count in self.ignored.items())
        return (
            f"{self.store}: {self.clips} clips in {self.shards} shards ({self.made} clips made now,"
            f" {self.shards_kept} shards were there), {self.gigabytes:.3f} GB, "
            f"{self.minutes:.1f} min; skipped: {causes or 'nothing'}; text files left out: "
            f"{self.texts_left_out}; lines over 77 tokens, split: {self.lines_split}; "
            f"converted: {converted or 'none'}; other files: {ignored or 'none'}; "
            "details in manifest.json"
        )


def write_manifest(
    config: DataConfig, catalogue: Catalogue, made: int, shards_made: int, begun: float
) -> Summary:
    """Joins what all shards left out, with what never reached a shard, into manifest.json.

    StoreError where a file of a shard is gone and its archive too, so that it cannot be made again.
    """
    skipped = [
        {"archive": relative_name(p.archive, config.root), "file": p.member, "cause": p.cause}
        for p in catalogue.problems
    ]
    texts, converted, shards, lines_split, clips, size = [], [], {}, 0, 0, 0
    for path in filter(
        is_whole_index, index_paths(config.store)
    ):  # another part may be at work on one
        index = read_index(path)
        archive = index["archive"]
        kept = sum(clip["status"] == "kept" for clip in index["clips"])
        shards[path.stem] = {"archive": archive, "clips": kept}
        skipped += [
            {"archive": archive, "file": c["file"], "clip": c["clip"], "cause": c["cause"]}
            for c in index["clips"]
            if c["status"] != "kept"
        ]
        converted += [
            {"archive": archive, "clip": c["clip"], "how": c["converted"]}
            for c in index["clips"]
            if c.get("converted")
        ]
        texts += [{"archive": archive, **note} for note in index["texts_left_out"]]
        lines_split += index["lines_split"]
        clips += kept
        for file in shard_paths(config.store, path.stem):
            if not file.exists():
                raise StoreError(
                    f"{file} is missing, {path} lists it, and {archive} is not there to make it "
                    f"from: bring the archive back, or remove {path}"
                )
            size += file.stat().st_size
    summary = Summary(
        clips=clips,
        made=made,
        shards=len(shards),
        shards_kept=len(shards) - shards_made,
        skipped=dict(Counter(item["cause"].split(":")[0] for item in skipped)),
        texts_left_out=len(texts),
        converted=dict(Counter(how for item in converted for how in item["how"])),
        lines_split=lines_split,
        gigabytes=size / 1e9,
        minutes=(time.monotonic() - begun) / 60,
        ignored=dict(sorted(catalogue.ignored.items())),
        most=_most_common([item["cause"] for item in skipped]),
        store=str(config.store),
    )
    manifest = {
        "format": FORMAT,
        "settings": asdict(config.settings),
        "clips": clips,
        "shards": shards,
        "skipped": skipped,
        "texts_left_out": texts,
        "converted": converted,
        "lines_split": lines_split,
        "ignored": dict(sorted(catalogue.ignored.items())),
    }
    write_json(config.store / "manifest.json", manifest)
    return summary


def _most_common(causes: list[str]) -> str:
    """The first cause of the most common kind; causes of one kind begin alike, up to a colon."""
    kinds = Counter(cause.split(":")[0] for cause in causes)
    most = max(kinds, key=kinds.__getitem__, default="")
    return next((cause for cause in causes if cause.startswith(most)), "no clip was found")


def relative_name(archive: str, root: str) -> str:
    """An archive's path below data.root; the root's own name for the root."""
    path = Path(archive)
    return path.name if path == Path(root) else str(path.relative_to(root))
