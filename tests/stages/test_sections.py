"""The settings of a U-Net: what does not fit together is named."""

import dataclasses

import pytest

from dalle2_video.cli import compose
from dalle2_video.config import ConfigError
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.sections import CondDropout, UnetSection
from tests.helpers.lowres import SSR
from tests.helpers.runs import SMALL


@pytest.mark.parametrize(
    "override, message",
    [
        ("unets.ssr.crop=10", "crop 10 must be a multiple of 4"),
        ("unets.ssr.crop=64", "at most 32"),
        ("unets.tsr.crop_frames=3", "crop_frames 3 must be a multiple of 2"),
        ("unets.base.crop_frames=4", "crop_frames 4: the network needs the whole clip"),
        ("unets.base.crop=16", "crop 16: the network needs the whole clip"),
        (
            "unets.base.crop=16 unets.base.model.learned_variance=true",
            "crop 16: learned_variance needs the whole clip",
        ),
        ("unets.tsr.num_images=2", "num_images 2: a single frame has no frames between"),
        ("unets.tsr.augmentation=null", "augmentation belongs to"),
        ("unets.base.augmentation=[1,2]", "augmentation belongs to"),
        ("unets.tsr.augmentation=[3,2]", "augmentation must not fall"),
        ("unets.tsr.model.num_lowres_frames=3", "num_lowres_frames 3"),
        ("+sample.unets.tsr.stepz=2", "sample.unets.tsr.stepz: unknown key"),
        ("sample.unets.tsr.steps=0", "sample.unets.tsr.steps: must be at least 1, got 0"),
        ("+sample.unets.srr.steps=2", "sample.unets.srr: unets has only base, tsr, ssr"),
        ("+sample.unets.base.steps=2", "sample.unets.base: it makes clips of text"),
    ],
)
def test_settings_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(compose(*SMALL, *override.split()))


def test_images_that_cannot_be() -> None:
    for override, cause in (
        ("unets.base.num_images=-1", "num_images: must be at least 0, got -1"),
        ("unets.base.image_only_prob=0.5", "image_only_prob 0.5 needs num_images, which is 0"),
        ("unets.base.image_only_prob=2", "image_only_prob: must be at most 1, got 2"),
    ):
        with pytest.raises(ConfigError, match=cause):
            settings_of(compose(*SMALL, override))


def test_a_crop_holds_whole_pixels_of_the_smaller_clip_and_of_the_coarsest_level() -> None:
    """6 pixels here are one of the smaller clip, and 4 one of the coarsest level."""
    model = dataclasses.replace(SSR, image_size=24, lowres_size=4)
    for crop in (12, 24):
        UnetSection(model=model, augmentation=(1.0, 2.0), crop=crop)
    for crop in (4, 6, 8, 36):  # multiples of 4 or of 6 alone, too large, none
        with pytest.raises(ValueError, match=f"crop {crop} must be a multiple of 12, at most 24"):
            UnetSection(model=model, augmentation=(1.0, 2.0), crop=crop)


def test_a_crop_is_what_is_asked_for_or_the_whole_clip() -> None:
    whole = UnetSection(model=SSR, augmentation=(1.0, 2.0))
    assert whole.crop_size == (8, 16)
    assert dataclasses.replace(whole, crop_frames=4).crop_size == (4, 16)
    assert dataclasses.replace(whole, crop=8).crop_size == (8, 8)


@pytest.mark.parametrize("name", ["all", "embedding", "text"])
def test_rates_of_dropout_are_probabilities(name: str) -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"{name}\n.*than or equal to [01] "):
            CondDropout(**{name: value})
