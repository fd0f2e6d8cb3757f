"""Captions: files of CelebV-Text or a free text -> a set of lines -> tokens. One text function.

A text is a SET of lines of at most 77 tokens each (start and end token included). Category files
give one line per line of the file; a free text is split at its sentences. A line that is too long
is split into several, at sentences, then commas, then words, so that all of it reaches the model:
nothing is ever truncated. Tokens are those of CLIP (open_clip's SimpleTokenizer).

Letters: B sets of lines, L lines of a set, U unique lines of a batch, T tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.config import CATEGORIES, CaptionPolicy
from dalle2_video.errors import UserError

CONTEXT = 77
START, END, PAD = 49406, 49407, 0
CUT = 0.1  # probability of a new line between two lines that are joined
ROOM = CONTEXT - 2  # tokens of a line without its start and end


class CaptionError(UserError, ValueError):
    """A text that cannot be used; the message is the cause."""


@dataclass(frozen=True)
class Line:
    """One line: its text, and its token ids with start and end token, 3 to 77 of them."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PackedLines:
    """Sets of lines as tensors: what a text tower reads.

    tokens int64 (U, T), the unique lines, padded with 0 to the longest; line_index int64 (B, L),
    the lines of each set as rows of `tokens`, -1 = no line; texts, the same sets in words.
    """

    tokens: Tensor
    line_index: Tensor
    texts: list[list[str]]


# ---------------------------------------------------------------- text -> lines


def read_text(data: bytes) -> list[str]:
    """The non-empty lines of a text file's bytes: UTF-8, a byte order mark is tolerated.

    Raises CaptionError("empty") or CaptionError("not UTF-8: byte 0xE9 at 12").
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        value = data[error.start]
        raise CaptionError(f"not UTF-8: byte 0x{value:02X} at {error.start}") from error
    lines = [line for line in map(clean, text.splitlines()) if encode(line)]
    if not lines:
        raise CaptionError("empty")
    return [_phases_in_words(line) for line in lines]


_PHASE = re.compile(
    r"([a-z][a-z ]*?)[ ,:]+(\d+(?:\.\d+)?)(?: to |[ ,~-]+)(\d+(?:\.\d+)?)\s*s?\s*(?:[,;]\s*|$)",
    re.IGNORECASE,
)


def _phases_in_words(line: str) -> str:
    """ "neutral 0 3.5, happy 3.5 7" -> "neutral from 0 to 3.5 seconds, then happy from ...".

    The first line of an emotion file can list phases with begin and end; other lines stay.
    """
    phases, place = [], 0
    while place < len(line):
        match = _PHASE.match(line, place)
        if match is None:
            return line
        phases.append("{} from {} to {} seconds".format(*match.groups()))
        place = match.end()
    return ", then ".join(phases)


def text_to_lines(text: str | Sequence[str]) -> list[str]:
    """A free text, or several, -> lines of at most 77 tokens: its sentences, in their order.

    A sentence that is too long is split at commas, then words. Empty text is a CaptionError.
    """
    texts = [text] if isinstance(text, str) else list(text)
    lines: list[str] = []
    for part in texts:
        for row in part.splitlines():
            for sentence in _SENTENCE_END.split(clean(row)):
                lines += split_line(sentence)
    if not lines:
        raise CaptionError("the text is empty")
    return lines


# A full stop that ends a sentence: not after an initial or a common abbreviation.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Za-z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r"(?<!\bvs\.)(?<!\bca\.)(?<!\betc\.)(?<!\bapprox\.)\s+"
)
_BREAKS = (_SENTENCE_END, re.compile(r"(?<=[,;:])\s+"), re.compile(r"\s+"))


def split_line(text: str) -> list[str]:
    """Pieces of at most 77 tokens each that hold all of `text`; one piece where it fits."""
    text = clean(text)
    length = len(encode(text))
    if length <= ROOM:
        return [text] if length else []
    for breaks in _BREAKS:
        parts = breaks.split(text)
        if len(parts) > 1:
            return [piece for group in _groups(parts) for piece in split_line(group)]
    # One word of more than 75 tokens: cut it in half until it fits.
    half = len(text) // 2
    return split_line(text[:half]) + split_line(text[half:])


def _groups(parts: list[str]) -> Iterable[str]:
    """Neighbouring parts put together again as far as they fit into one line."""
    group, size = "", 0
    for part in parts:
        length = len(encode(part))
        if group and size + length > ROOM:
            yield group
            group, size = "", 0
        group, size = f"{group} {part}".strip(), size + length
    yield group


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """CLIP's tokenizer. open_clip takes seconds to import, so only those who tokenize pay."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def clean(text: str) -> str:
    """What the tokenizer itself would do first: repair encodings, unescape HTML, single spaces.

    Invisible characters go, and a control token written out in a text is broken up, or it would end
    the line for the tower.
    """
    from open_clip.tokenizer import basic_clean, whitespace_clean

    text = re.sub(r"<(start|end)_of_text>", r"< \1_of_text >", basic_clean(text), flags=re.I)
    return whitespace_clean("".join(c for c in text if c.isprintable() or c.isspace()))


@lru_cache(maxsize=65536)
def encode(text: str) -> tuple[int, ...]:
    """Token ids without start and end; any length, nothing truncated."""
    return tuple(tokenizer().encode(text))


# ---------------------------------------------------------------- lines -> tokens


def to_line(text: str) -> Line:
    """One line with its tokens; CaptionError where it is empty or longer than 77 tokens."""
    tokens = encode(text)
    if not 1 <= len(tokens) <= ROOM:
        raise CaptionError(f"a line of {len(tokens) + 2} tokens, must be 3 to {CONTEXT}: {text!r}")
    return Line(text, (START, *tokens, END))


def pack_lines(sets: Sequence[Sequence[Line]]) -> PackedLines:
    """Sets of lines -> tensors; a line that occurs twice in the batch is stored once."""
    rows: dict[tuple[int, ...], int] = {}
    index = torch.full((len(sets), max(map(len, sets), default=0)), -1, dtype=torch.int64)
    for b, lines in enumerate(sets):
        if not lines:
            raise CaptionError(f"set {b} of the batch has no line")
        for i, line in enumerate(lines):
            index[b, i] = rows.setdefault(line.tokens, len(rows))
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), PAD, dtype=torch.int64)
    for ids, row in rows.items():
        tokens[row, : len(ids)] = torch.tensor(ids)
    return PackedLines(tokens, index, [[line.text for line in lines] for lines in sets])


def tokenize(texts: Sequence[str | Sequence[str]]) -> PackedLines:
    """Free texts (each a str, or a list of lines) -> tensors. Empty text is a CaptionError."""
    return pack_lines([[to_line(line) for line in text_to_lines(text)] for text in texts])


def join_lines(lines: Sequence[Line]) -> list[Line]:
    """Lines joined at token level into as few as fit in that order: start, a, comma, b, end.

    Closing punctuation of `a` gives way to the comma. Never over 77 tokens, nothing truncated.
    """
    comma = encode(",")
    joined: list[Line] = []
    for line in lines:
        if joined:
            words, ids = _open_end(joined[-1])
            tokens = (START, *ids, *comma, *line.tokens[1:])
            if ids and len(tokens) <= CONTEXT:
                joined[-1] = Line(f"{words}, {line.text}", tokens)
                continue
        joined.append(line)
    return joined


def _open_end(line: Line) -> tuple[str, tuple[int, ...]]:
    """Text and bare tokens of a line without the punctuation that closes it."""
    ids = line.tokens[1:-1]
    while ids and not tokenizer().decode([ids[-1]]).strip(" .,;:!?"):
        ids = ids[:-1]
    return line.text.rstrip(" .,;:!?"), ids


# ---------------------------------------------------------------- which lines a clip meets


@dataclass(frozen=True)
class TrainingCaptions:
    """The set of lines in training: drawn by its policy each time a clip is used, keyed by
    (seed, sample_id).
    """

    policy: CaptionPolicy

    def choose(
        self, lines: Mapping[str, Sequence[Line]], seed: int, sample_id: int, key: str
    ) -> list[Line]:
        """The set of one meeting; `lines` by category, at least one line."""
        policy = self.policy
        kept = _categories(lines, key)
        draw = random.Random(keyed.key(seed, sample_id, "caption"))
        if policy.presence is not None:
            present = [c for c in kept if draw.random() < policy.presence.get(c, 1.0)]
            kept = present or [draw.choice(kept)]
        if draw.random() >= policy.all_probability:
            kept = draw.sample(kept, draw.randint(1, len(kept)))
        if policy.order == "fixed":
            kept.sort(key=in_order)
        chosen = [draw.choice(lines[category]) for category in kept]
        if draw.random() >= policy.join_probability:
            return chosen
        if policy.order == "random":
            draw.shuffle(chosen)
        groups: list[list[Line]] = [[]]
        for line in chosen:
            if groups[-1] and draw.random() < CUT:
                groups.append([])
            groups[-1].append(line)
        return [line for group in groups for line in join_lines(group)]


@dataclass(frozen=True)
class EvaluationCaptions:
    """The set of lines in evaluation: one of every category, keyed by (seed, key of the clip)."""

    def choose(
        self, lines: Mapping[str, Sequence[Line]], seed: int, sample_id: int, key: str
    ) -> list[Line]:
        """The same set at every meeting; `lines` by category, at least one line."""
        draw = random.Random(keyed.key(seed, key, "caption"))
        return [draw.choice(lines[category]) for category in _categories(lines, key)]


def in_order(category: str) -> tuple[int, str]:
    """Sorts categories: those of CATEGORIES as they stand there, then others by name."""
    known = category in CATEGORIES
    return (CATEGORIES.index(category), "") if known else (len(CATEGORIES), category)


def _categories(lines: Mapping[str, Sequence[Line]], key: str) -> list[str]:
    """The categories that have a line, in order; CaptionError for none."""
    kept = sorted((category for category in lines if lines[category]), key=in_order)
    if not kept:
        raise CaptionError(f"clip {key} has no line")
    return kept
