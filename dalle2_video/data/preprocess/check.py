"""Reads a whole store back and lists what is wrong with it: `python preprocess.py check=true`."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import DataConfig
from dalle2_video.data.media.sheet import save_sheet
from dalle2_video.data.preprocess.journal import stored_hash
from dalle2_video.data.sources.captions import CONTEXT, END, START, Line
from dalle2_video.data.store.shard import StoreError, index_paths, read_index, shard_paths
from dalle2_video.data.store.store import ClipStore

ON_SHEET = 12  # random clips


@dataclass(frozen=True)
class CheckReport:
    """What was read. problems: a sentence each, naming shard and clip; plain: windows of one colour
    (black at the start of a film, for example: no problem, but worth a look).
    """

    store: str
    clips: int
    windows: int
    images: int
    shards: int
    gigabytes: float
    clips_by_split: dict[str, int]
    groups_by_split: dict[str, int]
    lines_per_clip: float
    clips_by_category: dict[str, int]
    plain: list[str]
    without_hash: int
    warnings: list[str]
    problems: list[str]
    sheet: str

    def __str__(self) -> str:
        splits = ", ".join(
            f"{name} {clips} clips of {self.groups_by_split[name]} groups"
            for name, clips in self.clips_by_split.items()
        )
        texts = ", ".join(f"{name} {count}" for name, count in self.clips_by_category.items())
        images = f", {self.images} images" if self.images else ""
        rows = [
            f"{self.store}: {self.clips} clips ({self.windows} windows{images}) in {self.shards} "
            f"shards, {self.gigabytes:.3f} GB",
            f"splits: {splits}",
            f"texts: {self.lines_per_clip:.1f} lines per clip; clips with each kind: {texts}",
        ]
        if self.plain:
            rows.append(f"of one colour throughout: {len(self.plain)}, such as {self.plain[0]}")
        if self.without_hash:
            rows.append(f"made before frames were hashed: {self.without_hash} clips")
        rows += [f"warning: {warning}" for warning in self.warnings]
        rows += [f"PROBLEM: {problem}" for problem in self.problems]
        rows.append(f"{len(self.problems)} problems; look at {self.sheet}; report in check.json")
        return "\n".join(rows)


def check_store(config: DataConfig, seed: int = 0) -> CheckReport:
    """Verifies counts, shapes, time stamps, hashes, tokens and splits.

    Writes check.json and check.png into the store. StoreError, naming the file, where the
    store cannot be opened at all.
    """
    root = config.store
    store = ClipStore.open(root, config.splits, config.split_seed)
    problems: list[str] = []
    if store.settings != config.settings:
        problems.append(f"holds clips of {store.settings}, data asks for {config.settings}")
    hashes = {
        clip["clip"]: clip.get("hash")
        for path in index_paths(root)
        for clip in read_index(path)["clips"]
        if clip["status"] == "kept"
    }
    plain, kinds, lines = [], Counter(), 0
    positions = range(len(store) + store.num_images)
    bar = tqdm(total=len(positions), unit="window", desc="check", mininterval=0.5)
    for name, group in groupby(positions, store.clip_ids.__getitem__):
        windows = list(group)
        where = f"{store.home(windows[0])}: clip {name}"
        try:
            stored = [store.stored(window) for window in windows]
            texts = store.lines(windows[0])
            if hashes[name] not in (None, stored_hash(stored)):
                problems.append(f"{where}: its frames have changed on disk")
            for window in windows:
                frames = store.frames([window])
                problems += [f"{where}: {problem}" for problem in _timestamps(store, window)]
                if frames.min() == frames.max():
                    plain.append(store.key(window))
        except (OSError, StoreError, IndexError, ValueError) as error:
            problems.append(f"{where} cannot be read: {error}")
            continue
        finally:
            bar.update(len(windows))
        kinds.update(texts.keys())
        lines += sum(map(len, texts.values()))
        problems += [f"{where}: {problem}" for problem in _texts(texts)]
    bar.close()
    by_split, groups = _splits(store, problems)
    names = sorted(random.Random(seed).sample(positions, min(ON_SHEET, len(positions))))
    sheet = root / "check.png"
    _draw(store, names, sheet, problems)
    size = sum(f.stat().st_size for p in index_paths(root) for f in shard_paths(root, p.stem))
    report = CheckReport(
        store=str(root),
        clips=len(hashes),
        windows=len(store),
        images=store.num_images,
        shards=len(store.shards),
        gigabytes=size / 1e9,
        clips_by_split=by_split,
        groups_by_split=groups,
        lines_per_clip=lines / max(1, len(hashes)),
        clips_by_category=dict(sorted(kinds.items())),
        plain=plain,
        without_hash=sum(value is None for value in hashes.values()),
        warnings=store.warnings,
        problems=problems,
        sheet=str(sheet),
    )
    write_json(root / "check.json", asdict(report))
    return report


def _timestamps(store: ClipStore, clip: int) -> Iterator[str]:
    timestamps = store.timestamps(clip)
    if not np.isfinite(timestamps).all() or (np.diff(timestamps) < 0).any():
        yield f"its time stamps do not rise: {timestamps.tolist()}"


def _texts(texts: dict[str, list[Line]]) -> Iterator[str]:
    if not texts:
        yield "it has no text"
    for category, lines in texts.items():
        for line in lines:
            ids: Any = line.tokens
            whole = 3 <= len(ids) <= CONTEXT and ids[0] == START and ids[-1] == END
            if not whole or not all(0 < token < START for token in ids[1:-1]):
                yield f"{category}: no tokens of a line: {line.text!r}"


def _splits(store: ClipStore, problems: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Windows and groups of each split; a group in two splits is a problem."""
    home: defaultdict[str, set[str]] = defaultdict(set)
    counts: dict[str, int] = {}
    for name in store.splits:
        clips = store.split(name)
        counts[name] = len(clips)
        for clip in clips:
            home[store.groups[clip]].add(name)
    for group, names in home.items():
        if names != {store.split_of_group[group]}:
            problems.append(f"group {group} leaks: it is in the splits {', '.join(sorted(names))}")
    if sum(counts.values()) != len(store):
        problems.append(f"the splits hold {sum(counts.values())} of {len(store)} clips")
    return counts, {name: sum(name in names for names in home.values()) for name in counts}


def _draw(store: ClipStore, clips: list[int], path: Path, problems: list[str]) -> None:
    try:
        captions = [
            store.clip_ids[clip] + "\n" + "\n".join(part[0].text for part in lines.values())
            for clip in clips
            for lines in [store.lines(clip)]
        ]
        save_sheet(path, list(store.frames(clips)), captions)
    except (OSError, StoreError, IndexError, ValueError) as error:
        problems.append(f"no sheet could be drawn: {error}")
