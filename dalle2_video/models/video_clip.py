"""Video CLIP: a ViViT video tower and an open_clip text tower in one embedding space.

A clip's text is a SET of lines. Its embedding is the normalised mean of the lines' normalised
embeddings; its states are the lines' token states one after the other, with no position across
lines. So the order of the lines does not matter, and no part of a line is cut off.

B clips, L line slots of a clip, U unique lines of the batch, T tokens of a line, N packed tokens
of a set, D embedding dimension, W width of the text tower; video is (B, 3, F, H, W).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_video.models.clip_config import (
    PretrainedTextConfig,
    VideoCLIPConfig,
)
from dalle2_video.models.text_tower import (
    LineFeatures,
    pretrained_tower,
    trained_tower,
    weights_sha256,
)
from dalle2_video.models.vivit import VideoTower

LOGIT_SCALE_INIT = math.log(1 / 0.07)  # Radford et al. 2021, section 2.5
LOGIT_SCALE_MAX = math.log(100.0)


@dataclass(frozen=True)
class TextEncoding:
    """embedding (B, D) float32, l2-normalised; states (B, N, W) of the tokens of all lines; place
    (B, N) int64, the place of each token in its line from 0 on, -1 = padding, whose state is 0.
    """

    embedding: Tensor
    states: Tensor
    place: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, N) bool: tokens, no padding."""
        return self.place >= 0


class ClipOutput(NamedTuple):
    """video, text (B, D) float32, l2-normalised; logit_scale (1,): the factor, exp already taken.

    A tuple, because the hooks of FSDP and ZeRO-3 find tensors in tuples but not in dataclasses.
    """

    video: Tensor
    text: Tensor
    logit_scale: Tensor


class VideoCLIP(nn.Module):
    """Both towers and the logit scale.

    `log_logit_scale` has shape (1,), since FSDP2 refuses parameters without a dimension. It is
    clamped to [0, log 100] where it is used.
    """

    def __init__(self, config: VideoCLIPConfig, load_pretrained: bool = True) -> None:
        super().__init__()
        self.video = VideoTower(config.video, config.embed_dim)
        if isinstance(config.text, PretrainedTextConfig):
            text = config.text
            self.text = pretrained_tower(text, config.embed_dim, text.frozen or load_pretrained)
            text = dataclasses.replace(text, sha256=text.sha256 or weights_sha256(self.text))
            config = dataclasses.replace(config, text=text)
        else:
            self.text = trained_tower(config.text, config.embed_dim)
        self.config = config  # with the pretrained tower's sha256 filled in
        self.log_logit_scale = nn.Parameter(torch.full((1,), LOGIT_SCALE_INIT))

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.config.embed_dim

    @property
    def text_width(self) -> int:
        """W, the width of `TextEncoding.states`."""
        return self.text.width

    @property
    def logit_scale(self) -> Tensor:
        """(1,): the factor on the cosines, in [1, 100]."""
        return self.log_logit_scale.clamp(0.0, LOGIT_SCALE_MAX).exp()

    def keeps(self, name: str) -> bool:
        """Whether our checkpoints hold this entry of the state: all but a frozen text tower."""
        return not (self.text.frozen and name.startswith("text."))

    def encode_video(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) float [-1, 1] -> (B, D) float32, l2-normalised."""
        return F.normalize(self.video(video), dim=-1)

    def encode_text(self, tokens: Tensor, line_index: Tensor) -> TextEncoding:
        """tokens (U, T) int64, each line once; line_index (B, L) int64 into U, -1 = no line.

        Raises ValueError where a clip has no line at all.
        """
        lines = self.text(tokens)
        return TextEncoding(
            set_embedding(lines.embedding, line_index), *pack_states(lines, line_index)
        )

    def forward(self, video: Tensor, tokens: Tensor, line_index: Tensor) -> ClipOutput:
        """Embeddings of a batch of clips and of their texts; states are not packed here."""
        text = set_embedding(self.text(tokens).embedding, line_index)
        return ClipOutput(self.encode_video(video), text, self.logit_scale)


def set_embedding(embedding: Tensor, line_index: Tensor) -> Tensor:
    """Line embeddings (U, D), line_index (B, L) -> (B, D): normalised mean of normalised lines."""
    present = line_index >= 0
    if not bool(present.any(dim=1).all()):
        empty = (~present.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"line_index: clips {empty} of the batch have no line of text")
    lines = F.normalize(embedding.float(), dim=-1)
    picked = lines[line_index.clamp(min=0)] * present.unsqueeze(-1)  # (B, L, D)
    return F.normalize(picked.sum(dim=1), dim=-1)  # the sum and the mean point the same way


def pack_states(lines: LineFeatures, line_index: Tensor) -> tuple[Tensor, Tensor]:
    """The states of each set's lines up to EOT, one after the other: (B, N, W), and each token's
    place in its line, int64 (B, N), -1 = padding.

    N is the number of tokens of the longest set of the batch.
    """
    states, length = lines.states, lines.length
    index = line_index.clamp(min=0)
    ends = (length[index] * (line_index >= 0)).cumsum(dim=1)  # (B, L), exclusive end of each slot
    n = int(ends[:, -1].max())
    position = torch.arange(n, device=index.device).expand(len(index), n).contiguous()
    mask = position < ends[:, -1:]
    slot = torch.searchsorted(ends, position, right=True).clamp(max=index.shape[1] - 1)
    line = index.gather(1, slot)  # (B, N)
    start = ends.gather(1, slot) - length[line]
    token = torch.where(mask, position - start, 0)
    return states[line, token] * mask.unsqueeze(-1), torch.where(mask, token, -1)
