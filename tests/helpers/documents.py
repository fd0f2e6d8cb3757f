"""The pages of the repository: their lines, links, paths and commands.

A command is a line of a code block, or a piece of inline code, whose first word starts one of our
scripts, modules or targets. Before it is resolved, "..." as a word of its own is dropped (more
arguments) and at the front is `python`; elsewhere "..." and <name> become x; a|b makes a command
of each; a shell variable becomes 1.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.helpers.launching import ROOT

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
STARTERS = ("python", ".venv/bin/python", "accelerate", "make", "...")
KINDS = "py|md|json|jsonl|ya?ml|txt|toml|env|cff|pt|h5|png|mp4|html|safetensors|db"
WRONG_ON_PURPOSE = "When something goes wrong"  # the section whose commands end in errors
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Line:
    """A line of a page; number: from 1. code: whether it lies in a code block. section: the heading
    above it.
    """

    page: str
    number: int
    text: str
    code: bool
    section: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.number}"

    @property
    def is_table(self) -> bool:
        return not self.code and self.text.startswith("|")


def lines_of(page: str) -> list[Line]:
    lines, code, section = [], False, ""
    for number, text in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1):
        if text.startswith("```"):
            code = not code
        else:
            section = text.strip("# ") if text.startswith("#") and not code else section
            lines.append(Line(page, number, text, code, section))
    return lines


def prose_of(page: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each paragraph and table row, so that what a line break cuts is whole."""
    place, parts = "", []
    for line in [*lines_of(page), Line(page, 0, "", False)]:
        if parts and (line.code or line.is_table or not line.text.strip()):
            yield place, " ".join(parts)
            parts = []
        if line.is_table:
            yield line.place, line.text
        elif line.text.strip() and not line.code:
            place = place if parts else line.place
            parts.append(line.text.strip())


def commands_of(page: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(place, words) of each command of a page, but for those that are WRONG_ON_PURPOSE."""
    wrong = {line.place for line in lines_of(page) if line.section == WRONG_ON_PURPOSE}
    for place, text in _typed(page):
        for words in _words(text) if place not in wrong else ():
            for one in product(*(_alternatives(word) for word in words)):
                yield place, tuple(one)


def _typed(page: str) -> Iterator[tuple[str, str]]:
    place, text = "", ""
    for line in lines_of(page):
        if not line.code:
            continue
        place = place if text else line.place
        text += line.text
        if text.endswith("\\"):
            text = text[:-1]
            continue
        yield place, text
        text = ""
    for place, text in prose_of(page):
        for code in INLINE.findall(text):
            yield place, code


def _words(text: str) -> Iterator[list[str]]:
    """The words of a line, and of a command that it hands to a shell; none where it is no command
    of ours.
    """
    text = re.sub(r"\\?\$(\(\(.*?\)\)|\w+)", "1", text)
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # not a command line
        return
    while words and (words[0] in ("nohup", "exec") or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
        words = words[1:]
    if words[:3] == ["srun", "bash", "-c"]:
        yield from _words(words[3])
        return
    for end in (">", "&", "&&"):
        words = words[: words.index(end)] if end in words else words
    if len(words) < 2 or words[0] not in STARTERS or words[1].startswith("<"):
        return
    if words[:2] == ["accelerate", "launch"] and not any(word.endswith(".py") for word in words):
        return  # named in a sentence
    first = "python" if words[0] == "..." else words[0]
    rest = [re.sub(r"<[^>]*>|\.\.\.", "x", word) for word in words[1:] if word != "..."]
    yield [first, *rest]


def _alternatives(word: str) -> list[str]:
    key, equals, value = word.partition("=")
    if " " in word or "|" not in word:
        return [word]
    return [f"{key}{equals}{one}" for one in value.split("|")] if equals else word.split("|")


def paths_of(page: str) -> Iterator[tuple[str, str]]:
    """(place, path) of each piece of inline code that is a file or a folder, braces expanded."""
    for place, text in prose_of(page):
        for code in INLINE.findall(text):
            if re.fullmatch(r"[\w.*{},/-]+", code) and re.search(rf"(?<!^)/$|\.({KINDS})$", code):
                for path in _expand(code):
                    yield place, path


def _expand(path: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    return [
        one
        for part in match[1].split(",")
        for one in _expand(path[: match.start()] + part + path[match.end() :])
    ]


def tree() -> list[Path]:
    """The text files of the repository, without what .gitignore leaves out at the top."""
    ignored = {
        ".git",
        *re.findall(r"^/?([\w.]+)/?$", (ROOT / ".gitignore").read_text("utf-8"), re.M),
    }
    tops = [path for path in ROOT.iterdir() if path.name not in ignored]
    inner = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*")))
    kinds = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".txt", ".cff", ".env", ""}
    return [p for p in inner if p.is_file() and p.suffix in kinds and "__pycache__" not in p.parts]
