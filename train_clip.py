"""Train the video CLIP, then embed every clip with it once. Needs `preprocess.py`.

    python train_clip.py train_name=run1
    python train_clip.py -m train_name=sweep clip.train.lr=1e-3,2e-3
    accelerate launch --config_file configs/accelerate/ddp.yaml train_clip.py train_name=run1

The same command resumes; `--cfg job` shows every value that the command line can set.
"""

from omegaconf import DictConfig

from dalle2_video.cli import TRAINING, script


@script(*TRAINING, "clip")
def main(cfg: DictConfig) -> None:
    # here, not above: --help and a wrong key need none of it
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.stages.embeddings import cache_embeddings
    from dalle2_video.stages.video_clip import clip_stage
    from dalle2_video.stages.wiring import run_config, store_of
    from dalle2_video.training.loop import train

    settings = settings_of(cfg)
    run = run_config(settings, cfg, "clip")
    store = store_of(settings)
    stage = clip_stage(settings.clip, store, settings.seed, settings.validation)
    train(stage, settings.clip.train, run)
    cache_embeddings(run.dir, store)


if __name__ == "__main__":
    main()
