"""What a super-resolution U-Net is trained on: random crops of a clip, and its smaller clip.

B clips, F frames; a "size" is (frames, pixels of a side). Stored frames are uint8 (B, F, H, W, 3).
"""

from __future__ import annotations

from torch import Tensor

from dalle2_video import keyed
from dalle2_video.data.media.tensors import to_float
from dalle2_video.diffusion.lowres import cut
from dalle2_video.models.conditioning import LowRes
from dalle2_video.pipeline.super_resolution import Corner, SuperResolution
from dalle2_video.training.stage import StepInfo

Size = tuple[int, int]


def draw_corners(
    whole: Size, crop: Size, upscale: Size, seed: int, sample_ids: Tensor, stream: str
) -> list[Corner]:
    """Where each clip's crop begins, drawn evenly where the smaller clip has frames and pixels.

    upscale: factors over the smaller clip in frames and pixels, as `UnetConfig.upscale`.
    """
    frames, pixels = ((a - b) // by for a, b, by in zip(whole, crop, upscale, strict=True))
    corners = []
    for sample_id in sample_ids.tolist():
        draws = [
            keyed.key(seed, sample_id, f"{stream}/{axis}") for axis in ("frame", "row", "column")
        ]
        t, y, x = (draw % (n + 1) for draw, n in zip(draws, (frames, pixels, pixels), strict=True))
        corners.append((t * upscale[0], y * upscale[1], x * upscale[1]))
    return corners


def crop_of(frames: Tensor, whole: Size, corners: list[Corner], crop: Size) -> Tensor:
    """Stored frames, in a view of size `whole`, cut at the corners: float32 (B, 3, F, H, W)."""
    if whole == crop:
        return to_float(frames, *whole)
    # stored frames and pixels per one of the view
    t, s = frames.shape[1] // whole[0], frames.shape[2] // whole[1]
    stored = [(frame * t, row * s, column * s) for frame, row, column in corners]
    shape = crop[0] * t, crop[1] * s, crop[1] * s
    pieces = cut(frames.movedim(-1, 1), stored, shape)
    return to_float(pieces.movedim(1, -1), *crop)


def draw_lowres(
    frames: Tensor,
    task: SuperResolution,
    augmentation: tuple[float, float],
    corners: list[Corner],
    crop: Size,
    step: StepInfo,
    sample_ids: Tensor,
    stream: str,
) -> LowRes:
    """The network's input from the smaller clip of stored frames, with noise of a random level.

    The clip is shrunk by the resize that makes the training data of the networks before it;
    augmentation: log-SNRs between which the level is drawn evenly.
    """
    model = task.model
    assert model.num_lowres_frames is not None
    length = frames.shape[1]
    small = to_float(frames, min(length, model.num_lowres_frames), model.lowres_size)
    least, most = augmentation
    share = keyed.rand((), step.seed, sample_ids, f"{stream}/augmentation")
    log_snr = (least + (most - least) * share).to(step.device, non_blocking=True)
    noise = keyed.randn(small.shape[1:], step.seed, sample_ids, f"{stream}/low", step.device)
    return task.crops(task.augmented(small, log_snr, noise), log_snr, corners, crop)
