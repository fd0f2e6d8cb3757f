"""The probe: a small network that reads the attributes of a clip of the faces data set.

Trained by `python -m dalle2_video.faces.train_probe` on real renders of the train split that
went through H.264 and the decoder of preprocess; its weights are part of the package and pinned by
SHA-256, so that metrics of different days compare. `score` turns readings into accuracies.

Letters: B batch, F frames, H W pixels, D features.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.data.media.frame import resize_matrix
from dalle2_video.faces.attributes import ATTRIBUTES, UNDEFINED, FaceAttributes
from dalle2_video.faces.light import LightRule
from dalle2_video.model_file import CheckpointError, load_model, load_weights

PROBE_PATH = Path(__file__).with_name("probe.safetensors")
PROBE_SHA256 = "424169cb9c99c2e0b3492809b76de752b3899c234547dd70a3c7a6ba5ee56dcd"
KIND = "attribute_probe"


@dataclass(frozen=True)
class ProbeConfig:
    """Input grid (frames over the whole clip, pixels) and widths of the probe."""

    num_frames: int = 8
    size: int = 32
    channels: tuple[int, int, int] = (48, 64, 96)
    features: int = 128


class AttributeProbe(nn.Module):
    """uint8 clips -> logits of every attribute.

    Each frame passes three 2D convolutions and a linear map that keeps places apart; two 1D
    convolutions follow over time; mean and maximum over time give `features` (B, 2 D).
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.channels
        width = config.features
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_conv(nn.Conv2d(12, first, 3, padding=1), nn.BatchNorm2d(first)),
            *_conv(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.BatchNorm2d(second)),
            *_conv(nn.Conv2d(second, third, 3, stride=2, padding=1), nn.BatchNorm2d(third)),
            nn.Flatten(),
            *_conv(nn.Linear(third * (config.size // 8) ** 2, width), nn.BatchNorm1d(width)),
        )
        self.time = nn.Sequential(
            *_conv(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)),
            *_conv(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * width, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 RGB (B,F,H,W,3) of any F, H, W -> float (B,3,8,32,32) in [-1, 1].

        Frames at k/8 of the clip's length; the area average where pixels shrink (`resize_matrix`).
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"clips must be uint8 (B, F, H, W, 3), not {frames.dtype} "
                             f"{tuple(frames.shape)}")  # fmt: skip
        count, size = self.config.num_frames, self.config.size
        frames = frames[:, [k * frames.shape[1] // count for k in range(count)]]
        video = frames.permute(0, 4, 1, 2, 3).float()
        for axis in (3, 4):
            if video.shape[axis] != size:
                weight = torch.from_numpy(resize_matrix(video.shape[axis], size)).to(video)
                video = (video.movedim(axis, -1) @ weight.T).movedim(-1, axis)
        return video / 127.5 - 1

    def features(self, frames: Tensor) -> Tensor:
        """uint8 (B,F,H,W,3) -> float (B, 2 D), what the heads see."""
        return self.encode(self.prepare(frames))

    def encode(self, video: Tensor) -> Tensor:
        """float (B,3,8,32,32) in [-1, 1] -> (B, 2 D)."""
        batch, _, count = video.shape[:3]
        images = video.transpose(1, 2).flatten(0, 1)
        steps = self.stem(images).unflatten(0, (batch, count)).transpose(1, 2)  # (B, D, 8)
        steps = steps + self.time(steps)
        return torch.cat([steps.mean(2), steps.amax(2)], dim=1)

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """(B, 2 D) -> logits (B, values) of every attribute."""
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """uint8 (B,F,H,W,3) -> logits (B, values) of every attribute."""
        return self.read(self.features(frames))

    @torch.no_grad()
    def predict(self, frames: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
        """uint8 (B,F,H,W,3) -> int64 (B,) of every attribute: indices into ATTRIBUTES.

        Runs in eval mode on the probe's device. hair_color is guessed for bald heads too; `score`
        leaves those out.
        """
        training, device = self.training, next(self.parameters()).device
        self.eval()
        parts = [self(part.to(device)) for part in frames.split(batch_size)]
        self.train(training)
        return {name: torch.cat([p[name].argmax(1).cpu() for p in parts]) for name in ATTRIBUTES}


def _conv(layer: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return layer, norm, nn.ReLU()


@dataclass(frozen=True)
class Probe:
    """The packaged network (eval mode, no gradients) and the network-free light rules."""

    network: AttributeProbe
    light: dict[str, LightRule]
    sha256: str


def load_probe(path: Path = PROBE_PATH, sha256: str | None = PROBE_SHA256) -> Probe:
    """Read the probe. Raises ValueError when the file's SHA-256 is not the pinned one.

    Give sha256=None for a newly trained probe.
    """
    loaded = load_model(path, KIND)
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if sha256 is not None and found != sha256:
        raise CheckpointError(
            f"{path}: SHA-256 {found} is not the pinned {sha256}; restore the file, or pin the new "
            "one in dalle2_video/faces/probe.py"
        )
    config = {**loaded.config, "channels": tuple(loaded.config["channels"])}
    network = AttributeProbe(ProbeConfig(**config))
    load_weights(network, loaded)
    rules = json.loads(loaded.meta["light"])
    light = {name: LightRule(name, tuple(cuts)) for name, cuts in rules.items()}
    return Probe(network.eval().requires_grad_(False), light, found)


def targets_of(clips: Sequence[FaceAttributes]) -> dict[str, Tensor]:
    """True labels int64 (B,) of every attribute; UNDEFINED for the hair colour of bald heads.

    The captions of a clip name every attribute that is defined (faces/captions.py).
    """
    rows = [clip.labels() for clip in clips]
    return {name: torch.tensor([row[name] for row in rows]) for name in ATTRIBUTES}


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1]; `low` and `high` bound the mean's 95 % interval over clips.

    chance is the share of the most frequent value among the scored targets.
    """

    accuracy: dict[str, float]
    chance: dict[str, float]
    mean: float
    low: float
    high: float
    mean_chance: float
    clips: int


def score(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> Score:
    """Accuracies of labels int64 (B,), over the attributes in `predictions`.

    UNDEFINED targets do not count. The mean weighs attributes alike. Its interval is normal, with
    clips as the independent units (linearised ratio estimator: attributes of one clip are not
    independent). Raises ValueError where no target of an attribute counts.
    """
    accuracy, chance = {}, {}
    residual = torch.zeros(len(next(iter(predictions.values()))), dtype=torch.float64)
    for name, predicted in predictions.items():
        counted = targets[name] != UNDEFINED
        if not counted.any():
            raise ValueError(f"{name}: no clip to score")
        correct = (predicted == targets[name]).double()
        accuracy[name] = correct[counted].mean().item()
        chance[name] = (targets[name][counted].bincount().max() / counted.sum()).item()
        residual += counted * (correct - accuracy[name]) / counted.double().mean()
    mean = sum(accuracy.values()) / len(accuracy)
    count = len(residual)
    deviation = (residual / len(accuracy)).square().sum().div(max(1, count - 1)).sqrt().item()
    half = 1.96 * deviation / math.sqrt(count)
    return Score(
        accuracy, chance, mean, max(0.0, mean - half), min(1.0, mean + half),
        sum(chance.values()) / len(chance), count,
    )  # fmt: skip


def probe_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum over attributes of the mean cross-entropy; UNDEFINED targets do not count."""
    losses = [
        F.cross_entropy(logits[name], targets[name], ignore_index=UNDEFINED) for name in logits
    ]
    return torch.stack(losses).sum()
