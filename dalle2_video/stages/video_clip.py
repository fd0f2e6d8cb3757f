"""Training of the video CLIP: its section of the configuration, its objective and its Stage.

The loss (contrastive.py) compares the clips of all ranks. Gradient accumulation is refused, since a
micro-batch would see its own negatives only: the loss would be that of a smaller batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dalle2_video import keyed
from dalle2_video.config import ConfigError
from dalle2_video.data.media.tensors import has_view, to_float
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions
from dalle2_video.data.store.dataset import Batch, CelebVTextDataset
from dalle2_video.data.store.store import ClipStore
from dalle2_video.evaluation.retrieval import Retrieval, retrieval
from dalle2_video.models.video_clip import VideoCLIP
from dalle2_video.stages.contrastive import caption_ids, contrastive_loss
from dalle2_video.stages.embeddings import over_split
from dalle2_video.stages.sections import ClipSection
from dalle2_video.training.accelerator import process_state
from dalle2_video.training.config import TrainConfig
from dalle2_video.training.stage import Loss, Stage, StepInfo


def objective(
    model: nn.Module, batch: Batch, step: StepInfo, view: tuple[int, int] | None = None
) -> Loss:
    """The Stage's objective: one forward pass of the (perhaps wrapped) VideoCLIP.

    view: frames and size that the network takes, as `to_float` has them; None = all.
    """
    if step.accelerator.gradient_accumulation_steps > 1:
        raise ConfigError(NO_ACCUMULATION)
    assert batch.frames is not None
    output = model(to_float(batch.frames, *view or ()), batch.tokens, batch.line_index)
    return contrastive_loss(output, caption_ids(batch.captions).to(output.video.device))


NO_ACCUMULATION = (
    "clip.train.micro_batch_size: the video CLIP cannot accumulate gradients: its loss compares "
    "every clip of the batch with every other, and micro-batches would not see each other. "
    "Set it to null (batch_size / ranks), lower clip.train.batch_size or use more ranks"
)


def refuse_accumulation(train: TrainConfig, world: int) -> None:
    """ConfigError where a step would take more than one micro-batch per rank."""
    micro = train.micro_batch_size
    if micro is not None and micro * world != train.batch_size:
        raise ConfigError(NO_ACCUMULATION)


@torch.no_grad()
def judge(
    model: nn.Module, dataset: CelebVTextDataset, view: tuple[int, int] | None = None
) -> Retrieval:
    """Retrieval over the whole split, each clip with one line of every category."""

    def embed(batch: Batch) -> Tensor:
        assert batch.frames is not None
        output = model(to_float(batch.frames, *view or ()), batch.tokens, batch.line_index)
        return torch.stack([output.video, output.text], dim=1)

    video, text = over_split(embed, dataset).unbind(1)
    return retrieval(video, text)


def clip_stage(section: ClipSection, store: ClipStore, seed: int, validation: str = "val") -> Stage:
    """The stage "clip"; validation is retrieval over all of that split.

    A video tower of fewer frames or pixels than the stored clips sees a view of them. Raises
    ConfigError where they are no multiple of its, or with accumulation.
    """
    refuse_accumulation(section.train, process_state().num_processes)
    data, video = store.settings, section.model.video
    view = video.num_frames, video.image_size
    if not has_view(data.num_frames, data.size, *view):
        raise ConfigError(
            f"clip.model.video takes {video.num_frames} frames of {video.image_size} px, the clips "
            f"in {store.root} have {data.num_frames} frames of {data.size} px"
        )
    torch.manual_seed(keyed.key(seed, 0, "clip/init"))
    model = VideoCLIP(section.model.model_config())
    policy = EvaluationCaptions()
    val_set = CelebVTextDataset(store, validation, seed, policy, first_windows=True)
    return Stage(
        name="clip",
        model=model,
        objective=partial(objective, view=view),
        train_set=CelebVTextDataset(
            store,
            "train",
            seed,
            TrainingCaptions(section.captions),
            include_images=section.images,
        ),
        val_set=val_set,
        validate=lambda m, accelerator: judge(m, val_set, view).metrics(),
        config=model.config.to_dict(),
        meta={"fps": str(data.view_fps(video.num_frames))},
        state_filter=model.keeps,
    )
