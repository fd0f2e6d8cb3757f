"""Train a U-Net of the cascade. Needs `train_clip.py` with the same train_name.

    python train_decoder.py train_name=run1
    python train_decoder.py train_name=run1 unet=tsr      # frames between (ssr: pixels)
    accelerate launch --config_file configs/accelerate/zero3.yaml train_decoder.py train_name=run1

The same command resumes. Every value of the configuration can be set on the command line (`--cfg
job` shows all).
"""

from omegaconf import DictConfig

from dalle2_video.cli import TRAINING, script


@script(*TRAINING, "unet", "unets", "sample")
def main(cfg: DictConfig) -> None:
    # here, not above: --help and a wrong key need none of it
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.stages.frozen_clip import load_conditions
    from dalle2_video.stages.unet import unet_stage
    from dalle2_video.stages.wiring import need_clip, run_config, store_of
    from dalle2_video.training.loop import train

    settings = settings_of(cfg)
    name, section = settings.unet, settings.unets[settings.unet]
    run = run_config(settings, cfg, name)
    need_clip(settings)
    conditions = load_conditions(
        settings.run_dir,
        store_of(settings),
        settings.seed,
        section.captions,
        load_frames=True,
        validation=settings.validation,
        num_images=section.num_images,
    )
    sampling = settings.sample.of(name, section.model)
    train(unet_stage(name, section, conditions, sampling, settings.seed), section.train, run)


if __name__ == "__main__":
    main()
