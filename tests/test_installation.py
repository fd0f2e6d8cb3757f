import subprocess
import sys
from pathlib import Path

import pytest

from dalle2_video.errors import UserError
from dalle2_video.installation import check_pair
from tests.helpers.launching import ROOT


def install(
    folder: Path, name: str, version: str, requires: str = "", build: str | None = None
) -> None:
    """A package as pip leaves it: its metadata, and version.py where `build` names a version."""
    metadata = folder / f"{name}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        f"Requires-Dist: numpy\nRequires-Dist: {requires or 'filelock'}\n"
    )
    if build is not None:
        (folder / name).mkdir()
        (folder / name / "version.py").write_text(f"import x\n__version__ = '{build}'\ncuda = 1\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_installed_pair_works_together():
    check_pair()


# The first two were tried: `import torchvision` says "operator torchvision::nms does not exist".
BROKEN = {
    "cpu torch": (
        ("2.13.0+cpu", "2.13.0+cpu"),
        ("0.28.0", "torch (==2.13.0)", "0.28.0+cu130"),
        "torch is a CPU-only build, torchvision one for CUDA",
        '"torch==2.13.*" "torchvision==0.28.*"',
    ),
    "older torchvision": (
        ("2.14.1", "2.14.1+cu130"),
        ("0.28.0", "torch (==2.13.0)", "0.28.0+cu130"),
        "this torchvision needs torch==2.13.0",
        '"torch==2.14.*" "torchvision==0.29.*"',
    ),
    "cpu torch without version.py": (
        ("2.14.1+cpu", None),
        ("0.29.1", "torch (>=2.14.0)", "0.29.1+cu130"),
        "torch is a CPU-only build, torchvision one for CUDA",
        '"torch==2.14.*" "torchvision==0.29.*"',
    ),
    "older torch": (
        ("2.13.0", "2.13.0+cu130"),
        ("0.29.1", "torch>=2.14.0", "0.29.1+cu130"),
        "this torchvision needs torch>=2.14.0",
        '"torch==2.13.*" "torchvision==0.28.*"',
    ),
    "two CUDAs": (  # torchvision/extension.py raises for it
        ("2.9.1+cu126", "2.9.1+cu126"),
        ("0.24.1+cu130", "torch==2.9.1", "0.24.1+cu130"),
        "torch is built for CUDA 12, torchvision for CUDA 13",
        '"torch==2.9.*" "torchvision==0.24.*"',
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_pair_that_fails_at_import_is_refused(packages, case):
    (torch, build), (torchvision, requires, build_vision), cause, remedy = BROKEN[case]
    install(packages, "torch", torch, build=build)
    install(packages, "torchvision", torchvision, requires, build_vision)
    with pytest.raises(UserError) as caught:
        check_pair()
    line = str(caught.value)
    assert cause in line and f"`pip install {remedy}`" in line and "\n" not in line


FINE = {
    "the same build": (("2.14.1+cpu", "2.14.1+cpu"), ("0.29.1+cpu", "torch>=2.14", "0.29.1+cpu")),
    "another patch": (("2.14.1", "2.14.1+cu130"), ("0.29.0", "torch (==2.14.0)", "0.29.0+cu130")),
    "a later torch that torchvision admits": (("2.31.0", None), ("0.29.1", "torch>=2.14", None)),
    "a later major version": (("3.1.0", None), ("1.2.0", "torch==3.1.0", None)),
    "minor versions of CUDA": (("2.9.1", "2.9.1+cu128"), ("0.24.1", "torch==2.9.1", "0.24+cu126")),
    # its CPU operators are there; those for CUDA are lacking, and nothing here calls them
    "cpu torchvision": (("2.9.1", "2.9.1+cu128"), ("0.24.1", "torch==2.9.1", "0.24.1+cpu")),
    "built from source": (("2.15.0a0+git5c48", None), ("0.30.0a0+fc73", "torch", None)),
    "no tags at all": (("2.9.1", "2.9.1+cpu"), ("0.24.1", "torch==2.9.1", "0.24.1")),
}


@pytest.mark.parametrize("case", FINE)
def test_what_is_not_known_to_fail_is_let_pass(packages, case):
    (torch, build), (torchvision, requires, build_vision) = FINE[case]
    install(packages, "torch", torch, build=build)
    install(packages, "torchvision", torchvision, requires, build_vision)
    check_pair()


def test_a_missing_package_is_left_to_the_import(packages):
    check_pair()


def test_neither_package_is_imported():
    code = (
        "import sys; from dalle2_video.installation import check_pair; check_pair(); "
        "assert not {'torch', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
