"""Does another commit compute the same numbers as this one, to the last bit?

    python -m benchmarks.same_numbers --old 96d8016 [--sizes tiny demo] [--keep FOLDER]

Runs the entry scripts of an old commit (in a git worktree) and of this working tree, on one store
that the OLD code makes: three optimizer steps of every stage and of its variants, and one sampled
clip of each. Compares losses, gradient norms and validation metrics of all steps, all weights, and
pixels. Then the NEW code resumes what the old one began, and the resolved values of the three
experiments are compared key by key. Prints a line per stage; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
UNETS = ("base", "tsr", "ssr")
SCRIPTS = {"clip": "train_clip", "prior": "train_prior"}
PLACES = ("clips_per_second", "data_wait", "seconds", "memory_gigabytes")  # differ by the moment


@dataclass(frozen=True)
class Job:
    """One training of a stage, and what is sampled from it; in the names of this commit."""

    name: str
    stage: str
    overrides: tuple[str, ...] = ()
    cascade: tuple[str, ...] = ()
    sampled: tuple[str, ...] = ()


JOBS = (
    Job("clip", "clip"),
    Job("prior", "prior"),
    Job("base", "base", cascade=("base",)),
    Job(
        "base_learned_variance",
        "base",
        ("unets.base.model.learned_variance=true",),
        ("base",),
        ("sample.sampler=ancestral",),
    ),
    Job(
        "base_images",
        "base",
        ("unets.base.num_images=2", "unets.base.image_only_prob=0.5"),
        ("base",),
    ),
    Job("base_self_condition", "base", ("unets.base.model.self_condition=true",), ("base",)),
    Job("tsr", "tsr", cascade=("base", "tsr")),
    Job("ssr", "ssr", cascade=UNETS),
    Job("ssr_images", "ssr", ("unets.ssr.num_images=2",), UNETS),
)
BATCH = {"clip": 128, "prior": 32, "base": 16, "tsr": 8, "ssr": 8}  # of experiment=demo
KEYS = {"clip": "clip", "prior": "prior"} | {name: f"unets.{name}" for name in UNETS}
TINY = (
    "faces.clips=64", "faces.size=32", "data.fps=4", "data.num_frames=8", "data.size=32",
    "clip.model.embed_dim=32", "clip.model.video.width=32", "clip.model.video.heads=2",
    "clip.model.text.width=32", "clip.model.text.heads=2",
    "prior.model.width=32", "prior.model.heads=2", "prior.model.layers=2",
    "unets.base.model.dim=32", "unets.base.model.head_dim=32", "unets.base.model.cond_dim=64",
    "unets.base.model.image_size=16", "unets.base.model.num_frames=4",
    "unets.tsr.model.image_size=16", "unets.tsr.model.lowres_size=16", "unets.tsr.crop_frames=4",
    "unets.ssr.model.image_size=32", "unets.ssr.model.lowres_size=16", "unets.ssr.crop_frames=4",
    "unets.tsr.model.num_lowres_frames=4", "unets.ssr.model.num_lowres_frames=8",
    "unets.ssr.crop=16",
    "unets.tsr.model.num_frames=8", "unets.tsr.model.dim=32", "unets.tsr.model.cond_dim=32",
    "unets.ssr.model.num_frames=8", "unets.ssr.model.dim=32", "unets.ssr.model.cond_dim=32",
    *(f"{key}.train.batch_size=8" for key in KEYS.values()),
)  # fmt: skip
DEMO = ("faces.clips=192",)
COMMON = (
    "data.workers=0", "data.splits={train: 0.6, val: 0.2, heldout: 0.2}",
    "sample.steps=3", "sample.unets.tsr.steps=2", "sample.unets.ssr.steps=2",
    "sample.prior_steps=3",
)  # fmt: skip
# What this commit calls otherwise than the old one: (pattern of the new name,
# old name), of overrides and of resolved keys.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"^faces\b", "data.faces"),
    (r"^experiment=", "size="),
    (r"\bheldout\b", "combo"),
    (r"^num_samples\b", "number"),
    (r"^save_intermediates\b", "keep_stages"),
    (r"^sample\.unets\.(\w+)\.tile\b", r"sample.stages.\1.window"),
    (r"^sample\.unets\b", "sample.stages"),
    (r"^(unets\.\w+)\.num_images\b", r"\1.images"),
    (r"^(unets\.\w+)\.image_only_prob\b", r"\1.image_only"),
    (r"^(unets\.\w+)\.cond_dropout\b", r"\1.drop"),
    (r"^(unets\.\w+)\.crop_frames\b", r"\1.window"),
    (r"^(unets\.\w+\.model)\.num_lowres_frames\b", r"\1.low_frames"),
    (r"^(unets\.\w+\.model)\.lowres_size\b", r"\1.low_size"),
)
# Keys that only one side has, with the value that the other side acts by.
ADDED: dict[str, Any] = {
    "faces.root": "data/faces",
    # the files of super-resolution left these to their classes
    **{f"unets.{name}.model.learned_variance": False for name in ("tsr", "ssr")},
    **{f"unets.{name}.diffusion.variance_steps": 1000 for name in UNETS},
    "prior.diffusion.variance_steps": 1000,
    "tracker": None,
}
# Values that were renamed: (key, before) -> now. null leaves the precision to the launch, which
# says "no" where nothing is given.
REVALUED = {("mixed_precision", "no"): None}
REMOVED = frozenset(
    f"sample.{key}"
    for key in ("augmentation", "window", "overlap")  # had no effect there
)


def old_name(text: str) -> str:
    """An override or a dotted key of this commit, in the words of the old one."""
    for new, old in RENAMED:
        text = re.sub(new, old, text)
    return text


# ---------------------------------------------------------------- in each side's own process


def drive(plan: dict[str, Any]) -> None:
    """Run a plan's calls by the entry scripts of the current folder."""
    sys.path.insert(0, os.getcwd())
    import importlib

    import torch
    from hydra import compose, initialize_config_dir

    if Path("dalle2_video/cli.py").exists():
        from dalle2_video.stages.config_tree import register

        register()
    torch.set_num_threads(1)  # with two, the order of some sums is not fixed: the last bit changes
    for call in plan["calls"]:
        if "copy" in call:  # a variant shares the run's CLIP, and the stages that it builds upon
            for stage in ("clip", "prior", *call["stages"]):
                shutil.copytree(f"{call['copy']}/{stage}", f"{call['to']}/{stage}")
            continue
        script = importlib.import_module(call["script"])
        with initialize_config_dir(f"{os.getcwd()}/configs", version_base=None):
            cfg = compose("config", call["overrides"])
        torch.manual_seed(0)
        script.main(cfg)
    resolved = {}
    for name, overrides in plan["experiments"].items():
        from omegaconf import OmegaConf

        with initialize_config_dir(f"{os.getcwd()}/configs", version_base=None):
            tree = OmegaConf.to_container(compose("config", overrides), resolve=True)
        resolved[name] = flat(tree)
    Path(plan["resolved"]).write_text(json.dumps(resolved))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


# ---------------------------------------------------------------- both sides


@dataclass
class Side:
    """One commit's checkout, and where its runs go."""

    checkout: Path
    work: Path
    old: bool
    calls: list[dict[str, Any]] = field(default_factory=list)

    def call(self, script: str, overrides: list[str]) -> None:
        """Note a call of an entry script, in this side's words."""
        words = [old_name(text) if self.old else text for text in overrides]
        self.calls.append({"script": script, "overrides": words})

    def run(self, experiments: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        """Make all calls in one process; the resolved values of the experiments."""
        self.work.mkdir(parents=True, exist_ok=True)
        resolved = self.work / "resolved.json"
        words = {
            name: [old_name(text) if self.old else text for text in overrides]
            for name, overrides in experiments.items()
        }
        plan = {"calls": self.calls, "experiments": words, "resolved": str(resolved)}
        path = self.work / "plan.json"
        path.write_text(json.dumps(plan))
        log = self.work / "log.txt"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--drive", str(path)],
                cwd=self.checkout,
                env=os.environ | {"PYTHONPATH": str(self.checkout)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise SystemExit(f"{log}: failed\n{log.read_text()[-3000:]}")
        self.calls = []
        return json.loads(resolved.read_text())


def places(data: Path, run: Path) -> list[str]:
    return [f"data.root={data}", f"run_dir={run}"]


def plan_size(side: Side, size: str, data: Path) -> None:
    """All jobs of one size: the variants of a U-Net share the run's CLIP and prior."""
    sizes = [*(TINY if size == "tiny" else DEMO), *COMMON]
    if side.old:
        side.call("preprocess", [*sizes, *places(data, side.work)])
    for job in JOBS:
        run = side.work / size / "run"
        steps = training(job, size)
        if job.name != job.stage:
            run = side.work / size / job.name
            side.calls.append(
                {
                    "copy": str(side.work / size / "run"),
                    "to": str(run),
                    "stages": [s for s in job.cascade if s != job.stage],
                }
            )
        if job.stage in UNETS:
            steps.append(f"unet={job.stage}")
        script = SCRIPTS.get(job.stage, "train_decoder")
        side.call(script, [*sizes, *places(data, run), *job.overrides, *steps])
        if job.cascade:
            out = sampling(job, run, f"sampled_{job.stage}")
            side.call("sample", [*sizes, *places(data, run), *out])


def sampling(job: Job, folder: Path, name: str | None = None) -> list[str]:
    """The overrides that sample one clip of a job into <folder>/<name>, by default its own name."""
    names = ",".join(job.cascade)
    sampled = [f"cascade=[{names}]", "text='A man smiles. Warm light.'", "format=frames"]
    return [*job.overrides, *sampled, f"out={folder}/{name or job.name}", *job.sampled]


def training(job: Job, size: str) -> list[str]:
    batch = 8 if size == "tiny" else BATCH[job.stage]
    settings = (f"clips={3 * batch}", "warmup_clips=8", f"log_every_clips={batch}", "workers=0",
                f"save_every_clips={batch}", "keep_checkpoints=9")  # fmt: skip
    return [f"{KEYS[job.stage]}.train.{setting}" for setting in settings]


# ---------------------------------------------------------------- comparison


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in PLACES} for line in lines]


def differing(old: Path, new: Path, stage: str) -> list[str]:
    """What differs between two stage folders: losses, weights, samples."""
    from safetensors.torch import load_file

    found = []
    ours, theirs = (metrics(run / stage / "metrics.jsonl") for run in (new, old))
    if ours != theirs:
        pairs = zip(theirs, ours, strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), (len(theirs), len(ours)))
        found.append(f"metrics, first in {first[0]} before, {first[1]} now")
    for name in (
        "model.safetensors",
        *sorted(
            str(p.relative_to(old / stage))
            for p in (old / stage / "checkpoints").rglob("*.safetensors")
        ),
    ):
        a, b = load_file(old / stage / name), load_file(new / stage / name)
        if a.keys() != b.keys() or any(not a[k].equal(b[k]) for k in a):
            found.append(f"weights of {name}")
    if stage in UNETS and not same_pictures(old / f"sampled_{stage}", new / f"sampled_{stage}"):
        found.append("sampled clip")
    return found


def same_pictures(old: Path, new: Path) -> bool:
    """Whether both folders hold the same frames, and any at all."""
    import numpy as np
    from PIL import Image

    a, b = ([np.asarray(Image.open(p)) for p in sorted(f.rglob("0*.png"))] for f in (old, new))
    return len(a) == len(b) > 0 and all((x == y).all() for x, y in zip(a, b, strict=True))


def differing_values(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Resolved keys that differ, by the names of this commit."""
    named = {old_name(key): (key, value) for key, value in new.items()}
    found = [f"{key}: {value!r} is not there any more" for key, value in old.items()
             if key not in named and key not in REMOVED]  # fmt: skip
    for key, (ours, value) in named.items():
        before = old.get(key, ADDED.get(ours, "nothing"))
        expected = REVALUED.get((ours, before), before) if isinstance(before, str) else before
        if ("combo" if value == "heldout" else value) != expected:
            found.append(f"{ours}: {expected!r} before, {value!r} now")
    return found


def resume(old: Side, new: Side, size: str) -> dict[str, list[str]]:
    """The new code samples what the old one trained, then goes on where that was after two of
    three steps.
    """
    jobs = [(job, "run" if job.name == job.stage else job.name) for job in JOBS]
    for job, name in jobs:
        before, after = old.work / size / name, new.work / size / f"resumed_{job.name}"
        sizes = [*(TINY if size == "tiny" else DEMO), *COMMON]
        data = old.work.parent / f"data_{size}"
        if job.cascade:
            new.call(
                "sample", [*sizes, *places(data, before), *sampling(job, after.parent / "read")]
            )
        shutil.copytree(before, after)
        for sampled in after.glob("sampled_*"):
            shutil.rmtree(sampled)
        last = max((after / job.stage / "checkpoints").iterdir())
        shutil.rmtree(last)
        (after / job.stage / "model.safetensors").unlink()
        steps = training(job, size) + ([f"unet={job.stage}"] if job.stage in UNETS else [])
        script = SCRIPTS.get(job.stage, "train_decoder")
        new.call(script, [*sizes, *places(data, after), *job.overrides, *steps])
    new.run({})
    found = {}
    for job, name in jobs:
        after = new.work / size / f"resumed_{job.name}"
        before = old.work / size / name
        read = after.parent / "read" / job.name
        if job.cascade:
            shutil.copytree(before / f"sampled_{job.stage}", after / f"sampled_{job.stage}")
        found[job.name] = differing(before, after, job.stage)
        if job.cascade and not same_pictures(before / f"sampled_{job.stage}", read):
            found[job.name].append("clip sampled from old files")
    return found


EXPERIMENTS = {name: [f"experiment={name}"] for name in ("demo", "celebvtext", "celebvtext_256")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", default="96d8016", help="the commit to compare with")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "demo"], choices=["tiny", "demo"])
    parser.add_argument("--keep", type=Path, help="a folder that stays, with the old side's runs")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(json.loads(given.drive.read_text()))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        raise SystemExit(compare(given.old, work, given.sizes))


def compare(revision: str, work: Path, sizes: list[str]) -> int:
    checkout = work / "checkout"
    if not checkout.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(checkout), revision], cwd=ROOT, check=True
        )
    old, new = Side(checkout, work / "old", True), Side(ROOT, work / "new", False)
    shutil.rmtree(new.work, ignore_errors=True)
    failed = 0
    values = {}
    for side in (old, new):
        if side.old and (old.work / "resolved.json").exists():
            values["old"] = json.loads((old.work / "resolved.json").read_text())
            continue
        for size in sizes:
            plan_size(side, size, work / f"data_{size}")
        values["old" if side.old else "new"] = side.run(EXPERIMENTS)
    for size in sizes:
        resumed = resume(old, new, size)
        for job in JOBS:
            name = "run" if job.name == job.stage else job.name
            found = differing(old.work / size / name, new.work / size / name, job.stage)
            found += [f"resumed: {text}" for text in resumed[job.name]]
            print(f"{size:5} {job.name:24}{'same' if not found else '; '.join(found)}")
            failed += bool(found)
    for name in EXPERIMENTS:
        found = differing_values(values["old"][name], values["new"][name])
        print(f"values of experiment={name}: {'same' if not found else ''}")
        print("".join(f"    {text}\n" for text in found), end="")
        failed += bool(found)
    return int(failed > 0)


if __name__ == "__main__":
    main()
