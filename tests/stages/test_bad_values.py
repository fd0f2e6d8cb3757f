"""Values that nobody should set: each is refused in one line, or is fine as far as networks go."""

import copy
import functools
import random

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dalle2_video.cli import compose, quote_texts
from dalle2_video.failures import line_of
from dalle2_video.models.prior import Prior
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.video_clip import VideoCLIP
from dalle2_video.stages.config_tree import Settings, settings_of
from dalle2_video.training.accelerator import share_out

VALUES = ("0", "-1", "null", "word", "1000000000")
DRAWS = 200


def leaves(node, prefix: str = "") -> list[str]:
    """Dotted keys of all values of the composed configuration."""
    if not isinstance(node, dict):
        return [prefix]
    return [key for name in node for key in leaves(node[name], f"{prefix}.{name}".strip("."))]


def check(settings: Settings) -> None:
    """What a stage does before it reads data: its batches are shared out and its network is built,
    here without memory for the weights.
    """
    for section in (settings.clip, settings.prior, *settings.unets.values()):
        share_out(section.train, 1)
    with torch.device("meta"):
        clip = VideoCLIP(settings.clip.model.model_config())
        dims = clip.embed_dim, clip.text_width
        Prior(settings.prior.model, *dims)
        for section in settings.unets.values():
            Unet3D(section.model, *dims)
            _ = section.diffusion.schedule, section.crop_size
    for name, section in settings.unets.items():
        settings.sample.of(name, section.model).scale(torch.linspace(-10, 10, 5))


whole = functools.cache(compose)  # composing it again takes longer than checking it


def outcome(key: str, value: str) -> str | None:
    """The one line that refuses the value, or None. Any other error than one that scripts report as
    a line goes on.
    """
    try:
        (typed,) = quote_texts([f"{key}={value}"])
        cfg = copy.deepcopy(whole())
        OmegaConf.update(cfg, key, OverridesParser.create().parse_override(typed).value())
        check(settings_of(cfg))
    except Exception as error:
        line = line_of(error)
        if line is None or isinstance(error, HydraException | OmegaConfBaseException):
            raise AssertionError(f"{key}={value}: {type(error).__name__}") from error
        return line
    return None


def test_a_bad_value_is_refused_in_one_line_that_names_its_key() -> None:
    keys = leaves(OmegaConf.to_container(whole(), resolve=True))
    every = [(key, value) for key in keys for value in VALUES]
    assert len(keys) > 150
    refused = 0
    for key, value in random.Random(24).sample(every, DRAWS):
        line = outcome(key, value)
        if line is None:
            continue
        refused += 1
        assert "\n" not in line and len(line) < 400, line
        assert key.rsplit(".", 1)[-1] in line, f"{key}={value}: {line}"
    assert refused > DRAWS / 3


def test_the_values_of_the_issue() -> None:
    for key, value in (
        ("unets.base.model.channels", "1"),
        ("unets.base.model.dim", "1000000000"),
        ("clip.model.video.spatial_layers", "1000000000"),
        ("data.splits.val", "word"),
    ):
        assert outcome(key, value), key
