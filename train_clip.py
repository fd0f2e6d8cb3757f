"""Train the video CLIP, then embed every clip with it once. Needs `preprocess.py`.

    python train_clip.py train_name=run1
    accelerate launch --config_file configs/accelerate/ddp.yaml train_clip.py train_name=run1

The same command resumes; `--cfg job` shows every value that the command line can set.
"""

import hydra
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.errors import record

from dalle2_video.config import from_config
from dalle2_video.stages.video_clip import ClipSection, cache_embeddings, clip_stage
from dalle2_video.stages.wiring import run_config, store_of
from dalle2_video.training.loop import train


@hydra.main(version_base=None, config_path="configs", config_name="config")
@record  # so that the launcher names the rank that failed, and why
def main(cfg: DictConfig) -> None:
    section = from_config(ClipSection, cfg.clip, "clip")
    run = run_config(cfg, "clip")
    store = store_of(cfg)
    train(clip_stage(section, store, cfg.seed, cfg.validation), section.train, run)
    cache_embeddings(run.dir, store)


if __name__ == "__main__":
    main()
