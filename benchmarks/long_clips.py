"""Long clips, sampled in tiles: memory, and whether the seams show.

    python -m benchmarks.long_clips memory
    python -m benchmarks.long_clips seams --run-dir runs/demo
    python -m benchmarks.long_clips seams --run-dir runs/demo --stages tsr

memory: spatial super-resolution to 128 and 256 px of 16, 64 and 256 frames in tiles of 16, each
in a process of its own, by the peak of its resident memory. The weights are random: memory does not
depend on them. copies: what a clip takes more than one of a single tile, over the float32 bytes
of the frames that it has more. glibc gives what is freed back at once there (MALLOC_...): what it
else keeps for later is up to two copies more, and differs from run to run.

seams: rendered clips of 64 frames (8 seconds) of heldout's people; fewer frames and pixels of them
go through a run's TSR and SSR, which were trained on 16 frames. How far the brightness of a frame
(mean luminance) is from the one before, where a tile begins or ends, beside the same between all
frames of the real clips; once as configured, once with tiles that share nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.media.sheet import save_sheet
from dalle2_video.data.media.tensors import to_float, to_uint8
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.diffusion.tiles import tile_starts
from dalle2_video.faces.config import FaceFormat
from dalle2_video.faces.light import LUMA
from dalle2_video.faces.plan import plan
from dalle2_video.faces.writer import draw_clip
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.pipeline.cascade import Cascade
from dalle2_video.pipeline.loading import load_unet
from dalle2_video.pipeline.sampling import sample_clips, sample_embeddings
from dalle2_video.pipeline.sampling_config import SuperResolutionSampling
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of

ROOT = Path(__file__).parents[1]
TILE, STEPS = 16, 2
FREED_AT_ONCE = {f"MALLOC_{name}_THRESHOLD_": str(2**18) for name in ("MMAP", "TRIM")}


@torch.no_grad()
def sample(size: int, frames: int, sampler: str) -> None:
    """One clip in this process; prints its peak memory in bytes, and seconds."""
    torch.manual_seed(0)
    model = UnetConfig(
        image_size=size, num_frames=TILE, patch=4, dim=64, mults=(1, 2), head_dim=32,
        attention=(False, False), cross_attention=(False, False), temporal="convolution",
        num_lowres_frames=TILE, lowres_size=size // 4, residual=0.1,
    )  # fmt: skip
    net = Unet3D(model, 16, 16).eval()
    place = torch.zeros(1, 1, dtype=torch.int64)
    whole = F.normalize(torch.randn(1, 16), dim=-1)
    condition = Condition.of(whole, torch.randn(1, 1, 16), place, whole)
    lowres = torch.rand(1, 3, frames, size // 4, size // 4) * 2 - 1
    how = SuperResolutionSampling(sampler=sampler, steps=STEPS, overlap=4)
    begun = time.perf_counter()
    diffusion = DiffusionConfig(prediction="x0")
    sample_clips(net, model, diffusion, condition, torch.arange(1), how, 0, lowres)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([peak, time.perf_counter() - begun]))


def memory() -> dict[str, float]:
    """Each size, length and sampler in a process of its own."""
    figures: dict[str, float] = {}
    for sampler in ("dpm_solver", "ancestral"):
        for size in (128, 256):
            bytes_of = {}
            for frames in (TILE, 64, 256):
                command = [sys.executable, "-m", "benchmarks.long_clips", "memory", "--one"]
                command += [str(size), str(frames), sampler]
                env = os.environ | FREED_AT_ONCE
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, cwd=ROOT, env=env
                )
                bytes_of[frames], seconds = json.loads(done.stdout.splitlines()[-1])
                name = f"{sampler}_{size}px_{frames}_frames"
                figures[f"{name}_megabytes"] = round(bytes_of[frames] / 1e6, 1)
                figures[f"{name}_seconds"] = round(seconds, 1)
                if frames > TILE:
                    more = 4 * 3 * (frames - TILE) * size * size
                    copies = (bytes_of[frames] - bytes_of[TILE]) / more
                    figures[f"{name}_copies"] = round(copies, 2)
                print(name, figures[f"{name}_megabytes"], figures.get(f"{name}_copies"), flush=True)
    return figures


def long_faces(clips: int) -> tuple[torch.Tensor, list[list[str]]]:
    """uint8 (clips, 64, 64, 64, 3) of held-out looks, and a line of each category."""
    form, frames, lines = FaceFormat(size=64, fps=8.0, seconds=8.0), [], []
    people = [clip for clip in plan(4000, 0) if clip.split == "heldout"][:clips]
    for clip in tqdm(people, desc="rendering", unit="clip"):
        file, texts = draw_clip(clip, form)
        frames.append(decode_clip(file, fps=8.0, num_frames=64, size=64).frames)
        lines.append([text.splitlines()[-1] for text in texts.values()])
    return torch.from_numpy(np.stack(frames)), lines


@torch.no_grad()
def seams(run_dir: Path, clips: int, names: list[str]) -> dict[str, float]:
    """Jumps of brightness at the seams of these U-Nets, and a picture."""
    real, lines = long_faces(clips)
    config = settings_of(compose()).sample
    cascade = Cascade.load(run_dir)
    unets = {name: load_unet(run_dir / name / "model.safetensors", name) for name in names}
    frames, size = 64, 64
    for unet, _, _ in unets.values():
        frames, size = frames // unet.config.upscale[0], size // unet.config.upscale[1]
    text, sample_ids = cascade.encode(lines), torch.arange(len(lines))
    embedding = sample_embeddings(
        cascade.prior, cascade.prior.whiten, cascade.prior_diffusion, text, sample_ids, config
    )
    condition = Condition.of(embedding, text.states, text.place, text.embedding)
    natural = jumps(to_float(real)).flatten()
    figures = {"clips": float(len(lines)), "natural_jump_95": percentile(natural)}
    for kind, overlap in (("blended", None), ("apart", 0)):
        lowres = to_float(real, frames, size)
        for stage, (unet, diffusion, _) in unets.items():
            model = unet.config
            how = config.of(stage, model)
            assert isinstance(how, SuperResolutionSampling)
            how = how if overlap is None else replace(how, overlap=overlap)
            parts = [
                sample_clips(
                    unet, model, diffusion, condition.rows(rows), sample_ids[rows], how,
                    0, lowres[rows], stream=stage,
                )
                for rows in tqdm(sample_ids.split(4), desc=f"{stage} {kind}", unit="batch")
            ]  # fmt: skip
            lowres = torch.cat(parts)
            tile = how.tile or model.num_frames
            starts = tile_starts(lowres.shape[2], tile, how.overlap, model.upscale[0])
            places = sorted({*starts[1:], *(start + tile for start in starts[:-1])})
            found = jumps(lowres)
            name = f"{stage}_{kind}"
            figures[f"{name}_seam_jump_95"] = percentile(found[:, [p - 1 for p in places]])
            rest = [p for p in range(lowres.shape[2] - 1) if p + 1 not in places]
            figures[f"{name}_other_jump_95"] = percentile(found[:, rest])
        if kind == "blended":
            shown = [
                clip.numpy()
                for pair in zip(to_uint8(lowres)[:3], real[:3], strict=True)
                for clip in pair
            ]
            save_sheet(run_dir / "long.png", shown, ["sampled", "real"] * 3, frames_per_clip=16)
    return figures


def jumps(video: torch.Tensor) -> torch.Tensor:
    """How far each frame's brightness is from the one before, (B, F - 1), of 255 levels."""
    luminance = torch.einsum("bcfhw,c->bf", video, torch.tensor(LUMA)) / video[0, 0, 0].numel()
    return (luminance[:, 1:] - luminance[:, :-1]).abs() * 127.5


def percentile(values: torch.Tensor) -> float:
    """The 95th."""
    return float(torch.quantile(values.flatten(), 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "seams"))
    parser.add_argument("--one", nargs=3, metavar=("SIZE", "FRAMES", "SAMPLER"), help="(inner)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--stages", nargs="+", default=["tsr", "ssr"])
    given = parser.parse_args()
    if given.one:
        sample(int(given.one[0]), int(given.one[1]), given.one[2])
        return
    wanted = given.run_dir, given.clips, given.stages
    figures = memory() if given.what == "memory" else seams(*wanted)
    print(json.dumps(figures, indent=1))
    name = f"long_clips_{given.what}.json"
    write_json(ROOT / "benchmarks" / "results" / name, figures | provenance())


if __name__ == "__main__":
    main()
