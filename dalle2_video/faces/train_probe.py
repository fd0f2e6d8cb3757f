"""Train the attribute probe on real renders: `python -m dalle2_video.faces.train_probe`.

Clips of the train split are drawn, encoded as H.264 and decoded as preprocess does (4 frames a
second, 32 px). Slight noise, blur, shift and brightness changes make the probe read samples of a
model too. The metrics are those of `val` and `heldout`, which it has not seen; they go to a flat
JSON.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.decode import decode_clip
from dalle2_video.data.preprocess.pool import WorkerPool
from dalle2_video.faces.config import FaceFormat
from dalle2_video.faces.light import fit_light_rules
from dalle2_video.faces.plan import FRACTIONS, FaceClip, plan
from dalle2_video.faces.probe import (
    KIND,
    PROBE_PATH,
    AttributeProbe,
    ProbeConfig,
    Score,
    load_probe,
    probe_loss,
    score,
    targets_of,
)
from dalle2_video.faces.writer import draw_clip
from dalle2_video.keyed import generator
from dalle2_video.model_file import save_model
from dalle2_video.provenance import provenance


def decoded(clip: FaceClip) -> np.ndarray:
    """One clip as the networks get it: uint8 (8,32,32,3), through H.264 at 64 px and 8 fps."""
    form = FaceFormat(size=64, fps=8.0, seconds=2.0)
    return decode_clip(draw_clip(clip, form)[0], fps=4.0, num_frames=8, size=32).frames


def draw_all(clips: list[FaceClip], workers: int) -> Tensor:
    """uint8 (N,8,32,32,3) of all clips, in order."""
    processes, tasks = workers if workers > 1 else 0, ((clip.clip_id, (clip,)) for clip in clips)
    with WorkerPool(decoded, processes, ["dalle2_video.faces.train_probe"]) as pool:
        frames = [f.result() for _, f in tqdm(pool.map(tasks), total=len(clips), unit="clip")]
    return torch.from_numpy(np.stack(frames))


def augment(video: Tensor, random: torch.Generator) -> Tensor:
    """float (B,3,F,H,W) in [-1, 1], each clip with its own shift, gain, blur and noise."""
    batch = len(video)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    padded = F.pad(video, (1, 1, 1, 1, 0, 0), mode="replicate")
    size = video.shape[-1]
    moved = torch.empty_like(video)
    for k, (dx, dy) in enumerate((draw(batch, 2) * 3).long().tolist()):
        moved[k] = padded[k, :, :, dy : dy + size, dx : dx + size]
    gain = 1 + 0.12 * (draw(batch, 1, 1, 1, 1) - 0.5)
    hue = 1 + 0.06 * (draw(batch, 3, 1, 1, 1) - 0.5)
    moved = (moved + 1) * gain * hue - 1
    blurred = F.avg_pool3d(F.pad(moved, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), 1)
    moved = torch.lerp(moved, blurred, 0.8 * draw(batch, 1, 1, 1, 1) ** 2)
    noise = torch.randn(video.shape, generator=random)
    return (moved + 0.12 * draw(batch, 1, 1, 1, 1) ** 2 * noise).clamp(-1, 1)


def train(
    frames: Tensor, targets: dict[str, Tensor], epochs: int, batch_size: int, lr: float, seed: int
) -> AttributeProbe:
    """AdamW, one-cycle learning rate; a pure function of its arguments on one machine."""
    torch.manual_seed(seed)
    probe = AttributeProbe(ProbeConfig())
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.05)
    steps = len(frames) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    bar = tqdm(total=epochs * steps, unit="step")
    for epoch in range(epochs):
        random = generator(seed, epoch, "probe")
        order = torch.randperm(len(frames), generator=random)
        for part in order[: steps * batch_size].view(steps, batch_size):
            video = augment(probe.prepare(frames[part]), random)
            logits = probe.read(F.dropout(probe.encode(video), 0.2))
            loss = probe_loss(logits, {name: t[part] for name, t in targets.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return probe.eval()


def metrics_of(split: str, result: Score, by_rule: Score) -> dict[str, float]:
    """Flat metrics of one split: of the network, and of the light rules."""
    metrics = {
        f"probe_{split}_mean_accuracy": result.mean,
        f"probe_{split}_clips": result.clips,
        f"probe_{split}_mean_accuracy_low": result.low,
        f"probe_{split}_mean_accuracy_high": result.high,
        f"probe_{split}_chance_mean": result.mean_chance,
    }
    metrics |= {f"probe_{split}_accuracy_{k}": v for k, v in result.accuracy.items()}
    metrics |= {f"light_rule_{split}_accuracy_{k}": v for k, v in by_rule.accuracy.items()}
    return {name: round(value, 4) for name, value in metrics.items()}


def print_table(split: str, result: Score, by_rule: Score) -> None:
    """Accuracy of every attribute on one split, with chance."""
    interval = f"{result.low:.1%} to {result.high:.1%}"
    print(f"\n{split}, {result.clips} clips: mean {result.mean:.1%} ({interval})")
    for name, accuracy in result.accuracy.items():
        rule = by_rule.accuracy.get(name)
        without = "" if rule is None else f"   without a network {rule:.1%}"
        print(f"  {name:17}{accuracy:7.1%}  chance {result.chance[name]:.1%}{without}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dalle2_video.faces.train_probe",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--clips", type=int, default=6000, help="clips to draw, all splits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the data set and the training")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="drawing processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=PROBE_PATH)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/results/probe.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Draw, train and save; then measure the saved file, print the metrics and write them."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)

    clips = plan(given.clips, given.seed)
    begin = time.perf_counter()
    frames = draw_all(clips, given.workers)
    drawn = time.perf_counter()
    rows = {s: [k for k, clip in enumerate(clips) if clip.split == s] for s in FRACTIONS}
    targets = {s: targets_of([clips[k].attributes for k in part]) for s, part in rows.items()}
    known = frames[rows["train"]]
    probe = train(known, targets["train"], given.epochs, given.batch_size, given.lr, given.seed)
    trained = time.perf_counter()

    rules = fit_light_rules(known, targets["train"])
    light = json.dumps({name: [round(c, 4) for c in rule.cuts] for name, rule in rules.items()})
    meta = {"light": light, "data": f"faces, seed {given.seed}, train split of {given.clips} clips"}
    save_model(given.out, KIND, vars(probe.config), probe.state_dict(), meta)
    loaded = load_probe(given.out, sha256=None)

    metrics: dict[str, float | str | int] = {
        "probe_parameters": sum(p.numel() for p in probe.parameters()),
        "probe_file_bytes": given.out.stat().st_size,
        "probe_train_clips": len(known),
        "probe_draw_seconds": round(drawn - begin, 1),
        "probe_train_seconds": round(trained - drawn, 1),
        "probe_train_threads": given.threads,
    }
    for split in ("val", "heldout"):
        unseen = frames[rows[split]]
        result = score(loaded.network.predict(unseen), targets[split])
        by_rule = score({n: r.predict(unseen) for n, r in loaded.light.items()}, targets[split])
        metrics |= metrics_of(split, result, by_rule)
        print_table(split, result, by_rule)
    write_json(given.report, metrics | {"probe_sha256": loaded.sha256} | provenance())
    print(f"\nSHA-256 {loaded.sha256}: pin it as PROBE_SHA256 in dalle2_video/faces/probe.py")


if __name__ == "__main__":
    main()
