"""How far a run is, and when a log line, a validation or a checkpoint is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dalle2_video.training.config import TrainConfig


@dataclass
class Progress:
    """How far a run is: clips seen (the position in the data too), optimizer steps made, those of
    them that were skipped (loss or gradient not finite), seconds spent."""

    clips: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def fraction(self, cfg: TrainConfig) -> float:
        """The share of the run that is done, by clips, or by time where there is a budget."""
        if cfg.minutes is not None:
            return self.seconds / (60.0 * cfg.minutes)
        return self.clips / cfg.clips

    def seconds_left(self, cfg: TrainConfig, clips_per_second: float) -> float:
        """Until the end of the run; infinite where the speed is 0."""
        if cfg.minutes is not None:
            return 60.0 * cfg.minutes - self.seconds
        return (cfg.clips - self.clips) / clips_per_second if clips_per_second else math.inf

    def due(self, cfg: TrainConfig, every_clips: int | None) -> bool:
        """Whether the last optimizer step crossed a multiple of `every_clips`, or ended the run."""
        if self.fraction(cfg) >= 1.0:
            return True
        before = self.clips - cfg.batch_size
        return every_clips is not None and self.clips // every_clips > before // every_clips
