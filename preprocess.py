"""Turn archives of captioned clips into the store that every stage trains on.

    python preprocess.py                                   the embedded faces, rendered at first
    python preprocess.py experiment=own data.root=my_videos           own videos, texts beside them
    python preprocess.py experiment=celebvtext data.root=/data/CelebV-Text
    python preprocess.py experiment=celebvtext data.root=... data.out=/fast data.workers=16
    python preprocess.py experiment=celebvtext data.root=... part=3 parts=10     every tenth archive
    python preprocess.py check=true                        reads the store back, draws a sheet

data.root holds own videos with captions (docs/data.md), or zips, tars or folders of CelebV-Text; it
is only read. The same command continues after a stop and adds what came since. What was left out,
and why, is in <data.out>/manifest.json.
"""

from omegaconf import DictConfig

from dalle2_video.cli import command_like_this, script


@script("part", "parts", "check", "faces", "data")
def main(cfg: DictConfig) -> None:
    # Worker processes import this file: what they do not need is imported here, not above.
    from dalle2_video.data.preprocess.check import check_store
    from dalle2_video.data.preprocess.run import preprocess
    from dalle2_video.data.store.store import open_store
    from dalle2_video.stages.config_tree import settings_of
    from dalle2_video.stages.wiring import render_faces

    settings = settings_of(cfg)
    if settings.check:
        report = check_store(settings.data)
        print(report)
        raise SystemExit(1 if report.problems else 0)
    render_faces(settings)
    summary = preprocess(settings.data, part=settings.part, parts=settings.parts)
    print(summary)
    summary.raise_if_empty()
    if settings.parts > 1:
        return
    store = open_store(settings.data)
    print("splits: " + ", ".join(map(store.describe, store.splits)))
    for warning in store.warnings:
        print(f"warning: {warning}")
    print(f"next: {command_like_this('train_clip.py', 'train_name=run1')}")


if __name__ == "__main__":
    main()
