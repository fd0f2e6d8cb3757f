"""The pages hold: links and paths lead somewhere, commands resolve, lines are short."""

import argparse
import functools
import importlib
import importlib.util
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import demo
from dalle2_video.cli import check_names, compose, quote_texts
from dalle2_video.stages.config_tree import settings_of
from tests.helpers.documents import LINK, PAGES, commands_of, lines_of, paths_of, prose_of, tree
from tests.helpers.launching import ROOT

# Their commands and names are those of the commit that a figure is of; each page says so.
OF_THEIR_TIME = ("log", "results", "benchmarks", "learned_variance")
TYPED_THEN = ("Commands stand as they were typed at their commit", "stand as they were at their")
HYDRA = ("preprocess", "train_clip", "train_prior", "train_decoder", "sample", "evaluate")
FILES = tree()
HOSTS = ("celebv-text.github.io", "keepachangelog.com", "wandb.example", "mlflow.example")
HOSTS = (*HOSTS, "127.0.0.1")
WIDTH = 120


def now(page: str) -> bool:
    return Path(page).stem not in OF_THEIR_TIME


@pytest.mark.parametrize("page", [page for page in PAGES if not now(page)])
def test_a_page_whose_commands_are_old_says_so(page) -> None:
    text = " ".join((ROOT / page).read_text("utf-8").split())
    assert any(phrase in text for phrase in TYPED_THEN), page


# ---- links and paths


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page) -> None:
    missing = []
    for place, text in prose_of(page):
        for target in LINK.findall(text):
            path = (ROOT / page).parent / target.partition("#")[0]
            if "://" not in target and not path.exists():
                missing.append(f"{place}: {target}")
    assert not missing


@functools.cache
def written_by_the_code() -> str:
    """Sources, which name the files that commands write (manifest.json, sheet.png, ...)."""
    code = [path for path in FILES if path.suffix == ".py" and "tests" not in path.parts]
    return "\n".join(path.read_text("utf-8") for path in code)


def exists(path: str) -> bool:
    """A path from the top or from dalle2_video/, or the end of a file's path; else a file that the
    code writes, by its name.
    """
    if any(list(base.glob(path)) for base in (ROOT, ROOT / "dalle2_video")):
        return True
    tops = {one.relative_to(ROOT).parts[0] for one in FILES}
    if path.split("/")[0] in tops - {"data", "logs", "runs"} and "/" in path.rstrip("/"):
        return False
    if any(one.as_posix().endswith(f"/{path}") for one in FILES):
        return True
    name = path.rstrip("/").split("/")[-1]
    return not path.endswith(".py") and name in written_by_the_code()


@pytest.mark.parametrize("page", [page for page in PAGES if Path(page).stem != "log"])
def test_paths_exist(page) -> None:
    assert not [f"{place}: {path}" for place, path in paths_of(page) if not exists(path)]


# ---- commands


def commands() -> dict[tuple[str, ...], list[str]]:
    """Words of a command -> where it stands."""
    found = defaultdict(list)
    for page in PAGES:
        for place, words in commands_of(page) if now(page) else ():
            found[words].append(place)
    return dict(found)


COMMANDS = commands()


def test_commands_are_found() -> None:
    programs = {Path(words[1]).stem for words in COMMANDS}
    assert {*HYDRA, "demo", "launch"} <= programs
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_resolves(words, monkeypatch) -> None:
    refused = None
    try:
        resolve(words, monkeypatch)
    except (Exception, SystemExit) as error:
        refused = error
    assert refused is None, f"{', '.join(COMMANDS[words])}: {' '.join(words)}\n{refused!r}"


def resolve(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises where one of our commands would stop before its work begins."""
    program, *rest = words
    if program == "make":
        make(rest)
    elif program == "accelerate":
        launch(rest, monkeypatch)
    elif rest[0] == "-m":
        module(rest[1], rest[2:], monkeypatch)
    elif Path(rest[0]).stem in HYDRA:
        assert (ROOT / rest[0]).is_file(), f"{rest[0]}: no such script"
        configured(rest[1:])
    elif rest[0] == "demo.py":
        configured(demo.parse(rest[1:]).overrides)
    else:
        assert (ROOT / rest[0]).is_file(), f"{rest[0]}: no such script"
        parsed(rest[0].removesuffix(".py").replace("/", "."), rest[1:], monkeypatch)


def make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^{name}:"
        assert re.search(pattern, text, re.M), f"the Makefile has no {name}"


def launch(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Accelerate's own parser, with its file; `accelerate config` asks questions."""
    from accelerate.commands.launch import launch_command_parser

    if arguments[0] == "config":
        return
    assert arguments[0] == "launch"
    given = launch_command_parser().parse_args(arguments[1:])
    assert given.config_file is None or (ROOT / given.config_file).is_file()
    resolve(("python", given.training_script, *given.training_script_args), monkeypatch)


def module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "pytest":
        for argument in arguments:
            assert not argument.endswith(".py") or (ROOT / argument).is_file(), argument
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin, f"{name}: no such module"
    if "ArgumentParser" in Path(spec.origin).read_text("utf-8"):
        parsed(name, arguments, monkeypatch)
    else:
        assert not arguments, f"{name} takes no arguments"


class ParsedError(Exception):
    """The arguments were taken; what follows is the work itself."""


def parsed(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's `main` up to its parsed arguments, and the configuration they name."""

    def stop(parse):
        def stopped(*given, **options):
            raise ParsedError(parse(*given, **options))

        return stopped

    main = importlib.import_module(name).main
    parser = argparse.ArgumentParser
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(parser, "parse_args", stop(parser.parse_args))
        patch.setattr(parser, "parse_intermixed_args", stop(parser.parse_intermixed_args))
        with pytest.raises(ParsedError) as taken:
            main()
    configured(getattr(taken.value.args[0], "overrides", []))


def configured(arguments: list[str]) -> None:
    """Each job of a command line of Hydra, composed and checked as its script does."""
    arguments = [a for a in arguments if a not in ("--help", "--cfg", "job")]
    several = "-m" in arguments
    overrides = tuple(quote_texts(check_names([a for a in arguments if a != "-m"])))
    for job in jobs(overrides) if several else [overrides]:
        compose_and_check(tuple(job))


def jobs(overrides: tuple[str, ...]) -> list[list[str]]:
    typed = OverridesParser.create().parse_overrides(list(overrides))
    (batch,) = BasicSweeper.split_arguments(typed, max_batch_size=None)
    return [list(job) for job in batch]


@functools.cache
def compose_and_check(overrides: tuple[str, ...]) -> None:
    settings_of(compose(*overrides))


# ---- lines and names


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page) -> None:
    long = [one.place for one in lines_of(page) if len(one.text) > WIDTH and not one.is_table]
    assert not long, f"above {WIDTH} columns: {', '.join(long)}"


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 160


def test_no_reference_to_a_page_that_is_not_here() -> None:
    """Pages in capitals, such as README.md, and the folder that some checkouts have beside it."""
    missing = []
    for path in FILES:
        text = path.read_text("utf-8", errors="ignore")
        names = set(re.findall(r"\b[A-Z]{3,}\.md\b", text))
        missing += [f"{path}: {name}" for name in names if not (ROOT / name).exists()]
        missing += [f"{path}: a folder"] * bool(re.search(r"(?<![\w/])shared" + r"/\w", text))
    assert not missing


def test_every_address_is_one_that_we_mean() -> None:
    """No package registry's host, no machine of ours."""
    found = set()
    for path in FILES:
        text = path.read_text("utf-8", errors="ignore")
        found |= {(path.name, host) for host in re.findall(r"https?://([\w.-]*\w)", text)}
    assert {host for _, host in found} <= {*HOSTS}, found
