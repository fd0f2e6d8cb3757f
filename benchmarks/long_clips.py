"""Memory of sampling long clips in windows: one window's, and so many float32 copies of the clip.

    python -m benchmarks.long_clips

Spatial super-resolution to 128 and 256 px of 16, 64 and 256 frames in windows of 16, each in a
process of its own, by the peak of its resident memory. The weights are random: memory does not
depend on them. copies: what a clip takes more than one of a single window, over the float32 bytes
of the frames that it has more.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dalle2_video.data.atomic import write_json
from dalle2_video.diffusion.objective import DiffusionConfig
from dalle2_video.evaluation.provenance import provenance
from dalle2_video.models.unet3d import Condition, Unet3D, UnetConfig
from dalle2_video.sampling import ClipSampling, sample_clips

ROOT = Path(__file__).parents[1]
WINDOW, STEPS = 16, 2


@torch.no_grad()
def sample(size: int, frames: int, sampler: str) -> None:
    """One clip in this process; prints its peak memory in bytes, and seconds."""
    torch.manual_seed(0)
    model = UnetConfig(
        image_size=size, num_frames=WINDOW, patch=4, dim=64, mults=(1, 2), head_dim=32,
        attention=(False, False), cross_attention=(False, False), temporal="convolution",
        low_frames=WINDOW, low_size=size // 4, low_skip=True,
    )  # fmt: skip
    net = Unet3D(model, 16, 16).eval()
    place = torch.zeros(1, 1, dtype=torch.int64)
    whole = F.normalize(torch.randn(1, 16), dim=-1)
    condition = Condition.of(whole, torch.randn(1, 1, 16), place, whole)
    low = torch.rand(1, 3, frames, size // 4, size // 4) * 2 - 1
    how = ClipSampling(sampler=sampler, steps=STEPS, overlap=4)
    begun = time.perf_counter()
    diffusion = DiffusionConfig(prediction="x0")
    sample_clips(net, model, diffusion, condition, torch.arange(1), how, 0, low)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([peak, time.perf_counter() - begun]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=3, metavar=("SIZE", "FRAMES", "SAMPLER"), help="(inner)")
    given = parser.parse_args()
    if given.one:
        sample(int(given.one[0]), int(given.one[1]), given.one[2])
        return
    figures: dict[str, float] = {}
    for sampler in ("dpm_solver", "ancestral"):
        for size in (128, 256):
            bytes_of = {}
            for frames in (WINDOW, 64, 256):
                command = [sys.executable, "-m", "benchmarks.long_clips", "--one"]
                command += [str(size), str(frames), sampler]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                bytes_of[frames], seconds = json.loads(done.stdout.splitlines()[-1])
                name = f"{sampler}_{size}px_{frames}_frames"
                figures[f"{name}_megabytes"] = round(bytes_of[frames] / 1e6, 1)
                figures[f"{name}_seconds"] = round(seconds, 1)
                if frames > WINDOW:
                    more = 4 * 3 * (frames - WINDOW) * size * size
                    figures[f"{name}_copies"] = round(
                        (bytes_of[frames] - bytes_of[WINDOW]) / more, 2
                    )
                print(name, figures[f"{name}_megabytes"], figures.get(f"{name}_copies"), flush=True)
    write_json(ROOT / "benchmarks" / "results" / "long_clips.json", figures | provenance())


if __name__ == "__main__":
    main()
