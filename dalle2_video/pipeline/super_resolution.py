"""Super-resolution as training and sampling share it: one class between pixels and the network.

Ho et al. Oct 2022 (2210.02303); the smaller clip is called lowres. With `UnetConfig.residual` what
is diffused is the difference to that clip, resized and blended (Li et al. 2021, SRDiff, 2104.14951,
section 3). A U-Net that makes clips of a text uses `TextToClip`, which has the same methods.

B clips, C channels, F H W of the larger clip, f h w of the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2_video.diffusion.lowres import augment, blend, cut, fit, known_frames
from dalle2_video.models.conditioning import LowRes
from dalle2_video.models.unet_config import UnetConfig

Corner = tuple[int, int, int]  # frame, row, column


@dataclass(frozen=True)
class SuperResolution:
    """What a super-resolution U-Net of configuration `model` is given, and what it diffuses."""

    model: UnetConfig

    # ---- the network's input

    def augmented(self, lowres: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
        """The smaller clip with noise of log-SNR (B,), all (B, C, f, h, w)."""
        return augment(lowres, log_snr, noise)

    def crops(
        self, noisy: Tensor, log_snr: Tensor, corners: list[Corner], crop: tuple[int, int]
    ) -> LowRes:
        """The input of crops (frames, pixels of a side) of the larger clips at these corners."""
        frames, side = crop
        fitted = cut(fit(noisy, self.model.upscale), corners, (frames, side, side))
        index = torch.arange(frames, device=noisy.device)
        first = torch.tensor([corner[0] for corner in corners]).to(noisy.device, non_blocking=True)
        return LowRes(fitted, log_snr, (first[:, None] + index).float())

    def stretch(self, noisy: Tensor, log_snr: Tensor, part: slice) -> LowRes:
        """The input of some frames of the larger clips, beginning at a known one.

        Places are scaled to the length that the network was trained on.
        """
        length = noisy.shape[2] * self.model.upscale[0]
        first, end, _ = part.indices(length)
        fitted = fit(noisy, self.model.upscale, first, end - first)
        index = torch.arange(first, end, device=noisy.device)
        place = (index * (self.model.num_frames / length)).expand(len(noisy), -1)
        return LowRes(fitted, log_snr, place)

    # ---- what is diffused

    def guess(self, lowres: LowRes) -> Tensor:
        """The larger clip (B, C, F, H, W) as far as the smaller one alone determines it."""
        return blend(lowres.frames, lowres.log_snr, self.model.upscale)

    def to_target(self, x0: Tensor, lowres: LowRes | None) -> Tensor:
        """Pixels -> what is diffused."""
        assert lowres is not None
        scale = self.model.residual
        return (x0 - self.guess(lowres)) / scale if scale else x0

    def to_pixels(self, x: Tensor, lowres: LowRes | None) -> Tensor:
        """What is diffused -> pixels."""
        assert lowres is not None
        scale = self.model.residual
        return scale * x + self.guess(lowres) if scale else x

    # ---- frames that are known

    def known(self, frames: int, device: torch.device) -> Tensor | None:
        """bool (F,): frames that the larger clip takes over as they are; None where none is."""
        return known_frames(frames, self.model.upscale, device) if self.has_known else None

    @property
    def has_known(self) -> bool:
        """Whether it makes frames between known ones, of the same pixels."""
        return self.model.upscale[0] > 1 and self.model.upscale[1] == 1

    def put_known(self, x0: Tensor, lowres: Tensor, part: slice) -> None:
        """Write the known frames, if any, of a part of the clips into x0 (B, C, F, H, W)."""
        if self.has_known:
            r = self.model.upscale[0]
            first, end, _ = part.indices(lowres.shape[2] * r)
            x0[:, :, ::r] = lowres[:, :, first // r : end // r]


@dataclass(frozen=True)
class TextToClip:
    """A U-Net without a smaller clip: it diffuses the pixels themselves."""

    model: UnetConfig

    def to_target(self, x0: Tensor, lowres: LowRes | None) -> Tensor:
        """Pixels -> what is diffused: the same."""
        return x0

    def to_pixels(self, x: Tensor, lowres: LowRes | None) -> Tensor:
        """What is diffused -> pixels: the same."""
        return x

    def known(self, frames: int, device: torch.device) -> Tensor | None:
        """No frame is known."""
        return None


def diffused_by(model: UnetConfig) -> SuperResolution | TextToClip:
    """What a U-Net of this configuration diffuses."""
    return SuperResolution(model) if model.lowres_copies else TextToClip(model)
