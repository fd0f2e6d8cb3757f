"""Every network computes what it did when the first checkpoints were written.

Parameters and inputs are closed forms; a parameter's values follow from its name in files of
weights. So an edit that a checkpoint from before would feel, such as another order of sines and
cosines or of concatenated parts, changes an output here.
"""

import dataclasses
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_video.data.sources.captions import tokenize
from dalle2_video.models.clip_config import TrainedTextConfig, VideoCLIPConfig, VideoTowerConfig
from dalle2_video.models.conditioning import Condition, LowRes
from dalle2_video.models.prior import Prior
from dalle2_video.models.prior_config import PriorConfig
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.video_clip import VideoCLIP
from tests.helpers.lowres import BOTH
from tests.helpers.networks import EXAMPLES, SMALL, filled, waves


def condition(batch: int) -> Condition:
    """Two lines of text each; the first item has no embedding, the second no text."""
    place = torch.tensor([0, 1, 2, 0, 1]).repeat(batch, 1)
    place[-1, 3:] = -1
    embedding = F.normalize(waves(batch, 24, phase=3.0) + 0.5, dim=-1)
    whole = F.normalize(waves(batch, 24, phase=4.0), dim=-1)
    given = Condition.of(embedding, waves(batch, 5, 12, phase=5.0), place, whole)
    index = torch.arange(batch)
    return given._replace(keep_embedding=index != 0, keep_text=index != 1)


def base() -> Tensor:
    """2 clips of 14 frames, self-conditioned, 2 images beside each, with a learned variance."""
    model = dataclasses.replace(SMALL, num_frames=14, self_condition=True, learned_variance=True)
    net = Unet3D(model, 24, 12)
    net.condition.fit(EXAMPLES)
    z, x0_prev = waves(2, 3, 16, 16, 16), waves(2, 3, 16, 16, 16, phase=6.0)
    return filled(net)(z, torch.linspace(-7, 8, 6), condition(6), 2, x0_prev)


def super_resolution() -> Tensor:
    """3 tiles of 8 frames in a longer clip, from half the frames and pixels."""
    net = Unet3D(BOTH, 24, 12)
    net.condition.fit(EXAMPLES)
    place = torch.arange(8) + torch.tensor([[0.0], [8.0], [12.0]])
    lowres = LowRes(waves(3, 6, 8, 16, 16, phase=7.0), torch.tensor([1.0, 9.0, 4.0]), place)
    z, log_snr = waves(3, 3, 8, 16, 16), torch.tensor([-3.0, 6.0, 1.0])
    return filled(net)(z, log_snr, condition(3), lowres=lowres)


def prior() -> Tensor:
    """3 texts, the second of them dropped, with 2 noised embeddings each."""
    net = Prior(PriorConfig(width=32, layers=2, heads=2), 24, 12)
    net.fit(EXAMPLES)
    given = condition(3)
    mask = given.text_place >= 0
    texts = given.text, mask, given.text_embedding, given.keep_text
    return filled(net)(waves(3, 2, 24, phase=8.0), torch.linspace(-5, 5, 6).view(3, 2), *texts)


def clip(embedding: Literal["linear", "conv"] = "linear") -> VideoCLIP:
    video = VideoTowerConfig(16, 4, (8, 8), 2, 32, 2, 2, 2, embedding=embedding)
    return filled(VideoCLIP(VideoCLIPConfig(24, video, TrainedTextConfig(32, 2, 2))))


def text_tower() -> Tensor:
    """Embeddings and states of two texts."""
    packed = tokenize([["a man nods", "warm light"], ["the woman turns left, then smiles"]])
    text = clip().encode_text(packed.tokens, packed.line_index)
    return torch.cat([text.embedding.flatten(), text.states.flatten()])


NETWORKS = {
    "base": base,
    "super_resolution": super_resolution,
    "prior": prior,
    "text_tower": text_tower,
    "linear_tubelets": lambda: clip().encode_video(waves(3, 3, 4, 16, 16)),
    "conv_tubelets": lambda: clip("conv").encode_video(waves(3, 3, 4, 16, 16)),
}
# the root mean square of the outputs, then their cosines to four waves
NUMBERS = {
    "base": [1.165451, -0.000679, -0.002842, -0.002391, 0.000258],
    "super_resolution": [0.758811, -0.000623, -0.006084, -0.005981, -0.000347],
    "prior": [1.059309, 0.10387, 0.151212, 0.052101, -0.086643],
    "text_tower": [1.013424, 0.041448, 0.012796, -0.028061, -0.042617],
    "linear_tubelets": [0.204124, 0.032596, -0.048843, -0.080737, -0.042783],
    "conv_tubelets": [0.204124, -0.024886, -0.029637, -0.006216, 0.021785],
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_computes_what_it_did_when_checkpoints_were_written(name: str) -> None:
    out = NETWORKS[name]().double().flatten()
    others = [waves(len(out), phase=10.0 + k).double() for k in range(4)]
    cosines = [float(F.cosine_similarity(out, other, dim=0)) for other in others]
    found = [float(out.square().mean().sqrt()), *cosines]
    assert found == pytest.approx(NUMBERS[name], abs=2e-5)
