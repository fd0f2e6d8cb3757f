"""texts/<shard>.pt: the lines of a shard's clips, words and tokens, as flat tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dalle2_video.data.atomic import whole
from dalle2_video.data.config import CATEGORIES
from dalle2_video.data.sources.captions import Line, in_order
from dalle2_video.data.store.shard import StoreError

FORMAT = 2
MOST_CATEGORIES = 127  # a line's category is an int8


def write_texts(path: Path, texts: Sequence[Mapping[str, Sequence[Line]]]) -> None:
    """texts/<shard>.pt: for each clip of the shard its lines by category.

    Plain tensors, which a reader maps instead of holding them: tokens int32 (all ids, end
    to end), token_end int64 (lines,), category int8 (lines,), line_end int64 (rows,), text uint8
    (UTF-8, end to end), text_end int64 (lines,).
    """
    found = {name for by_category in texts for name in by_category}
    names = [sys.intern(name) for name in sorted({*CATEGORIES, *found}, key=in_order)]
    if len(names) > MOST_CATEGORIES:
        raise StoreError(
            f"{len(names)} categories of captions, at most {MOST_CATEGORIES} are possible: choose "
            "some by data.caption_columns"
        )
    lines: list[Line] = []
    category: list[int] = []
    line_end: list[int] = []
    for by_category in texts:
        for number, name in enumerate(names):
            lines += by_category.get(name, ())
            category += [number] * len(by_category.get(name, ()))
        line_end.append(len(lines))
    flat = [token for line in lines for token in line.tokens]
    words = [line.text.encode() for line in lines]
    content = {
        "format": FORMAT,
        "categories": names,
        "tokens": torch.tensor(flat, dtype=torch.int32),
        "token_end": _ends([line.tokens for line in lines]),
        "category": torch.tensor(category, dtype=torch.int8),
        "line_end": torch.tensor(line_end, dtype=torch.int64),
        "text": torch.frombuffer(bytearray(b"".join(words)) or bytearray(1), dtype=torch.uint8),
        "text_end": _ends(words),
    }
    with whole(path) as partial:
        torch.save(content, partial)


def _ends(parts: Sequence[Sequence]) -> torch.Tensor:
    return torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0)


class ShardTexts:
    """One texts/<shard>.pt, mapped: what is not read takes no memory, and processes share it."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, weights_only=True, mmap=True)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this code reads {FORMAT}")
            self.tokens = content["tokens"].numpy()
            self.token_end = content["token_end"].numpy()
            self.category = content["category"].numpy()
            self.line_end = content["line_end"].numpy()
            self.text = content["text"].numpy()
            self.text_end = content["text_end"].numpy()
            self.names: list[str] = content["categories"]
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing: run preprocess again") from error
        except Exception as error:
            raise StoreError(f"{path} is damaged ({error}): delete it, run preprocess") from error

    def used(self) -> list[str]:
        """The categories that have a line."""
        return [self.names[number] for number in sorted(set(self.category.tolist()))]

    def lines(self, row: int) -> dict[str, list[Line]]:
        """The lines of one row by category."""
        found: dict[str, list[Line]] = {}
        for i in range(self.line_end[row - 1] if row else 0, self.line_end[row]):
            first_token = self.token_end[i - 1] if i else 0
            first_byte = self.text_end[i - 1] if i else 0
            line = Line(
                self.text[first_byte : self.text_end[i]].tobytes().decode(),
                tuple(self.tokens[first_token : self.token_end[i]].tolist()),
            )
            found.setdefault(self.names[self.category[i]], []).append(line)
        return found
