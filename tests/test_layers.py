"""The layers of the package: who may import whom."""

import ast
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT

PACKAGE = ROOT / "dalle2_video"
# From the bottom up: each may import those above it in this list, data/ models/ diffusion/ none
# of each other.
BASE = {"config", "keyed", "model_file", "provenance"}
MAY: dict[str, set[str]] = {name: set() for name in BASE}
MAY |= {name: {*BASE} for name in ("data", "models", "diffusion")}
MAY["faces"] = {*BASE, "data"}
MAY["pipeline"] = {*BASE, "data", "models", "diffusion"}
MAY["evaluation"] = {*MAY["pipeline"], "faces", "pipeline"}
MAY["training"] = {*MAY["evaluation"], "evaluation"}
MAY["stages"] = {*MAY["training"], "training"}
MAY["cli"] = {*MAY["stages"], "stages"}


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


def test_entry_scripts_only_wire() -> None:
    scripts = ["preprocess", "train_clip", "train_prior", "train_decoder", "sample", "evaluate"]
    for name in scripts:
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 80


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
