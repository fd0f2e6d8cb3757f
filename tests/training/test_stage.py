"""The train section checks its values, by the dotted key that a user typed."""

import pytest

from dalle2_video.config import ConfigError, from_config
from dalle2_video.training.config import TrainConfig
from tests.helpers.tiny_stage import tiny_config


def test_train_config_comes_from_its_section() -> None:
    assert from_config(TrainConfig, vars(tiny_config()), "clip.train") == tiny_config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr_schedule": "linear"}, r"clip\.train\.lr_schedule: must be .*constant.*cosine"),
        ({"batch_size": 0}, r"clip\.train\.batch_size: must be above 0, got 0"),
        ({"minutes": -1.0}, r"clip\.train\.minutes: must be above 0, got -1"),
        ({"warmup_clips": -1}, r"clip\.train\.warmup_clips: must be at least 0, got -1"),
        ({"betas": [0.9]}, r"clip\.train\.betas"),
    ],
)
def test_train_config_checks_its_values(change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        from_config(TrainConfig, vars(tiny_config()) | change, "clip.train")
