"""The layouts `folder` and `webdataset`: a text of the same name beside each video or image.

    folder        a.mp4, a.txt: any depth, any names; several lines are several captions
    webdataset    tar shards of key.mp4 + key.txt or key.json; the key ends at the first dot

A clip's id is its path without suffix, below the root; archives count as folders.
"""

from __future__ import annotations

from dalle2_video.data.sources.listing import File, Listing
from dalle2_video.data.sources.source import Clips
from dalle2_video.data.sources.suffixes import IMAGE_SUFFIXES, TEXT_SUFFIXES, VIDEO_SUFFIXES

CATEGORY = "text"
JSON = "json"  # a text whose keys are categories


def pair_clips(listing: Listing, first_dot: bool, columns: tuple[str, ...] | None) -> Clips:
    """Clips with the texts of the same name. A text without a video, and an image beside a video,
    are listed as problems.
    """
    clips = Clips(listing.root.resolve().name, listing.problems, columns=columns)
    videos: set[str] = set()
    texts: list[tuple[str, str, File]] = []
    images: list[tuple[str, File]] = []
    for file in listing.files:
        clip, suffix = split_suffix(file.path, first_dot)
        if suffix.endswith(VIDEO_SUFFIXES):
            videos.add(clip)
            clips.add(file.container, clip, file.member)
        elif suffix.endswith(IMAGE_SUFFIXES):
            images.append((clip, file))
        elif suffix.endswith(TEXT_SUFFIXES):
            texts.append((clip, CATEGORY if suffix.endswith(".txt") else JSON, file))
        else:
            listing.ignored[suffix] += 1
    for clip, file in images:
        if clip in videos:
            clips.leave_out(file.member, "an image beside the video of the same name")
        else:
            clips.add(file.container, clip, file.member)
    ids = {clip for some in clips.videos.values() for clip in some}
    for clip, category, file in texts:
        # a.mp4.txt is as good as a.txt
        stem, suffix = split_suffix(clip, first_dot)
        is_media = suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES
        name = stem if clip not in ids and is_media else clip
        if name not in ids:
            clips.leave_out(file.member, "a text without a video or image of the same name")
        elif category == JSON and CATEGORY in clips.texts.get(name, {}):
            listing.ignored[".json"] += 1  # the same caption again, and notes of a downloader
        elif first := clips.texts.get(name, {}).get(category):
            clips.leave_out(file.member, f"a second text: {first[0].name} is used")
        else:
            found = clips.texts.setdefault(name, {})
            found[category] = [file.member]
            if category == CATEGORY and found.pop(JSON, None):
                listing.ignored[".json"] += 1
    clips.groups = {clip: clip for clip in ids}
    return clips


def split_suffix(path: str, first_dot: bool = False) -> tuple[str, str]:
    """(path without suffix, lower-case suffix with its dot): at the last dot or the first one."""
    folder, slash, name = path.rpartition("/")
    if first_dot:
        stem, dot, suffix = name.partition(".")
    else:
        stem, dot, suffix = name.rpartition(".")
        stem, dot, suffix = (stem, dot, suffix) if dot else (suffix, "", "")
    return folder + slash + stem, (dot + suffix).lower()
