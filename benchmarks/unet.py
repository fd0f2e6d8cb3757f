"""A training step of Unet3D: against other open implementations, against torch.mm, over frames.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -r requirements.txt -r requirements-dev.txt -r benchmarks/peers.txt
    .venv-peers/bin/python -m benchmarks.unet peers     # needs the peers
    python -m benchmarks.unet mm
    python -m benchmarks.unet frames
    python -m benchmarks.unet gpu                       # `make bench-gpu`

`peers`: forward, backward and AdamW at the same dim and mults, in turn with each peer in one
process; the ratio is the median over neighbouring runs. Our blocks are those that bring the FLOPs
within 10 % of video-diffusion-pytorch's, our attention is at the three lower levels as in the paper
(that peer has linear attention at every level and a full one in the middle). FLOPs are those that
torch counts in a forward pass (matrix products, convolutions, fused attention), times three.
Memory: the peak of a process of its own that makes three steps, less what it held before the first.
 `mm`: FLOPs per
second of a step over those of torch.mm on 2048 x 2048 matrices. `frames`: 8 to 64 frames.
`gpu`: bf16, uncompiled and with torch.compile, model FLOPs utilisation at the widths of the presets
small and base (without cross attention), largest batch. Each writes
benchmarks/results/unet_<name>.json.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle2_video.data.atomic import write_json
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.provenance import provenance

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]  # one forward pass
MULTS = (1, 2, 4, 8)
EMBEDDING, TEXT = 32, 32
H100_BF16 = 989e12  # FLOPs per second without sparsity, NVIDIA's data sheet


# ---------------------------------------------------------------- networks and their inputs


def unet_config(dim: int, side: int, blocks: int, frames: int = 16) -> UnetConfig:
    """Four levels, attention at the lower three, no stem, no cross attention."""
    return UnetConfig(
        image_size=side,
        num_frames=frames,
        patch=1,
        dim=dim,
        mults=MULTS,
        blocks=blocks,
        attention=(False, True, True, True),
        cross_attention=(False,) * 4,
        head_dim=32,
        cond_dim=4 * dim,
    )


def ours(config: UnetConfig, batch: int, device: str = "cpu") -> tuple[nn.Module, Step]:
    """Unet3D and a forward pass on random clips."""
    net = Unet3D(config, EMBEDDING, TEXT).to(device)
    z = torch.randn(batch, *config.clip_shape, device=device)
    condition = Condition.of(
        F.normalize(torch.randn(batch, EMBEDDING, device=device), dim=-1),
        torch.randn(batch, 1, TEXT, device=device),
        torch.zeros(batch, 1, dtype=torch.int64, device=device),
        F.normalize(torch.randn(batch, EMBEDDING, device=device), dim=-1),
    )
    log_snr = torch.randn(batch, device=device)
    return net, lambda: net(z, log_snr, condition)


def video_diffusion_pytorch(dim: int, side: int, batch: int) -> tuple[nn.Module, Step]:
    """Version 0.7: two blocks per level, linear spatial attention but in the middle."""
    from video_diffusion_pytorch import Unet3D as Peer  # type: ignore[import-not-found]

    net = Peer(dim=dim, dim_mults=MULTS)
    x, t = torch.randn(batch, 3, 16, side, side), torch.rand(batch)
    return net, lambda: net(x, t)


def imagen_pytorch(dim: int, side: int, batch: int) -> tuple[nn.Module, Step]:
    """Version 2.1 without text; attention at the two low levels, since its spatial attention takes
    all frames at once (17 GB of scores at 16 x 32 x 32).
    """
    from imagen_pytorch import Unet3D as Peer  # type: ignore[import-not-found]

    net = Peer(
        dim=dim,
        dim_mults=MULTS,
        num_resnet_blocks=2,
        attn_dim_head=32,
        layer_attns=(False, False, True, True),
        layer_cross_attns=False,
        cond_on_text=False,
        time_causal_attn=False,
    )
    x, t = torch.randn(batch, 3, 16, side, side), torch.rand(batch)
    return net, lambda: net(x, t)


def diffusers_unet3d(dim: int, side: int, batch: int) -> tuple[nn.Module, Step]:
    """UNet3DConditionModel: temporal convolutions and transformers at every level."""
    from diffusers import UNet3DConditionModel

    net = UNet3DConditionModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock3D",) * 4,
        up_block_types=("CrossAttnUpBlock3D",) * 4,
        block_out_channels=tuple(dim * m for m in MULTS),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT,
        attention_head_dim=32,
    )
    x, t = torch.randn(batch, 3, 16, side, side), torch.randint(0, 1000, (batch,))
    text = torch.randn(batch, 1, TEXT)
    return net, lambda: net(x, t, text).sample


def diffusers_spatio_temporal(dim: int, side: int, batch: int) -> tuple[nn.Module, Step]:
    """UNetSpatioTemporalConditionModel (Stable Video Diffusion), with attention at every level."""
    from diffusers import UNetSpatioTemporalConditionModel

    net = UNetSpatioTemporalConditionModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 4,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 4,
        block_out_channels=tuple(dim * m for m in MULTS),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=2,
        cross_attention_dim=TEXT,
        num_attention_heads=tuple(dim * m // 32 for m in MULTS),
        num_frames=16,
    )
    x, t = torch.randn(batch, 16, 3, side, side), torch.rand(batch)
    text, ids = torch.randn(batch, 1, TEXT), torch.ones(batch, 3)
    return net, lambda: net(x, t, text, ids).sample


PEERS = {
    "video_diffusion_pytorch": video_diffusion_pytorch,
    "imagen_pytorch": imagen_pytorch,
    "diffusers_unet3d": diffusers_unet3d,
    "diffusers_spatio_temporal": diffusers_spatio_temporal,
}


def offline() -> None:
    """imagen-pytorch asks a hub for the width of T5 at import; it is 768."""
    import transformers  # type: ignore[import-not-found]

    class Width:
        d_model = 768

    transformers.T5Config.from_pretrained = classmethod(lambda cls, *a, **k: Width())


# ---------------------------------------------------------------- what is measured


def _attention_flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """Of the fused kernel for CPUs, which torch (2.14) counts as nothing; shapes (B, H, N, D)."""
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (dim + value[3])


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flops_of(forward: Step) -> float:
    """FLOPs of a forward pass, as torch counts them."""
    counting = FlopCounterMode(display=False, custom_mapping=FUSED)
    with torch.no_grad(), counting as counter:
        forward()
    return float(counter.get_total_flops())


def training_step(net: nn.Module, forward: Step) -> Callable[[], None]:
    """Forward, squared error, backward, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        out: Tensor = forward()
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def mm_rate(size: int = 2048, rounds: int = 8) -> float:
    """FLOPs per second of torch.mm in float32, the median."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b)) for _ in range(rounds))


# ---------------------------------------------------------------- against peers

# (dim, side, batch) -> our blocks: those that bring the counted FLOPs nearest to the peer's
SIZES = {(32, 32, 2): 2, (64, 64, 1): 1}


def bench_peers(rounds: int, names: list[str]) -> dict:
    """Ratios of time, FLOPs and memory, ours over the peer's."""
    offline()
    figures: dict[str, float] = {}
    for (dim, side, batch), blocks in SIZES.items():
        config = unet_config(dim, side, blocks)
        torch.manual_seed(0)
        net, forward = ours(config, batch)
        own_flops, own_step = flops_of(forward), training_step(net, forward)
        own_memory = memory_of("ours", dim)
        for name in names if dim == 32 else names[:1]:  # the others take minutes per step at 64
            peer, peer_forward = PEERS[name](dim, side, batch)
            peer_flops, peer_step = flops_of(peer_forward), training_step(peer, peer_forward)
            own_step()
            peer_step()
            pairs = [(seconds(own_step), seconds(peer_step)) for _ in range(rounds)]
            ratio = statistics.median(a / b for a, b in pairs)
            key = f"{name}_dim_{dim}"
            memory = memory_of(name, dim)
            figures |= {
                f"{key}_our_seconds": statistics.median(a for a, _ in pairs),
                f"{key}_peer_seconds": statistics.median(b for _, b in pairs),
                f"{key}_time_ratio": ratio,
                f"{key}_flops_ratio": own_flops / peer_flops,
                f"{key}_time_per_flop_ratio": ratio * peer_flops / own_flops,
                f"{key}_our_gigaflops_per_second": 3e-9
                * own_flops
                / statistics.median(a for a, _ in pairs),
                f"{key}_peer_gigaflops_per_second": 3e-9
                * peer_flops
                / statistics.median(b for _, b in pairs),
                f"{key}_our_megabytes": own_memory,
                f"{key}_peer_megabytes": memory,
                f"{key}_memory_ratio": own_memory / memory,
            }
            print(
                key,
                {k.removeprefix(key + "_"): round(v, 3) for k, v in figures.items() if key in k},
            )
            del peer, peer_forward, peer_step
    return figures


def memory_of(name: str, dim: int) -> float:
    """Peak megabytes of three training steps in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.unet", "memory", "--name", name, "--dim", str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_memory(name: str, dim: int) -> None:
    """The body of `memory_of`."""
    ((size, blocks),) = [item for item in SIZES.items() if item[0][0] == dim]
    if name == "ours":
        net, forward = ours(unet_config(dim, size[1], blocks), size[2])
    else:
        offline()
        net, forward = PEERS[name](*size)
    step = training_step(net, forward)
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        step()
    print((peak() - before) / 1e6)


def peak() -> int:
    """The most bytes this process held. (ru_maxrss would begin with what its parent held.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---------------------------------------------------------------- against torch.mm, over frames


def bench_mm(rounds: int) -> dict:
    """Share of torch.mm's FLOPs per second that a training step reaches."""
    figures = {}
    for (dim, side, batch), blocks in SIZES.items():
        net, forward = ours(unet_config(dim, side, blocks), batch)
        flops, step = 3 * flops_of(forward), training_step(net, forward)
        step()
        pairs = [(flops / seconds(step), mm_rate()) for _ in range(rounds)]
        figures[f"dim_{dim}_gigaflops_per_second"] = statistics.median(a for a, _ in pairs) / 1e9
        figures[f"dim_{dim}_mm_gigaflops_per_second"] = statistics.median(b for _, b in pairs) / 1e9
        figures[f"dim_{dim}_of_mm"] = statistics.median(a / b for a, b in pairs)
    return figures


def bench_frames(rounds: int) -> dict:
    """Seconds and megabytes of a step at 8 and 64 frames; linear is 8 times."""
    figures: dict[str, float] = {}
    times: dict[int, list[float]] = {8: [], 64: []}
    steps = {}
    for frames in times:
        net, forward = ours(unet_config(32, 32, 2, frames), 1)
        steps[frames] = training_step(net, forward)
        steps[frames]()
    for _ in range(rounds):
        for frames, values in times.items():
            values.append(seconds(steps[frames]))
    for frames, values in times.items():
        code = (
            "from benchmarks.unet import *\n"
            f"net, forward = ours(unet_config(32, 32, 2, {frames}), 1)\n"
            "step = training_step(net, forward)\n"
            "before = psutil.Process().memory_info().rss\n"
            "step(); step()\n"
            "print((peak() - before) / 1e6)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        figures[f"frames_{frames}_seconds"] = statistics.median(values)
        figures[f"frames_{frames}_megabytes"] = float(done.stdout.splitlines()[-1])
    pairs = zip(times[8], times[64], strict=True)
    figures["time_over_linear"] = statistics.median(b / a for a, b in pairs) / 8
    figures["memory_over_linear"] = (
        figures["frames_64_megabytes"] / figures["frames_8_megabytes"] / 8
    )
    return figures


# ---------------------------------------------------------------- GPU


def bench_gpu(rounds: int) -> dict:
    """bf16 autocast at 16 x 64 x 64 by widths of the presets: the largest batch (a power of two) of
    an uncompiled step, and model FLOPs utilisation there, uncompiled and by torch.compile.
    """
    presets = {
        "small": replace(unet_config(64, 64, 2), mults=(1, 2, 4, 6), cond_dim=512),
        "base": replace(unet_config(128, 64, 2), cond_dim=512, head_dim=64),
    }
    cells = {
        f"{name}_checkpointing" if checkpointing else name: (config, checkpointing)
        for (name, config), checkpointing in itertools.product(presets.items(), (False, True))
    }
    figures: dict[str, float] = {}
    for key, cell in cells.items():  # the quick half first: a compilation takes minutes
        batch, rate = 1, 0.0
        with suppress(torch.OutOfMemoryError):
            while True:
                rate = _gpu_rate(*cell, batch, rounds)
                batch *= 2
        torch.cuda.empty_cache()
        figures[f"{key}_largest_batch"] = batch // 2
        figures[f"{key}_uncompiled_utilisation"] = rate / H100_BF16
        print(key, batch // 2, f"{rate / 1e12:.0f} TFLOP/s", flush=True)
    for key, cell in cells.items():
        batch = int(figures[f"{key}_largest_batch"])
        rate = _gpu_rate(*cell, batch, rounds, compiled=True)
        torch.cuda.empty_cache()
        figures[f"{key}_utilisation"] = rate / H100_BF16
        print(key, batch, f"{rate / 1e12:.0f} TFLOP/s, compiled", flush=True)
    return figures


def _gpu_rate(
    config: UnetConfig, checkpointing: bool, batch: int, rounds: int, compiled: bool = False
) -> float:
    """FLOPs per second of a training step."""
    flops = 3 * batch * flops_of(ours(config, 1, "cuda")[1])
    net, forward = ours(config, batch, "cuda")
    assert isinstance(net, Unet3D)
    net.activation_checkpointing = checkpointing
    if compiled:
        torch._dynamo.reset()  # or after eight networks it gives up and runs them uncompiled
        net.compile()

    def amp() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return forward()

    step = training_step(net, amp)
    for _ in range(3):
        seconds(step)
    return flops / statistics.median(seconds(step) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["peers", "mm", "frames", "gpu", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--name", default="ours", help="of a network, for `memory`")
    parser.add_argument("--dim", type=int, default=32)
    a = parser.parse_args()
    if a.what == "memory":
        print_memory(a.name, a.dim)
        return
    if a.what == "peers":
        figures = bench_peers(a.rounds, a.peers)
    elif a.what == "mm":
        figures = bench_mm(a.rounds)
    elif a.what == "frames":
        figures = bench_frames(a.rounds)
    else:
        figures = bench_gpu(a.rounds)
    figures |= provenance()
    write_json(RESULTS / f"unet_{a.what}.json", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
