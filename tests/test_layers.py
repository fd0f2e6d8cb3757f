"""The layers of the package: who may import whom."""

import ast
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT

PACKAGE = ROOT / "dalle2_video"
# From the bottom up: each may import those above it in this list, data/ models/ diffusion/ none
# of each other.
BASE = {"errors", "failures", "config", "keyed", "model_file", "provenance"}
MAY: dict[str, set[str]] = {name: {"errors"} for name in BASE}
MAY |= {name: {*BASE} for name in ("data", "models", "diffusion")}
MAY["faces"] = {*BASE, "data"}
MAY["pipeline"] = {*BASE, "data", "models", "diffusion"}
MAY["evaluation"] = {*MAY["pipeline"], "faces", "pipeline"}
MAY["training"] = {*MAY["evaluation"], "evaluation"}
MAY["stages"] = {*MAY["training"], "training"}
MAY["installation"] = {"errors"}
MAY["reference"] = {*MAY["stages"], "stages"}
MAY["cli"] = {*MAY["reference"], "reference", "failures", "installation"}


def imported(source: str) -> set[str]:
    """Parts of the package that a module's source imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide the layer"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("dalle2_video.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_layers(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    breach = imported(path.read_text()) - MAY[part] - {part}
    assert not breach, f"{path}: {part} must not import {', '.join(sorted(breach))}"


def test_a_breach_is_found() -> None:
    assert imported("def f():\n    from dalle2_video.models import unet3d") == {"models"}
    assert "models" not in MAY["data"]


SCRIPTS = ["preprocess", "train_clip", "train_prior", "train_decoder", "sample", "evaluate"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_entry_scripts_only_wire(name: str) -> None:
    """A script is a docstring, imports, constants and `main`: no logic of its own."""
    *body, last = ast.parse((ROOT / f"{name}.py").read_text()).body
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in defined] == ["main"]
    assert ast.unparse(defined[0].decorator_list[0]).startswith("script(")
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


def modules() -> dict[str, set[str]]:
    """Every module of the package -> those that it imports, also for type checking alone."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = targets & files.keys()
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A chain of modules that leads back to its first one; empty where there is none."""
    done: set[str] = set()

    def search(name: str, chain: list[str]) -> list[str]:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*chain, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := search(name, []):
            return found
    return []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert not circle(modules())
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


LONGEST_FILE, LONGEST_FUNCTION = 350, 70


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    lines = len(source.splitlines())
    assert lines <= LONGEST_FILE, f"{path} has {lines} lines: one concept per file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines"


def test_no_test_imports_from_another_test() -> None:
    """What tests share lies in tests/helpers/ and in conftest.py."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                assert parts[0] != "tests" or parts[1] == "helpers", f"{path}: {node.module}"


# Inside data/, from the bottom up: sources/ and media/ do not know each other.
INSIDE_DATA: dict[str, set[str]] = {"atomic": set(), "config": {"atomic"}}
INSIDE_DATA |= {name: {"atomic", "config"} for name in ("sources", "media")}
INSIDE_DATA["store"] = {"atomic", "config", "sources", "media"}
INSIDE_DATA["preprocess"] = {*INSIDE_DATA["store"], "store"}


@pytest.mark.parametrize("part", INSIDE_DATA)
def test_the_order_inside_data(part: str) -> None:
    folder = PACKAGE / "data" / part
    for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        source = path.read_text().replace("dalle2_video.data.", "dalle2_video.data_")
        found = {n.removeprefix("data_") for n in imported(source) if n.startswith("data_")}
        breach = found - INSIDE_DATA[part] - {part}
        assert not breach, f"{path}: data/{part} must not import {', '.join(sorted(breach))}"
