"""The layout of CelebV-Text: videos named by clip ids, and a folder of texts per category.

What counts is the end of a path: a video is <clip id>.mp4 in any folder, a text is <clip id>.txt in
a folder named for a category, whose names have several spellings. Texts may lie in the same archive
as the videos, in another one, or in a folder beside.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from dalle2_video.data.config import CATEGORIES
from dalle2_video.data.sources.listing import File, Listing
from dalle2_video.data.sources.member import Problem
from dalle2_video.data.sources.source import Clips
from dalle2_video.data.sources.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES

CLIP_NAME = re.compile(r".{11}(_\d+){1,2}")
CATEGORY_OF = {
    **{name: name for name in CATEGORIES},
    "face40_details_new": "face40_details",
    "light_colot_temp": "light_color_temp",
}


def celebvtext_clips(listing: Listing) -> Clips:
    """Clips by their ids. Videos whose names are no clip names, second copies and unknown text
    folders are listed as problems.
    """
    root = listing.root
    clips = Clips(root.resolve().name, listing.problems, CATEGORIES)
    unknown: set[tuple[str, str]] = set()
    images = []
    names: set[str] = set()
    for file in listing.files:
        path = PurePosixPath(_inner(file))
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES:
            if not CLIP_NAME.fullmatch(path.stem):
                clips.leave_out(file.member, "its name is no clip name, {11-character id}_{n}_{m}")
            elif suffix in IMAGE_SUFFIXES:
                images.append((file, path.stem))
            else:
                names.add(path.stem)
                clips.add(_shard(file), path.stem, file.member)
        elif suffix == ".txt" and CLIP_NAME.fullmatch(path.stem):
            category = category_of(path)
            if category is not None:
                found = clips.texts.setdefault(path.stem, {})
                found.setdefault(category, []).append(file.member)
                continue
            archive = file.member.shown_archive
            if (archive, str(path.parent)) not in unknown:
                unknown.add((archive, str(path.parent)))
                cause = f"texts of no known category ({', '.join(CATEGORY_OF)})"
                clips.problems.append(Problem(archive, str(path.parent), cause))
        else:
            listing.ignored[suffix] += 1
    for file, clip in images:
        if clip in names:
            clips.leave_out(file.member, "an image beside the video of the same name")
        else:
            clips.add(_shard(file), clip, file.member)
    return clips


def category_of(path: PurePosixPath) -> str | None:
    """The category that a text's folders name, the innermost first."""
    names = [part.lower() for part in reversed(path.parts[:-1])]
    return next((CATEGORY_OF[name] for name in names if name in CATEGORY_OF), None)


def _inner(file: File) -> str:
    """A file's path inside its archive."""
    return file.path[len(file.container) :].lstrip("/")


def _shard(file: File) -> str:
    """An archive is a shard, and so is a folder."""
    return file.container or str(PurePosixPath(file.path).parent).removeprefix(".")
