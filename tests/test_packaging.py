"""What an installation brings: pins, lower bounds, the package's files and its public names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dalle2_video
from tests.helpers.launching import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def requirements(name: str) -> dict[str, Requirement]:
    """name of a package -> its line in a requirements file."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {canonicalize_name(one.name): one for one in found}


def pinned(requirement: Requirement) -> str:
    """The version of `name==version`, with nothing else."""
    (one,) = requirement.specifier
    assert one.operator == "==" and not one.version.endswith("*"), requirement
    assert not requirement.marker and not requirement.url, requirement
    return one.version


RUNTIME, DEV = requirements("requirements.txt"), requirements("requirements-dev.txt")
CONSTRAINTS = requirements("constraints.txt")


@pytest.mark.parametrize("name", [*RUNTIME, *DEV])
def test_a_pin_agrees_with_the_constraints(name):
    assert pinned((RUNTIME | DEV)[name]) == pinned(CONSTRAINTS[name])


def test_every_constraint_is_a_pin_of_another_package():
    assert all(pinned(one) for one in CONSTRAINTS.values())
    assert PROJECT["project"]["name"] not in CONSTRAINTS
    assert not RUNTIME.keys() & DEV.keys()


EXTRAS = PROJECT["project"]["optional-dependencies"]
DECLARED = {"base": PROJECT["project"]["dependencies"], **EXTRAS}


@pytest.mark.parametrize("extra", DECLARED)
def test_lower_bounds_admit_the_pins(extra):
    """`app` is not pinned: its page is not there yet."""
    pins = DEV if extra == "dev" else RUNTIME
    for line in DECLARED[extra]:
        wanted = Requirement(line)
        assert {one.operator for one in wanted.specifier} == {">="}, line
        if extra != "app":
            name = canonicalize_name(wanted.name)
            assert name in pins, f"{name} of {extra} has no pin"
            assert pinned(pins[name]) in wanted.specifier, line


def test_every_pin_belongs_to_the_base_or_to_an_extra():
    declared = {canonicalize_name(Requirement(x).name) for part in DECLARED.values() for x in part}
    assert (RUNTIME | DEV).keys() <= declared


def test_the_makefile_installs_what_is_pinned():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    files = "requirements.txt requirements-dev.txt constraints.txt"
    assert f"\nPINS := {files}\n" in makefile and "\n$(STAMP): $(PINS)\n" in makefile
    assert "-r requirements.txt -r requirements-dev.txt -c constraints.txt\n" in makefile


# ---- the package


def test_the_package_has_all_its_files_and_no_others():
    settings = PROJECT["tool"]["setuptools"]
    found = setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {
        ".".join(path.relative_to(ROOT).parts)
        for path in [ROOT / "dalle2_video", *(ROOT / "dalle2_video").rglob("*/")]
        if path.name != "__pycache__"
    }
    assert set(found) == folders
    files = [path for path in (ROOT / "dalle2_video").rglob("*") if path.is_file()]
    data = {str(p.relative_to(ROOT)) for p in files if p.suffix not in (".py", ".pyc")}
    declared = {f"dalle2_video/{name}" for name in settings["package-data"]["dalle2_video"]}
    assert data == declared


def test_the_version_stands_in_one_place():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "dalle2_video.__version__"
    }
    assert "version" not in PROJECT["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == dalle2_video.__version__


def isolated(code: str, folder: Path) -> str:
    """What a process prints that sees the package alone, and not the rest of the checkout."""
    (folder / "dalle2_video").symlink_to(ROOT / "dalle2_video")
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_importing_it_loads_no_heavy_package(tmp_path):
    heavy = "{'torch', 'torchvision', 'hydra', 'omegaconf', 'pydantic', 'numpy', 'av'}"
    code = f"import dalle2_video; dir(dalle2_video); print({heavy} & sys.modules.keys())"
    assert isolated(code, tmp_path) == "set()\n"


def test_every_public_name_is_there_without_what_training_needs(tmp_path):
    """Only the base: whatever `train`, `eval` and `dev` add cannot be imported here."""
    extras = [Requirement(x).name for name in ("train", "eval", "dev") for x in EXTRAS[name]]
    modules = sorted({"hydra", "mlflow", "submitit", *(e.replace("-", "_") for e in extras)})
    code = f"""
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
import dalle2_video
for name in dalle2_video.__all__:
    print(name, getattr(dalle2_video, name).__class__.__name__)
from dalle2_video import *
print(Unet3D.__module__)
"""
    printed = isolated(code, tmp_path).splitlines()
    assert printed[-1] == "dalle2_video.models.unet3d"
    assert dict(line.split() for line in printed[:-1]) == {
        name: "str" if name == "__version__" else "type" for name in dalle2_video.__all__
    }


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"dalle2_video.*Nothing"):
        dalle2_video.Nothing  # noqa: B018
    assert set(dalle2_video.__all__) <= set(dir(dalle2_video))


# ---- files for other tools


def test_the_workflow_runs_what_continuous_integration_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as true
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    steps = job["steps"]
    assert [step["uses"] for step in steps if "uses" in step] == [
        "actions/checkout@v4",
        "actions/setup-python@v5",
    ]
    python = next(step["with"] for step in steps if "setup-python" in step.get("uses", ""))
    assert python["python-version"] == "3.11" and python["cache"] == "pip"
    for name in python["cache-dependency-path"].split():
        assert (ROOT / name).is_file()
    assert steps[-1]["run"] == ".ci/run"
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_the_dockerfile_copies_files_that_are_there():
    """It was never built here; this reads it as far as its paths go."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split() for line in lines]
    assert words[0] == ["FROM", "python:3.12-slim"]
    copied = [w for line in words if line[0] == "COPY" for w in line[1:-1] if w[0] != "-"]
    assert {"requirements.txt", "constraints.txt"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    install = next(line for line in lines if "pip install" in line)
    assert "-r requirements.txt -c constraints.txt" in re.sub(r"\s+", " ", install)
    users = [line[1] for line in words if line[0] == "USER"]
    assert users and users[-1] != "root"


def test_the_citation_has_what_its_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
