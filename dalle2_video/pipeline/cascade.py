"""Text to video: text tower -> prior -> base U-Net -> super-resolution, with one run's checkpoints.

B clips, F frames, H W, D embedding dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle2_video.config import ConfigError
from dalle2_video.data.atomic import read_text
from dalle2_video.data.media.tensors import has_view, to_float, to_uint8
from dalle2_video.data.sources.captions import pack_lines, text_to_lines, to_line
from dalle2_video.diffusion.config import DiffusionConfig
from dalle2_video.model_file import CheckpointError, file_hash
from dalle2_video.models.conditioning import Condition
from dalle2_video.models.prior import Prior
from dalle2_video.models.unet3d import Unet3D
from dalle2_video.models.video_clip import TextEncoding, VideoCLIP
from dalle2_video.pipeline.loading import load_clip, load_prior, load_unet
from dalle2_video.pipeline.sampling import sample_clips, sample_embeddings
from dalle2_video.pipeline.sampling_config import SampleConfig

Progress = Callable[[str], None]  # takes the name of the U-Net that has made a sampler step


def read_texts(text: str | Sequence[str] | None, file: str | None, num_samples: int) -> list[str]:
    """The texts to sample, each `num_samples` times. ConfigError where there is none, or both."""
    if (text is None) == (file is None):
        raise ConfigError('give either text="..." or file=<a text file, one text per line>')
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if file is None:
        texts = [text if isinstance(text, str) else "\n".join(text or [])]
    else:
        texts = [line.strip() for line in read_text(file).splitlines()]
        texts = [line for line in texts if line]
    if not any(one.strip() for one in texts):
        raise ConfigError(f"{file or 'text'}: empty, there is nothing to sample")
    return [one for one in texts for _ in range(num_samples)]


@dataclass(frozen=True)
class CascadeUnet:
    """One U-Net of a cascade; fps: of the clips that it makes."""

    name: str
    network: Unet3D
    diffusion: DiffusionConfig
    fps: float


@contextmanager
def sampling_bar(steps: int, disable: bool = False) -> Iterator[Progress]:
    """A progress bar that names the U-Net at work; yields the callback that `sample` takes."""
    with tqdm(total=steps, unit="step", disable=disable) as bar:

        def progress(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield progress


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module is on the device inside, and on the CPU again after it."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


class Cascade:
    """The networks of one run, checked to belong together, ready to sample.

    They stay on the CPU; each is on the device while it is at work, one after the other.
    """

    def __init__(
        self,
        video_clip: VideoCLIP,
        prior: tuple[Prior, DiffusionConfig],
        unets: Sequence[CascadeUnet],
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
    ) -> None:
        check_chain(unets)
        self.device = torch.device(device)
        self.video_clip, (self.prior, self.prior_diffusion) = video_clip, prior
        self.unets = list(unets)
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: torch.device | str = "cpu",
        precision: Literal["no", "bf16", "fp16"] = "no",
        order: Sequence[str] = ("base",),
    ) -> Cascade:
        """The EMA weights of runs/<name>/{clip,prior,...}/model.safetensors; order: the U-Nets.

        Raises CheckpointError where a file is missing or damaged, where a stage was trained on
        another CLIP than the one in the run, or where a U-Net does not take what the one before it
        makes.
        """
        run_dir = Path(run_dir)
        if not run_dir.is_dir():
            runs = [path.name for path in sorted(run_dir.parent.glob("*")) if path.is_dir()]
            raise CheckpointError(
                f"{run_dir}: no such run; {run_dir.parent} has {', '.join(runs) or 'none'}"
            )
        clip_path = run_dir / "clip" / "model.safetensors"
        video_clip, _ = load_clip(clip_path)
        prior, prior_diffusion, prior_file = load_prior(run_dir / "prior" / "model.safetensors")
        files, unets = [prior_file], []
        for name in order:
            network, diffusion, file = load_unet(run_dir / name / "model.safetensors", name)
            unets.append(CascadeUnet(name, network, diffusion, file.config["fps"]))
            files.append(file)
        clip_hash = file_hash(clip_path)
        for file in files:
            if file.meta.get("clip_hash") != clip_hash:
                raise CheckpointError(
                    f"{file.path}: trained on the CLIP {file.meta.get('clip_hash')}, but "
                    f"{clip_path} is {clip_hash}; train this stage again"
                )
        return cls(video_clip, (prior, prior_diffusion), unets, device, precision)

    @property
    def fps(self) -> float:
        """Frames per second of the clips that `sample` returns."""
        return self.unets[-1].fps

    @torch.no_grad()
    def encode(self, texts: Sequence[str | Sequence[str]]) -> TextEncoding:
        """Texts, each one string (taken apart at sentences) or a list of lines, as tensors on the
        device. CaptionError where one is empty.
        """
        with placed(self.video_clip, self.device):
            return self._encode(texts)

    def _encode(self, texts: Sequence[str | Sequence[str]]) -> TextEncoding:
        sets = [[to_line(line) for line in text_to_lines(text)] for text in texts]
        packed = pack_lines(sets)
        return self.video_clip.encode_text(
            packed.tokens.to(self.device), packed.line_index.to(self.device)
        )

    def sample(
        self,
        texts: Sequence[str | Sequence[str]],
        config: SampleConfig,
        first: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """One clip per text from the whole cascade: uint8 RGB (B, F, H, W, 3) on the CPU.

        Clip i is keyed by (config.seed, first + i), see `sample_all`.
        """
        sample_ids = range(first, first + len(texts))
        return self.sample_all(texts, config, sample_ids, progress)[self.unets[-1].name]

    @torch.no_grad()
    def sample_all(
        self,
        texts: Sequence[str | Sequence[str]],
        config: SampleConfig,
        sample_ids: Sequence[int] | None = None,
        progress: Progress | None = None,
        last: str | None = None,
    ) -> dict[str, Tensor]:
        """One clip per text from every U-Net, by its name: uint8 RGB (B, F, H, W, 3) on the CPU.

        The clip of text i is keyed by (config.seed, sample_ids[i]), by default i. Of several
        candidates the first U-Net whose clips the CLIP can see makes them all, and the nearest to
        the text goes on. last: the U-Net to stop after. progress is called after each sampler step
        of a batch, `num_sampler_steps` times in all. ValueError where there are candidates and the
        CLIP can see none of the clips.
        """
        names = [unet.name for unet in self.unets]
        unets = self.unets[: names.index(last) + 1] if last else self.unets
        if not texts:  # more processes than texts
            return {unet.name: torch.empty(0, dtype=torch.uint8) for unet in unets}
        judge, many = self._judge(config, last)
        sample_ids = range(len(texts)) if sample_ids is None else sample_ids
        ids = torch.tensor([many * i + candidate for i in sample_ids for candidate in range(many)])
        condition = self._condition([t for t in texts for _ in range(many)], ids, config)
        made: dict[str, Tensor] = {}
        lowres: Tensor | None = None
        for unet in unets:
            lowres = self._sample_unet(unet, condition, ids, lowres, config, progress)
            made[unet.name] = lowres
            if unet.name == judge:
                kept = self.nearest(lowres, condition.text_embedding, many)
                condition, ids, lowres = condition.rows(kept), ids[kept], lowres[kept]
                made = {name: clips[kept] for name, clips in made.items()}
        return made

    def _condition(
        self, texts: Sequence[str | Sequence[str]], sample_ids: Tensor, config: SampleConfig
    ) -> Condition:
        """The texts and the embeddings that the prior draws for them, on the CPU."""
        size = config.batch_size
        with placed(self.video_clip, self.device):  # in float32, as in training
            encoded = [self._encode(texts[i : i + size]) for i in range(0, len(texts), size)]
        parts = []
        with placed(self.prior, self.device):
            for text, keys in zip(encoded, sample_ids.split(size), strict=True):
                with self._autocast():
                    embedding = sample_embeddings(
                        self.prior, self.prior.whiten, self.prior_diffusion, text, keys, config
                    )
                part = Condition.of(embedding, text.states, text.place, text.embedding)
                parts.append(part.to("cpu"))
        return reduce(Condition.cat, parts)

    def _sample_unet(
        self,
        unet: CascadeUnet,
        condition: Condition,
        sample_ids: Tensor,
        lowres: Tensor | None,
        config: SampleConfig,
        progress: Progress | None,
    ) -> Tensor:
        """The clips of one U-Net: uint8 (B, F, H, W, 3) on the CPU; lowres: the one's before it."""
        model = unet.network.config
        how, clips = config.of(unet.name, model), []
        with placed(unet.network, self.device):
            for rows in torch.arange(len(sample_ids)).split(how.batch_size):
                with self._autocast():
                    video = sample_clips(
                        unet.network,
                        model,
                        unet.diffusion,
                        condition.rows(rows).to(self.device),
                        sample_ids[rows],
                        how,
                        config.seed,
                        None if lowres is None else to_float(lowres[rows].to(self.device)),
                        None if progress is None else lambda: progress(unet.name),
                        "sample" if lowres is None else f"sample/{unet.name}",
                    )
                clips.append(to_uint8(video).cpu())
        return torch.cat(clips)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def judge(self) -> str:
        """The first U-Net whose clips the CLIP can see; ValueError where there is none."""
        video, frames = self.video_clip.config.video, 0
        for unet in self.unets:
            model = unet.network.config
            frames = frames * model.upscale[0] if frames else model.num_frames
            if has_view(frames, model.image_size, video.num_frames, video.image_size):
                return unet.name
        raise ConfigError(
            f"candidates: the video CLIP sees {video.num_frames} frames of {video.image_size} px, "
            "which no clip of the cascade can show it"
        )

    def _judge(self, config: SampleConfig, last: str | None) -> tuple[str | None, int]:
        """The U-Net after which one clip is chosen, and of how many; (None, 1): nowhere."""
        if config.candidates == 1:
            return None, 1
        names, judge = [unet.name for unet in self.unets], self.judge
        reached = last is None or names.index(judge) <= names.index(last)
        return (judge, config.candidates) if reached else (None, 1)

    def nearest(self, clips: Tensor, text: Tensor, many: int) -> Tensor:
        """Of each `many` clips, uint8 (B, F, H, W, 3), the index of the one whose embedding is
        nearest to that of its text, (B, D); int64 (B / many,).
        """
        video, scores = self.video_clip.config.video, []
        with placed(self.video_clip, self.device):
            for frames, target in zip(clips.split(32), text.split(32), strict=True):
                view = to_float(frames.to(self.device), video.num_frames, video.image_size)
                embedding = self.video_clip.encode_video(view)
                scores.append((embedding * target.to(self.device)).sum(1).cpu())
        best = torch.cat(scores).unflatten(0, (-1, many)).argmax(1)
        return torch.arange(len(best)) * many + best

    def num_sampler_steps(self, texts: int, config: SampleConfig, last: str | None = None) -> int:
        """How often `sample_all` calls `progress`."""
        steps, (judge, many) = 0, self._judge(config, last)
        for unet in self.unets:
            how = config.of(unet.name, unet.network.config)
            steps += -(-texts * many // how.batch_size) * how.steps
            if unet.name == judge:
                many = 1
            if unet.name == last:
                break
        return steps


def check_chain(unets: Sequence[CascadeUnet]) -> None:
    """CheckpointError where a U-Net does not take what the one before it makes."""
    if not unets:
        raise CheckpointError("a cascade needs a U-Net, such as cascade=[base]")
    first = unets[0]
    if first.network.config.lowres_copies:
        raise CheckpointError(
            f"cascade: {first.name!r} is a super-resolution U-Net and cannot come first; put a "
            "U-Net such as 'base' before it"
        )
    for before, after in pairwise(unets):
        made, takes = before.network.config, after.network.config
        if not takes.lowres_copies:
            raise CheckpointError(f"cascade: {after.name!r} makes clips of text, so it comes first")
        lowres_fps = after.fps / takes.upscale[0]
        if made.image_size != takes.lowres_size or not math.isclose(before.fps, lowres_fps):
            raise CheckpointError(
                f"cascade: {after.name!r} was trained on clips of {takes.lowres_size} px at "
                f"{lowres_fps:g} frames per second, but {before.name!r} makes {made.image_size} px "
                f"at {before.fps:g}"
            )
