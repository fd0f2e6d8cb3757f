"""When does the action of a sample start? Read by a network that was trained on real clips.

    python -m benchmarks.timing --run-dir runs/demo
    python -m benchmarks.timing --run-dir runs/demo "cascade=[base]"

The packaged probe's features of each frame go into a small network over time, trained
here on the clips of `train`: in which third of the clip the action starts. It is measured on real
clips of val and heldout, by action, then reads samples of the whole cascade from heldout's
captions. Beside both: the share of the most frequent third (chance), and the balanced accuracy, the
mean over the thirds.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from dalle2_video.cli import compose
from dalle2_video.data.atomic import write_json
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import EvaluationCaptions
from dalle2_video.data.store.dataset import CelebVTextDataset, eval_loader
from dalle2_video.evaluation.alignment import captions_of
from dalle2_video.faces.attributes import ATTRIBUTES, FaceAttributes
from dalle2_video.faces.probe import AttributeProbe, load_probe
from dalle2_video.faces.writer import read_attributes
from dalle2_video.pipeline.cascade import Cascade, sampling_bar
from dalle2_video.provenance import provenance
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.wiring import store_of

ROOT = Path(__file__).parents[1]
THIRDS = 3


class Reader(nn.Module):
    """Features of frames (B, D, F) -> logits of the third that the action starts in."""

    def __init__(self, features: int, frames: int, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Dropout(0.2),
            nn.Conv1d(features, width, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(width * frames, THIRDS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@torch.no_grad()
def features(probe: AttributeProbe, frames: Tensor, number: int) -> Tensor:
    """uint8 (B, F, H, W, 3) -> (B, D, number): the probe's features of each frame, with what they
    differ by from the frame before.
    """
    video = to_float(frames, number, 32).transpose(1, 2)  # (B, F, 3, 32, 32)
    steps = probe.stem(video.flatten(0, 1)).unflatten(0, video.shape[:2]).transpose(1, 2)
    change = F.pad(steps[:, :, 1:] - steps[:, :, :-1], (1, 0))
    return torch.cat([steps, change], dim=1)


def thirds(clips: list[FaceAttributes]) -> Tensor:
    """int64 (B,)."""
    return torch.tensor([min(int(clip.action_start * THIRDS), THIRDS - 1) for clip in clips])


def train(x: Tensor, y: Tensor, epochs: int) -> Reader:
    """AdamW with a one-cycle learning rate; every class weighs alike."""
    torch.manual_seed(0)
    net = Reader(x.shape[1], x.shape[2])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    for _ in trange(epochs, unit="epoch"):
        for rows in torch.randperm(len(x))[: steps * 64].split(64):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def scores(name: str, found: Tensor, truth: Tensor, clips: list[FaceAttributes]) -> dict:
    """Accuracy, its 95 % interval's half width, balanced accuracy, chance, and by action."""
    right = (found == truth).float()
    share = float(right.mean())
    figures = {
        f"{name}_clips": float(len(right)),
        f"{name}_accuracy": share,
        f"{name}_accuracy_half_width": 1.96 * (share * (1 - share) / len(right)) ** 0.5,
        f"{name}_balanced": float(
            torch.stack([right[truth == third].mean() for third in truth.unique()]).mean()
        ),
        f"{name}_chance": float(truth.bincount().max() / len(truth)),
    }
    for action in ATTRIBUTES["action"]:
        rows = torch.tensor([clip.action == action for clip in clips])
        figures[f"{name}_accuracy_{action}"] = float(right[rows].mean())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("overrides", nargs="*", help="key=value as in configs/")
    given = parser.parse_intermixed_args()
    settings = settings_of(compose(*given.overrides))
    store, policy = store_of(settings), EvaluationCaptions()
    known = read_attributes(Path(settings.data.root) / "attributes.jsonl")
    probe = load_probe().network
    cascade = Cascade.load(given.run_dir, order=settings.cascade)
    number = cascade.unets[-1].network.config.num_frames

    def real(split: str) -> tuple[Tensor, list[FaceAttributes]]:
        dataset = CelebVTextDataset(store, split, 0, policy)
        parts = [
            features(probe, b.frames, number)
            for b in eval_loader(dataset, 64)
            if b.frames is not None
        ]
        return torch.cat(parts), [known[key.rsplit(":", 1)[0]] for key in dataset.keys()]

    x, clips = real("train")
    reader = train(x, thirds(clips), given.epochs)
    figures = {}
    for split in ("val", "heldout"):
        x, clips = real(split)
        with torch.no_grad():
            figures |= scores(f"real_{split}", reader(x).argmax(1), thirds(clips), clips)
    print(json.dumps(figures, indent=1))
    dataset = CelebVTextDataset(store, "heldout", 0, policy, first_windows=True)
    captions, config = captions_of(dataset, given.clips), settings.sample
    clips = [known[clip_id] for clip_id in captions.clip_ids]
    with sampling_bar(cascade.num_sampler_steps(len(clips), config)) as progress:
        frames = cascade.sample(captions.lines, config, progress=progress)
    with torch.no_grad():
        found = reader(features(probe, frames, number)).argmax(1)
    figures |= scores("sampled_combo", found, thirds(clips), clips)
    print(json.dumps(figures, indent=1))
    write_json(ROOT / "benchmarks" / "results" / "timing.json", figures | provenance())


if __name__ == "__main__":
    main()
