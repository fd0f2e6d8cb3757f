"""A run of the tiny stage that takes its time, to be signalled, killed, and started again.

    python -m tests.helpers.tiny_run FOLDER SECONDS_PER_STEP [key=value of TrainConfig ...]

Also under `accelerate launch`. fault=die|hang|data lets rank 1 die, hang, or miss a file at
clip 64.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from dalle2_video.data.store.shard import StoreError
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from tests.helpers.tiny_stage import objective, tiny_config, tiny_stage


@record
def main() -> None:
    folder, pause, *changes = sys.argv[1:]
    values = dict(change.split("=") for change in changes)
    fault = values.pop("fault", None)
    minutes = float(values.pop("timeout_minutes", 30))
    torch.set_num_threads(1)

    def slow(model, batch, step):
        time.sleep(float(pause))
        if fault and int(os.environ["RANK"]) == 1 and step.first == 64:
            if fault == "die":
                os.kill(os.getpid(), 9)
            if fault == "data":
                raise StoreError("videos/7.h5 cannot be read")
            time.sleep(600)
        return objective(model, batch, step)

    numbers = {name: int(v) if v.isdigit() else v for name, v in values.items()}
    cfg = tiny_config(**{"clips": 800} | numbers)
    run = RunConfig(str(Path(folder)), seed=3, timeout_minutes=minutes)
    train(tiny_stage(objective=slow), cfg, run)


if __name__ == "__main__":
    main()
