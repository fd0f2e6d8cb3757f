"""Text to video in the unCLIP way: video CLIP, prior, and diffusion U-Nets in pixel space.

The public names below are imported at their first use, so `import dalle2_video` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle2_video.data.store.dataset import CelebVTextDataset
    from dalle2_video.models.clip_config import VideoCLIPConfig
    from dalle2_video.models.prior import Prior
    from dalle2_video.models.prior_config import PriorConfig
    from dalle2_video.models.unet3d import Unet3D
    from dalle2_video.models.unet_config import UnetConfig
    from dalle2_video.models.video_clip import VideoCLIP
    from dalle2_video.pipeline.cascade import Cascade
    from dalle2_video.pipeline.sampling_config import SampleConfig

__version__ = "0.1.0"
__all__ = [
    "Cascade",
    "CelebVTextDataset",
    "Prior",
    "PriorConfig",
    "SampleConfig",
    "Unet3D",
    "UnetConfig",
    "VideoCLIP",
    "VideoCLIPConfig",
    "__version__",
]
MODULES = {
    "Cascade": "pipeline.cascade",
    "CelebVTextDataset": "data.store.dataset",
    "Prior": "models.prior",
    "PriorConfig": "models.prior_config",
    "SampleConfig": "pipeline.sampling_config",
    "Unet3D": "models.unet3d",
    "UnetConfig": "models.unet_config",
    "VideoCLIP": "models.video_clip",
    "VideoCLIPConfig": "models.clip_config",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
