"""Whether torch and torchvision belong together, before `import open_clip` fails for it.

Only what is known to fail is refused: a torch that torchvision's own metadata excludes, a CPU-only
torch beside a torchvision for CUDA, and builds for two major versions of CUDA. Packages from an
ordinary index carry no tag of their build in the metadata (torch 2.14.1 for CUDA 13 is "2.14.1"),
but their `version.py` does ("2.14.1+cu130"). Neither package is imported here.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from dalle2_video.errors import UserError


class InstallationError(UserError, RuntimeError):
    """Installed packages that do not work together."""


def check_pair() -> None:
    """InstallationError where torch and torchvision are known not to work together."""
    try:
        torch, torchvision = distribution("torch"), distribution("torchvision")
    except PackageNotFoundError:
        return  # the import names what is missing
    versions = _version(torch), _version(torchvision)
    build, build_vision = map(_build, versions)
    needed = _needed_torch(torchvision)
    if needed and not _admits(needed, torch.version):
        cause = f"this torchvision needs torch{needed}"
    elif build == "cpu" and build_vision.isdigit():
        cause = "torch is a CPU-only build, torchvision one for CUDA"
    elif build.isdigit() and build_vision.isdigit() and build != build_vision:
        cause = f"torch is built for CUDA {build}, torchvision for CUDA {build_vision}"
    else:
        return
    raise InstallationError(
        f"torch {versions[0]} and torchvision {versions[1]} do not work together ({cause}): run "
        "`pip uninstall -y torch torchvision`, then install both by one command, "
        f"`pip install {_pair(torch.version)}`; for the CPU-only builds give it the --index-url "
        "that pytorch.org's get-started page names"
    )


def _version(package: Distribution) -> str:
    """The version with the tag of the build, such as 2.14.1+cu130 or 2.14.1+cpu, where known."""
    file = Path(str(package.locate_file(f"{package.metadata['Name']}/version.py")))
    found = (
        re.search(r"__version__ = '([^']+)'", file.read_text("utf-8")) if file.is_file() else None
    )
    return found[1] if found else package.version


def _build(version: str) -> str:
    """Of a version's tag: the major version of CUDA, "cpu", or "" where it has neither."""
    found = re.search(r"\+cu(\d+)\d$|\+(cpu)$", version)
    return (found[1] or found[2]) if found else ""


def _needed_torch(torchvision: Distribution) -> str:
    """What torchvision's metadata asks of torch, such as "==2.13.0" or ">=2.14.0", or ""."""
    for line in torchvision.requires or []:
        if found := re.match(r"torch\s*\(?\s*((?:==|>=)\s*\d[\w.]*)\)?", line):
            return found[1].replace(" ", "")
    return ""


def _admits(needed: str, version: str) -> bool:
    """Whether the version fits as far as the binary interface goes: major and minor version."""
    least, found = _minor(needed[2:]), _minor(version)
    return found == least if needed.startswith("==") else found >= least


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _pair(torch: str) -> str:
    """Arguments of pip for this torch and its torchvision: 0.(N + 15) belongs to 2.N."""
    major, minor = _minor(torch)
    if major != 2:
        return "torch torchvision"
    return f'"torch=={major}.{minor}.*" "torchvision==0.{minor + 15}.*"'
