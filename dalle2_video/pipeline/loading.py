"""Model files of a run -> networks, on the CPU, in eval mode, without gradients."""

from __future__ import annotations

from pathlib import Path

from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.model_file import LoadedModel, load_model, load_weights
from dalle2_video.models.clip_config import VideoCLIPConfig
from dalle2_video.models.prior import Prior
from dalle2_video.models.prior_config import PriorConfig
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.unet_config import UnetConfig
from dalle2_video.models.video_clip import VideoCLIP


def load_clip(path: Path) -> tuple[VideoCLIP, LoadedModel]:
    """The video CLIP of a run, on the CPU, in eval mode; CheckpointError names file and cause."""
    loaded = load_model(path, "clip")
    clip = VideoCLIP(VideoCLIPConfig.from_dict(loaded.config), load_pretrained=False)
    load_weights(clip, loaded, optional=lambda name: not clip.keeps(name))
    return clip.eval().requires_grad_(False), loaded


def load_prior(path: Path) -> tuple[Prior, DiffusionConfig, LoadedModel]:
    """The prior of a run with its diffusion settings, on the CPU, in eval mode."""
    loaded = load_model(path, "prior")
    config = loaded.config
    prior = Prior(PriorConfig(**config["model"]), config["embedding_dim"], config["text_dim"])
    load_weights(prior, loaded)
    return prior.eval().requires_grad_(False), DiffusionConfig(**config["diffusion"]), loaded


def load_unet(path: Path, name: str) -> tuple[Unet3D, DiffusionConfig, LoadedModel]:
    """A U-Net of a run with its diffusion settings, on the CPU, in eval mode."""
    loaded = load_model(path, name)
    config = loaded.config
    unet = Unet3D(UnetConfig(**config["model"]), config["embedding_dim"], config["text_dim"])
    load_weights(unet, loaded)
    return unet.eval().requires_grad_(False), DiffusionConfig(**config["diffusion"]), loaded
