"""Train the prior: text -> video embedding. Needs `train_clip.py` with the same train_name.

    python train_prior.py train_name=run1
    accelerate launch --config_file configs/accelerate/zero3.yaml train_prior.py train_name=run1

The same command resumes. Every value of the configuration can be set on the command line (`--cfg
job` shows all).
"""

from omegaconf import DictConfig

from dalle2_video.cli import TRAINING, script


@script(*TRAINING, "prior")
def main(cfg: DictConfig) -> None:
    # here, not above: --help and a wrong key need none of it
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.stages.frozen_clip import load_conditions
    from dalle2_video.stages.prior import prior_stage
    from dalle2_video.stages.wiring import need_clip, run_config, store_of
    from dalle2_video.training.loop import train

    settings = settings_of(cfg)
    run = run_config(settings, cfg, "prior")
    need_clip(settings)
    conditions = load_conditions(
        settings.run_dir,
        store_of(settings),
        settings.seed,
        settings.prior.captions,
        load_frames=False,
        validation=settings.validation,
        include_images=settings.prior.images,
    )
    train(prior_stage(settings.prior, conditions, settings.seed), settings.prior.train, run)


if __name__ == "__main__":
    main()
