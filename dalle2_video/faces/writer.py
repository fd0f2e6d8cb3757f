"""The embedded data set: rendered talking heads with exact captions, in CelebV-Text's layout.

`python -m dalle2_video.faces.writer --out data/faces --clips 4000` writes

    faces_000.zip ...     texts/<category>/<clip>.txt and videos/celebvtext_6/<clip>.mp4 (H.264)
    attributes.jsonl      one line a clip: id, split, archive, identity, every attribute
    faces.json            the settings; the same command continues where it was stopped

Folders that were written when the split `heldout` was called `combo` are read as they are.
"""

import argparse
import dataclasses
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from dalle2_video.config import from_config
from dalle2_video.data.atomic import read_json, read_text, whole
from dalle2_video.data.media.encode import encode_mp4
from dalle2_video.data.preprocess.pool import WorkerPool
from dalle2_video.errors import UserError
from dalle2_video.faces.attributes import FaceAttributes
from dalle2_video.faces.captions import write_captions
from dalle2_video.faces.config import FaceFormat, FacesConfig
from dalle2_video.faces.plan import FRACTIONS, FaceClip, plan
from dalle2_video.faces.render import render
from dalle2_video.failures import one_line_errors

# Slower presets of x264 look ahead, and do not give the same bytes each time for small frames.
CRF, PRESET = 14, "ultrafast"
FORMAT = 1  # raise when the same settings give other clips, so that old archives are not continued


class FacesError(UserError, ValueError):
    """A folder or a file that is not of the embedded data set, or of other settings."""


def read_attributes(path: str | os.PathLike[str]) -> dict[str, FaceAttributes]:
    """attributes.jsonl -> attributes by clip id.

    Raises FacesError that names file and line, or that the data are others.
    """
    if not Path(path).exists():
        raise FacesError(
            f"{path}: no such file; only the embedded faces have one: take "
            "evaluate.metric=nearest or nll"
        )
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            found[row["clip"]] = FaceAttributes.from_dict(row)
        except (ValueError, KeyError, TypeError) as error:
            raise FacesError(f"{path}, line {number}: no attributes of a clip ({error})") from error
    return found


def check_faces(faces: FacesConfig) -> None:
    """FacesError where the folder holds a data set with other settings than these."""
    path = Path(faces.root) / "faces.json"
    if not path.exists():
        return
    written = read_json(path) | {"root": faces.root}
    written["clips"] = written.pop("num_clips")
    found = [
        f"{key}: {written[key]} there, {value} here"
        for key, value in dataclasses.asdict(faces).items()
        if written[key] != value
    ]
    if found:
        raise FacesError(
            f"{path}: other settings ({'; '.join(found)}); take those, or an empty faces.root"
        )


def draw_clip(clip: FaceClip, form: FaceFormat) -> tuple[bytes, dict[str, str]]:
    """The mp4 file of a clip, and the contents of its text files by folder."""
    frames = render(clip.attributes, clip.identity, form.size, form.num_frames, form.fps, clip.seed)
    file = io.BytesIO()
    encode_mp4(file, frames, form.fps, crf=CRF, preset=PRESET)
    captions = write_captions(clip.attributes, form.seconds, clip.clip_id)
    texts = {folder: "\n".join(lines) + "\n" for folder, lines in captions.items()}
    return file.getvalue(), texts


def write_dataset(
    faces: FacesConfig,
    fractions: Mapping[str, float] = FRACTIONS,
    split_seed: int | None = None,
    workers: int = 2,
    clips_per_archive: int = 1000,
    progress: bool = True,
) -> list[FaceClip]:
    """Write the whole data set into the folder `faces.root` and return its plan.

    fractions, split_seed: see `plan`. The same arguments give the same attributes, captions and
    archives, whatever `workers`. Archives get their name when whole; those that stand there from a
    stopped run are kept. Fewer than two `workers` draw in this process. Raises FacesError when the
    folder holds a data set of other settings.
    """
    if clips_per_archive < 1:
        raise FacesError(f"clips_per_archive {clips_per_archive}: must be at least 1")
    split_seed = faces.seed if split_seed is None else split_seed
    clips = plan(faces.clips, faces.seed, fractions, split_seed)
    settings = {
        "format": FORMAT, "num_clips": faces.clips, "size": faces.size, "fps": faces.fps,
        "seconds": faces.seconds, "seed": faces.seed, "split_seed": split_seed,
        "fractions": dict(fractions), "clips_per_archive": clips_per_archive,
    }  # fmt: skip
    archives = {
        f"faces_{k:03d}.zip": clips[start : start + clips_per_archive]
        for k, start in enumerate(range(0, faces.clips, clips_per_archive))
    }
    rows = [clip.to_row(name) for name, part in archives.items() for clip in part]

    check_faces(faces)
    out = Path(faces.root)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        out / "faces.json": json.dumps(settings, indent=1) + "\n",
        out / "attributes.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    for path, text in texts.items():
        if _holds(path, text):
            continue
        if path.name == "faces.json" and path.exists():
            raise FacesError(f"{path}: other settings (splits or archives); take an empty folder")
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    todo = {out / name: part for name, part in archives.items() if not (out / name).exists()}
    _write_archives(todo, faces.format, workers, progress)
    return clips


def _holds(path: Path, text: str) -> bool:
    """Whether the file holds the text; a split `combo` of older files is `heldout`."""
    return path.exists() and path.read_bytes().replace(b'"combo"', b'"heldout"') == text.encode()


def _write_archives(
    todo: Mapping[Path, list[FaceClip]], form: FaceFormat, workers: int, progress: bool
) -> None:
    """The archives that are missing, their clips drawn by worker processes."""
    tasks = [(clip.clip_id, (clip, form)) for part in todo.values() for clip in part]
    bar = tqdm(total=len(tasks), unit="clip", desc="faces", disable=not progress or not tasks)
    processes = workers if workers > 1 else 0
    with bar, WorkerPool(draw_clip, processes, ["dalle2_video.faces.writer"]) as pool:
        drawn = (future.result() for _, future in pool.map(tasks))
        for path, part in todo.items():
            _write_archive(path, part, drawn, bar)


def _write_archive(
    path: Path, clips: list[FaceClip], drawn: Iterator[tuple[bytes, dict[str, str]]], bar: tqdm
) -> None:
    """One zip, stored (mp4 does not shrink); it has its name once it is whole."""
    with whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for clip in clips:
            video, texts = next(drawn)
            for folder, text in texts.items():
                archive.writestr(zipfile.ZipInfo(f"texts/{folder}/{clip.clip_id}.txt"), text)
            archive.writestr(zipfile.ZipInfo(f"videos/celebvtext_6/{clip.clip_id}.mp4"), video)
            bar.update()


def main(arguments: list[str] | None = None) -> None:
    """Command line; prints how many clips of how many people the folder holds."""
    usual = FacesConfig()
    parser = argparse.ArgumentParser(
        prog="python -m dalle2_video.faces.writer",
        description="Write rendered talking heads with captions in CelebV-Text's layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default=usual.root, help="folder of the archives")
    parser.add_argument("--clips", type=int, default=usual.clips, help="number of clips")
    parser.add_argument("--size", type=int, default=usual.size, help="side in pixels, even, 16-512")
    parser.add_argument("--fps", type=float, default=usual.fps, help="frames per second")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="length of a clip")
    parser.add_argument("--frames", type=int, help="frames of a clip, instead of --seconds")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--split-seed", type=int, help="data.split_seed, where it is not --seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--clips-per-archive", type=int, default=1000)
    given = parser.parse_args(arguments)
    seconds = given.seconds if given.frames is None else given.frames / given.fps
    section = {
        "root": given.out, "clips": given.clips, "size": given.size, "fps": given.fps,
        "seconds": seconds, "seed": given.seed,
    }  # fmt: skip
    try:
        faces = from_config(FacesConfig, section, "faces")
        clips = write_dataset(
            faces,
            split_seed=given.split_seed,
            workers=given.workers,
            clips_per_archive=given.clips_per_archive,
        )
    except ValueError as error:
        parser.error(str(error))
    splits = Counter(clip.split for clip in clips)
    people = len({clip.identity for clip in clips})
    parts = ", ".join(f"{name} {splits[name]}" for name in FRACTIONS)
    print(f"{given.out}: {len(clips)} clips of {people} people ({parts})")


if __name__ == "__main__":
    with one_line_errors():
        main()
