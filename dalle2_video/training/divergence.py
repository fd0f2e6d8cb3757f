"""The end of a run whose loss or gradient stays not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from dalle2_video.errors import UserError

MAX_SKIPPED_IN_A_ROW = 3
MAX_OVERFLOWS_IN_A_ROW = 50  # fp16 halves its scale from 2^16 down, so some at the start are normal


class TrainingDiverged(UserError, RuntimeError):  # noqa: N818
    """Loss or gradient were not finite for several optimizer steps in a row."""


class DivergenceCheck:
    """Counts the optimizer steps in a row that were skipped, and ends the run at too many.

    newest_checkpoint: what the error advises to go back to.
    """

    def __init__(self, stage: str, fp16: bool, newest_checkpoint: Callable[[], Path | None]):
        self.stage, self.fp16, self.newest_checkpoint = stage, fp16, newest_checkpoint
        self.skipped_in_a_row = 0

    def note(self, applied: bool, clips: int, values: Mapping[str, float]) -> None:
        """One more optimizer step, up to clip `clips`; values: its "loss" and "grad_norm".

        Raises TrainingDiverged after 3 skipped steps in a row; after 50 where fp16 overflows, which
        shows in a gradient that is not finite beside a loss that is.
        """
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        overflow = self.fp16 and math.isfinite(values["loss"])
        if self.skipped_in_a_row < (MAX_OVERFLOWS_IN_A_ROW if overflow else MAX_SKIPPED_IN_A_ROW):
            return
        good = self.newest_checkpoint()
        back = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"{self.stage}: not finite in {self.skipped_in_a_row} steps in a row, "
            f"up to clip {clips} (the last: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}); {back}. Lower lr, or train with mixed_precision=bf16 or no"
        )
