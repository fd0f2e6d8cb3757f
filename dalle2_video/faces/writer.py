"""The embedded data set: rendered talking heads with exact captions, in CelebV-Text's layout.

`python -m dalle2_video.faces.writer --out data/faces --clips 4000` writes

    faces_000.zip ...     texts/<category>/<clip>.txt and videos/celebvtext_6/<clip>.mp4 (H.264)
    attributes.jsonl      one line a clip: id, split, archive, identity, every attribute
    faces.json            the settings; the same command continues where it was stopped

Clip names are {11-character id}_{n}_{m}; all clips of an id show one person. The split of an id is
`split_of` (data/store.py). Clips of split `combo` show only held-out appearance combinations, those
of `train` none of them, those of `val` only combinations that some clip of `train` shows.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import random
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dalle2_video.data.media.video import encode_mp4
from dalle2_video.data.preprocess.pool import WorkerPool
from dalle2_video.data.store.store import split_of
from dalle2_video.faces.attributes import (
    APPEARANCE,
    ATTRIBUTES,
    Combination,
    FaceAttributes,
    all_combinations,
    draw_attributes,
    draw_combination,
    held_out_combinations,
)
from dalle2_video.faces.captions import write_captions
from dalle2_video.faces.render import render

FRACTIONS = {"train": 0.85, "val": 0.075, "combo": 0.075}
# Slower presets of x264 look ahead, and do not give the same bytes each time for small frames.
CRF, PRESET = 14, "ultrafast"
FORMAT = 1  # raise when the same settings give other clips, so that old archives are not continued


@dataclass(frozen=True)
class FaceClip:
    """One clip before it is drawn: everything that drawing and captions depend on."""

    clip_id: str
    split: str
    identity: int
    attributes: FaceAttributes

    @property
    def seed(self) -> int:
        """Keys place, sway and blinks of this clip."""
        return int.from_bytes(hashlib.blake2b(self.clip_id.encode(), digest_size=6).digest(), "big")

    def to_row(self, archive: str) -> dict[str, str | int | float | None]:
        """The clip's line of attributes.jsonl."""
        head = {"clip": self.clip_id, "split": self.split, "archive": archive}
        return head | {"identity": self.identity} | self.attributes.to_dict()


def read_attributes(path: str | os.PathLike[str]) -> dict[str, FaceAttributes]:
    """attributes.jsonl -> attributes by clip id. Raises ValueError naming file and line."""
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            found[row["clip"]] = FaceAttributes.from_dict(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no attributes of a clip ({error})") from error
    return found


def plan(
    num_clips: int,
    seed: int,
    fractions: Mapping[str, float] = FRACTIONS,
    split_seed: int | None = None,
) -> list[FaceClip]:
    """All clips of a data set, in order; a pure function. Ids hold 2 to 4 clips each.

    split_seed (None: `seed`) is the one that the readers of the data give to `split_of`.
    """
    ids = list(_ids(num_clips, seed, fractions, seed if split_seed is None else split_seed))
    held_out = held_out_combinations(seed)
    pools = {"train": frozenset(all_combinations()) - held_out, "combo": held_out}
    looks: dict[str, list[Combination]] = {}
    for split in ("train", "combo"):
        looks |= _draw_looks([i for i in ids if i.split == split], pools[split])
    seen = frozenset(c for i in ids if i.split == "train" for c in looks[i.youtube_id])
    others = [i for i in ids if i.split not in pools]
    # Before the first clip of train (tiny sets) any combination that train may draw will do.
    looks |= _draw_looks(others, seen or pools["train"])
    return [
        FaceClip(
            f"{person.youtube_id}_{k // 2}_{k % 2}",
            person.split,
            person.identity,
            draw_attributes(random.Random(f"clip:{seed}:{person.identity}:{k}"), look),
        )
        for person in ids
        for k, look in enumerate(looks[person.youtube_id])
    ]


@dataclass(frozen=True)
class _Person:
    youtube_id: str
    split: str
    identity: int
    clips: int


def _ids(
    num_clips: int, seed: int, fractions: Mapping[str, float], split_seed: int
) -> Iterator[_Person]:
    """People with 2 to 4 clips each until num_clips are full."""
    index = 0
    while num_clips > 0:
        digest = hashlib.blake2b(f"id:{seed}:{index}".encode(), digest_size=9).digest()
        name = base64.urlsafe_b64encode(digest).decode()[:11]
        if index % 4 < 2:  # '_' and '-' stand in many real ids, so in every small set too
            place = digest[-1] % 11
            name = name[:place] + "_-"[index % 4] + name[place + 1 :]
        clips = min(num_clips, 2 + digest[0] % 3)
        identity = int.from_bytes(digest[:6], "big")
        yield _Person(name, split_of(name, split_seed, fractions), identity, clips)
        num_clips, index = num_clips - clips, index + 1


def _draw_looks(
    people: list[_Person], allowed: frozenset[Combination]
) -> dict[str, list[Combination]]:
    """Combinations of every clip; the skin is the person's."""
    skins = sorted({c[APPEARANCE.index("skin")] or "" for c in allowed}, key=_skin_order)
    looks = {}
    for person in people:
        rng = random.Random(f"look:{person.identity}")
        skin = rng.choice(skins)
        looks[person.youtube_id] = [
            draw_combination(rng, skin, allowed) for _ in range(person.clips)
        ]
    return looks


def _skin_order(skin: str) -> int:
    return ATTRIBUTES["skin"].index(skin)


@dataclass(frozen=True)
class FacesConfig:
    """The section `faces`: the embedded data set, rendered into its own folder `root` alone.

    size in pixels, seconds of each clip, fps: frames per second.
    """

    root: str = "data/faces"
    clips: int = 4000
    size: int = 64
    fps: float = 8.0
    seconds: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class FaceFormat:
    """Size in pixels (even), frame rate and length of every clip."""

    size: int = 64
    fps: float = 8.0
    seconds: float = 2.0

    @property
    def num_frames(self) -> int:
        return round(self.fps * self.seconds)


def draw_clip(clip: FaceClip, form: FaceFormat) -> tuple[bytes, dict[str, str]]:
    """The mp4 file of a clip, and the contents of its text files by folder."""
    frames = render(clip.attributes, clip.identity, form.size, form.num_frames, form.fps, clip.seed)
    file = io.BytesIO()
    encode_mp4(file, frames, form.fps, crf=CRF, preset=PRESET)
    captions = write_captions(clip.attributes, form.seconds, clip.clip_id)
    texts = {folder: "\n".join(lines) + "\n" for folder, lines in captions.items()}
    return file.getvalue(), texts


def write_dataset(
    out: str | os.PathLike[str],
    num_clips: int,
    size: int = 64,
    fps: float = 8.0,
    seconds: float = 2.0,
    seed: int = 0,
    fractions: Mapping[str, float] = FRACTIONS,
    workers: int = 2,
    clips_per_archive: int = 1000,
    progress: bool = True,
    split_seed: int | None = None,
) -> list[FaceClip]:
    """Write the whole data set into the folder `out` and return its plan.

    The same arguments give the same attributes, captions and archives, whatever `workers`. Archives
    get their name when whole; those that stand there from a stopped run are kept. Fewer than two
    `workers` draw in this process. split_seed: see `plan`. Raises ValueError for an impossible
    size, and when `out` holds a data set of other settings.
    """
    form = FaceFormat(size, fps, seconds)
    if size % 2 or not 16 <= size <= 512:
        raise ValueError(f"size {size}: an even number from 16 to 512 is needed")
    if num_clips < 1 or form.num_frames < 1 or clips_per_archive < 1:
        raise ValueError("clips, frames and clips_per_archive must each be at least 1")
    split_seed = seed if split_seed is None else split_seed
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": FORMAT, "num_clips": num_clips, "size": size, "fps": fps, "seconds": seconds,
        "seed": seed, "split_seed": split_seed, "fractions": dict(fractions),
        "clips_per_archive": clips_per_archive,
    }  # fmt: skip
    _claim(out / "faces.json", settings)
    clips = plan(num_clips, seed, fractions, split_seed)
    archives = [clips[k : k + clips_per_archive] for k in range(0, num_clips, clips_per_archive)]
    names = [f"faces_{k:03d}.zip" for k in range(len(archives))]
    rows = [c.to_row(n) for n, part in zip(names, archives, strict=True) for c in part]
    _write_text(out / "attributes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    todo = [(out / n, p) for n, p in zip(names, archives, strict=True) if not (out / n).exists()]
    tasks = [(clip.clip_id, (clip, form)) for _, part in todo for clip in part]
    bar = tqdm(total=len(tasks), unit="clip", desc="faces", disable=not progress or not tasks)
    processes = workers if workers > 1 else 0
    with bar, WorkerPool(draw_clip, processes, ["dalle2_video.faces.writer"]) as pool:
        drawn = (future.result() for _, future in pool.map(tasks))
        for path, part in todo:
            _write_archive(path, part, drawn, bar)
    return clips


def _claim(path: Path, settings: dict) -> None:
    """Write the settings, or check that the folder belongs to a run of the same ones."""
    text = json.dumps(settings, indent=1) + "\n"
    if not path.exists():
        _write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} is of a data set with other settings: give an empty folder")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_archive(
    path: Path, clips: list[FaceClip], drawn: Iterator[tuple[bytes, dict[str, str]]], bar: tqdm
) -> None:
    """One zip, stored (mp4 does not shrink), under a temporary name until it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for clip in clips:
            video, texts = next(drawn)
            for folder, text in texts.items():
                archive.writestr(zipfile.ZipInfo(f"texts/{folder}/{clip.clip_id}.txt"), text)
            archive.writestr(zipfile.ZipInfo(f"videos/celebvtext_6/{clip.clip_id}.mp4"), video)
            bar.update()
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Command line; prints a summary of what stands in the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle2_video.faces.writer",
        description="Write rendered talking heads with captions in CelebV-Text's layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/faces", help="folder of the archives")
    parser.add_argument("--clips", type=int, default=4000, help="number of clips")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, even, 16 to 512")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip")
    parser.add_argument("--frames", type=int, help="frames of a clip, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split-seed", type=int, help="data.split_seed, where it is not --seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--clips-per-archive", type=int, default=1000)
    given = parser.parse_args(arguments)
    seconds = given.seconds if given.frames is None else given.frames / given.fps
    try:
        clips = write_dataset(
            given.out, given.clips, given.size, given.fps, seconds, given.seed,
            workers=given.workers, clips_per_archive=given.clips_per_archive,
            split_seed=given.split_seed,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    splits = Counter(clip.split for clip in clips)
    people = len({clip.identity for clip in clips})
    parts = ", ".join(f"{name} {splits[name]}" for name in FRACTIONS)
    print(f"{given.out}: {len(clips)} clips of {people} people ({parts})")


if __name__ == "__main__":
    main()
