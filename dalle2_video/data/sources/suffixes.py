"""What a file is taken for, by the end of its name."""

import re

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".gif"),
    *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv", ".ogv", ".ogm", ".wmv", ".asf"),
    *(".3gp", ".3g2"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp")
TEXT_SUFFIXES = (".txt", ".json")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
ARCHIVE_SUFFIXES = (
    *(".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.lzma"),
)
# Archives that Python cannot read in place, and pieces of split ones.
UNREAD_ARCHIVES = re.compile(r"\.(7z|rar|zst|lz4|lz|lzma|gz|bz2|xz|cab|iso|dmg|z\d\d|\d{3})$", re.I)
UNREAD_MEDIA = re.compile(
    r"\.(rm|rmvb|mxf|m2v|m1v|h26[45]|26[45]|hevc|avc|ivf|obu|y4m|yuv|dv|bik|swf|"
    r"heic|heif|avif|jxl|bmp|tiff?|jp2|psd|svg|dng|cr2|nef|arw)$",
    re.I,
)
UNFINISHED = re.compile(r"\.(part|partial|crdownload|download|!ut|!qb|opdownload|aria2|tmp)$", re.I)


def archive_suffix(name: str) -> str:
    """The suffix of an archive's name, the longest one that fits, or ""."""
    fitting = [suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)]
    return max(fitting, key=len, default="")
