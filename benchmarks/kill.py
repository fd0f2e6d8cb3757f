"""kill -9 at random moments, also inside saves: does every resumed run repeat the undisturbed one?

    python -m benchmarks.kill                # 20 kills of train_decoder.py, about 10 minutes

Renders a few faces, trains a small CLIP, then the base U-Net once undisturbed and once killed again
and again. Every second kill waits for a checkpoint that is being written. After each kill every
checkpoint folder that is there must be whole, by its checksums. In the end the losses of all steps
and the weights must be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dalle2_video.data.atomic import write_json
from dalle2_video.model_file import file_hash
from dalle2_video.provenance import provenance
from dalle2_video.training.checkpoint_files import CHECKSUMS, checksum, whole_checkpoints
from dalle2_video.training.log import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 120, 8
SETTINGS = [
    "faces.clips=64",
    "faces.size=32",
    "data.fps=4",
    "data.num_frames=8",
    "data.size=32",
    "data.splits={train: 0.6, val: 0.2, heldout: 0.2}",
    "clip.train.clips=512",
    "clip.train.save_every_clips=512",
    "sample.steps=2",
    f"unets.base.train.batch_size={BATCH}",
    f"unets.base.train.clips={STEPS * BATCH}",
    "unets.base.train.warmup_clips=80",
    f"unets.base.train.log_every_clips={BATCH}",
    f"unets.base.train.save_every_clips={4 * BATCH}",
    "unets.base.train.val_every_clips=320",
]


def script(name: str, folder: Path, data: Path) -> list[str]:
    places = [f"run_dir={folder}", f"faces.root={data}"]
    return [sys.executable, str(ROOT / name), *SETTINGS, *places]


def last_clips(folder: Path) -> int:
    lines = read_metrics(folder / "base/metrics.jsonl")
    return lines[-1]["clips"] if lines else 0


def kill_once(command: list[str], folder: Path, dice: random.Random, in_save: bool) -> str:
    """Start the run, let it make some steps, kill it -> what it was at; "ended" if it was done."""
    root = folder / "base/checkpoints"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = last_clips(folder)
    target = begun + BATCH * dice.randint(1, 6)
    while process.poll() is None and last_clips(folder) < target:
        time.sleep(0.01)
    if in_save:
        while process.poll() is None and not list(root.glob(".*.tmp")):
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.15))
    else:
        time.sleep(dice.uniform(0, 0.5))
    process.kill()
    if process.wait() == 0:
        return "ended"
    return "save" if list(root.glob(".*.tmp")) else "step"


def check_whole(folder: Path) -> int:
    """Number of checkpoints; AssertionError where one does not match its checksums."""
    found = whole_checkpoints(folder / "base/checkpoints")
    for path in found:
        sums = json.loads((path / CHECKSUMS).read_text())
        assert all(checksum(path / name) == value for name, value in sums.items()), path
    named = [p for p in (folder / "base/checkpoints").glob("[0-9]*")]
    assert len(named) == len(found), "a folder under its final name that is not whole"
    return len(found)


def losses(folder: Path) -> list[tuple[int, str, float]]:
    lines = read_metrics(folder / "base/metrics.jsonl")
    return [
        (line["clips"], key, line[key])
        for line in lines
        for key in ("loss", "grad_norm", "val/loss")
        if key in line
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    a = parser.parse_args()
    dice = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data, calm, killed = root / "data", root / "calm", root / "killed"
        subprocess.run(script("train_clip.py", calm, data), check=True, stdout=subprocess.DEVNULL)
        shutil.copytree(calm / "clip", killed / "clip")
        subprocess.run(
            script("train_decoder.py", calm, data), check=True, stdout=subprocess.DEVNULL
        )
        command = script("train_decoder.py", killed, data)
        moments: list[str] = []
        while len(moments) < a.kills:
            at = kill_once(command, killed, dice, in_save=len(moments) % 2 == 1)
            if at == "ended":  # begin again with the same data
                assert losses(killed) == losses(calm)
                shutil.rmtree(killed / "base")
                continue
            moments.append(at)
            whole = check_whole(killed)
            print(f"kill {len(moments)}: in a {at}, {last_clips(killed)} clips, {whole} whole")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        same = losses(killed) == losses(calm)
        name = "base/model.safetensors"
        weights = file_hash(killed / name) == file_hash(calm / name)
        figures = {
            "kills": len(moments),
            "kills_in_a_save": moments.count("save"),
            "losses_bit_for_bit": same,
            "weights_bit_for_bit": weights,
        }
    write_json(ROOT / "benchmarks/results/kill.json", figures | provenance())
    print(json.dumps(figures, indent=1))
    if not (same and weights):
        raise SystemExit("the resumed run differs")


if __name__ == "__main__":
    main()
