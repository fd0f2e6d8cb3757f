"""Training of the video CLIP: the loss, several ranks, refusals, the script and its cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from dalle2_video.cli import compose
from dalle2_video.config import ConfigError
from dalle2_video.data.atomic import write_json
from dalle2_video.data.config import CaptionPolicy, StoreSettings
from dalle2_video.data.media.tensors import to_float
from dalle2_video.data.sources.captions import EvaluationCaptions, TrainingCaptions, to_line
from dalle2_video.data.store.dataset import CelebVTextDataset
from dalle2_video.data.store.embeddings import EmbeddingCache
from dalle2_video.data.store.shard import FORMAT, ShardWriter
from dalle2_video.data.store.store import ClipStore
from dalle2_video.data.store.texts import write_texts
from dalle2_video.model_file import file_hash, load_model
from dalle2_video.models.clip_config import PretrainedTextConfig, TrainedTextConfig, VideoCLIPConfig
from dalle2_video.models.video_clip import ClipOutput, VideoCLIP
from dalle2_video.pipeline.loading import load_clip
from dalle2_video.stages.config_tree import settings_of
from dalle2_video.stages.contrastive import caption_ids, contrastive_loss
from dalle2_video.stages.embeddings import cache_embeddings, over_split
from dalle2_video.stages.sections import ClipSection
from dalle2_video.stages.video_clip import clip_stage, judge, objective
from dalle2_video.training.config import RunConfig
from dalle2_video.training.loop import train
from dalle2_video.training.stage import StepInfo
from tests.helpers.launching import ROOT
from tests.helpers.towers import NAME, open_clip_checkpoint

SPLITS = {"train": 0.6, "val": 0.25, "heldout": 0.15}
COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240),
    "black": (10, 10, 10), "yellow": (220, 220, 20), "purple": (160, 20, 200), "grey": (120,) * 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def write_store(root: Path, num_clips: int = 64) -> None:
    """Clips of 4 x 16 x 16: the top half has one colour, the bottom half another, with noise."""
    names = list(COLOURS)
    random = np.random.default_rng(0)
    texts, clips = [], []
    with ShardWriter(root, "colours", StoreSettings(4.0, 4, 16), num_clips) as writer:
        for i in range(num_clips):
            top, bottom = names[i % 8], names[(i // 8) % 8]
            frames = np.zeros((4, 16, 16, 3))
            frames[:, :8], frames[:, 8:] = COLOURS[top], COLOURS[bottom]
            frames = (frames + random.normal(0, 8, frames.shape)).clip(0, 255).astype(np.uint8)
            name = hashlib.sha256(str(i).encode()).hexdigest()[:11] + "_0_0"
            row = writer.append(frames, np.arange(4) / 4)
            clips.append({"clip": name, "status": "kept", "row": row, "windows": 1})
            texts.append(
                {
                    "light_dir": [
                        to_line(f"{top} light from above."),
                        to_line(f"The top is {top}."),
                    ],
                    "face40_details": [
                        to_line(f"The bottom is {bottom}."),
                        to_line(f"{bottom} below."),
                    ],
                }
            )
    write_texts(root / "texts" / "colours.pt", texts)
    settings = {"fps": 4.0, "num_frames": 4, "size": 16}
    index = {"format": FORMAT, "settings": settings, "clips": clips}
    write_json(root / "index" / "colours.json", index)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    write_store(root)
    return root


@pytest.fixture(scope="module")
def store(data) -> ClipStore:
    return ClipStore.open(data, SPLITS, 0)


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    """Tiny sizes on the command line of train_clip.py."""
    model = "clip.model"
    return [
        f"data.root={data}", f"run_dir={run}", "data.fps=4", "data.size=16", "data.num_frames=4",
        f"{model}.video.image_size=16", f"{model}.video.num_frames=4",
        "data.splits={train: 0.6, val: 0.25, heldout: 0.15}", f"{model}.embed_dim=16",
        f"{model}.video.width=32", f"{model}.video.heads=2", f"{model}.video.spatial_layers=1",
        f"{model}.video.temporal_layers=1", f"{model}.text.width=32", f"{model}.text.layers=1",
        f"{model}.text.heads=2", "clip.train.batch_size=16", "clip.train.clips=32",
        "clip.train.log_every_clips=1000", *more,
    ]  # fmt: skip


def config(data: Path, run: Path, *more: str) -> DictConfig:
    return compose(*overrides(data, run, *more))


def section(data: Path, *more: str) -> ClipSection:
    return settings_of(config(data, data, *more)).clip


# ---------------------------------------------------------------- the loss


def numpy_loss(video: np.ndarray, text: np.ndarray, scale: float, ids: list[int]) -> float:
    """Symmetric InfoNCE, term by term, other clips with the same id left out."""
    total = 0.0
    for a, b in ((video, text), (text, video)):
        for i in range(len(a)):
            rivals = [j for j in range(len(b)) if j == i or ids[j] != ids[i]]
            logits = np.array([scale * a[i] @ b[j] for j in rivals])
            own = logits[rivals.index(i)]
            total += np.log(np.exp(logits - own).sum())
    return total / (2 * len(video))


def output(n: int, scale: float = 9.0) -> ClipOutput:
    generator = torch.Generator().manual_seed(n)
    video, text = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for _ in range(2))
    return ClipOutput(video, text, torch.tensor([scale]))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [7, 1, 7, 3, 7]])
def test_the_loss_equals_a_numpy_reference(ids):
    out = output(5)
    loss = contrastive_loss(out, torch.tensor(ids))
    expected = numpy_loss(out.video.double().numpy(), out.text.double().numpy(), 9.0, ids)
    assert loss.loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["logit_scale"] == pytest.approx(9.0)


def test_the_loss_of_a_collapsed_and_of_a_perfect_model_are_known():
    collapsed = ClipOutput(
        torch.eye(4)[:1].repeat(4, 1), torch.eye(4)[:1].repeat(4, 1), torch.ones(1)
    )
    ids = torch.arange(4)
    assert contrastive_loss(collapsed, ids).loss.item() == pytest.approx(np.log(4))
    perfect = ClipOutput(torch.eye(4), torch.eye(4), torch.tensor([100.0]))
    loss = contrastive_loss(perfect, ids)
    assert loss.loss.item() < 1e-6
    assert loss.metrics["video_to_text_accuracy"] == 1
    assert loss.metrics["text_to_video_accuracy"] == 1


def test_the_logit_scale_gets_the_gradient_of_the_loss():
    out = output(5)
    scale = torch.tensor([9.0], requires_grad=True)
    contrastive_loss(out._replace(logit_scale=scale), torch.arange(5)).loss.backward()
    video, text = out.video.double().numpy(), out.text.double().numpy()
    ids = list(range(5))
    step = 1e-4
    up, down = (numpy_loss(video, text, 9.0 + d, ids) for d in (step, -step))
    assert scale.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-3)


def test_caption_ids_are_equal_for_equal_sets_of_lines_only():
    sets = [["a", "b"], ["b", "a"], ["a", "b", "a"], ["a"], ["ab"], ["a b"], ["a", "b", "c"]]
    ids = caption_ids(sets).tolist()
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 5


# ---------------------------------------------------------------- several ranks


def batch_loss(model, batch) -> torch.Tensor:
    out = model(to_float(batch.frames), batch.tokens, batch.line_index)
    return contrastive_loss(out, caption_ids(batch.captions)).loss


def tiny_model(data: Path) -> VideoCLIP:
    torch.manual_seed(0)
    return VideoCLIP(section(data).model.model_config())


def train_set(store: ClipStore) -> CelebVTextDataset:
    return CelebVTextDataset(store, "train", 0, TrainingCaptions(CaptionPolicy()))


def one_rank(rank: int, world: int, port: int, data: str, out: str) -> None:
    """Half of a batch of 12 under DDP, and the embeddings of the split `val`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert (state.num_processes, dist.get_backend()) == (world, "gloo")
    store = ClipStore.open(data, SPLITS, 0)
    clips = train_set(store)
    model = tiny_model(Path(data))
    wrapped = DistributedDataParallel(model)
    share = 12 // world
    mine = [clips.pointer(i) for i in range(rank * share, (rank + 1) * share)]
    loss = batch_loss(wrapped, clips.collate(mine))
    loss.backward()
    dist.all_reduce(loss.detach())
    figures = judge(wrapped.eval(), CelebVTextDataset(store, "val", 0, EvaluationCaptions()))
    if rank == 0:
        result = {n: p.grad for n, p in model.named_parameters()}
        result |= {"loss": loss.detach() / world, "figures": figures.metrics()}
        torch.save(result, out)
    dist.destroy_process_group()


def test_two_ranks_with_half_a_batch_give_the_gradients_of_one_with_all(data, store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two.pt"
    mp.spawn(one_rank, (2, port, str(data), str(out)), nprocs=2)
    two = torch.load(out, weights_only=True)

    model = tiny_model(data)
    clips = train_set(store)
    loss = batch_loss(model, clips.collate([clips.pointer(i) for i in range(12)]))
    loss.backward()
    assert two.pop("loss").item() == pytest.approx(loss.item(), rel=1e-5)
    val_set = CelebVTextDataset(store, "val", 0, EvaluationCaptions())
    assert two.pop("figures") == pytest.approx(judge(model.eval(), val_set).metrics())
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().max()
        assert size > 0, name
        assert (two[name] - parameter.grad).abs().max() < 1e-3 * size + 1e-7, name


def test_over_split_meets_every_clip_once_and_in_order(store, monkeypatch):
    from dalle2_video.stages import embeddings as module

    clips = train_set(store)
    for size in (7, len(clips), 64):
        monkeypatch.setattr(module, "EVAL_BATCH", size)
        found = over_split(lambda batch: batch.sample_ids, clips)
        assert found.tolist() == list(range(len(clips)))


# ---------------------------------------------------------------- refusals


def test_gradient_accumulation_is_refused_with_the_reason(data, store):
    wrong = section(data, "clip.train.micro_batch_size=8")
    with pytest.raises(ConfigError, match=r"micro_batch_size: the video CLIP cannot accumulate"):
        clip_stage(wrong, store, 0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    step = StepInfo(torch.arange(4), 0, torch.device("cpu"), accelerator)
    clips = train_set(store)
    batch = clips.collate([clips.pointer(i) for i in range(4)])
    with pytest.raises(ConfigError, match="micro-batches would not see each other"):
        objective(tiny_model(data), batch, step)


def test_clips_of_another_size_are_refused(data, store):
    with pytest.raises(ConfigError, match=r"takes 4 frames of 32 px, .* 4 frames of 16 px"):
        clip_stage(section(data, "clip.model.video.image_size=32"), store, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ("+clip.model.depth=3", r"clip\.model\.depth: unknown key"),
        ("+clip.model.video.tubelets=3", r"clip\.model\.video\.tubelets: unknown key"),
        ("clip.model.text.name=ViT-B-32", r"clip\.model\.text: weights: needed with name=ViT-B-32"),
        ("clip.model.video.tubelet=3", "tubelet 3 does not divide num_frames 4"),
        ("clip.train.lr=fast", r"clip\.train\.lr: must be a valid number, got 'fast'"),
    ],
)
def test_wrong_keys_fail_with_their_names(data, change, message):
    with pytest.raises(ConfigError, match=message):
        section(data, change)


def test_the_text_section_chooses_the_tower(data):
    assert section(data).model.text.tower() == TrainedTextConfig(32, 1, 2, 4.0)
    named = section(data, "clip.model.text.name=ViT-B-32", "clip.model.text.weights=a.pt")
    assert named.model.text.tower() == PretrainedTextConfig("ViT-B-32", "a.pt", frozen=True)


# ---------------------------------------------------------------- training


def test_it_learns_to_tell_clips_apart(data, store, tmp_path):
    plan = section(data, "clip.train.clips=2400", "clip.train.lr=3e-3", "clip.train.batch_size=24")
    stage = clip_stage(plan, store, 0)
    result = train(stage, plan.train, RunConfig(str(tmp_path / "clip")))
    chance = result.metrics["recall_at_1_chance"]
    for name in ("text_to_video", "video_to_text"):
        assert result.metrics[f"recall_at_1_{name}"] > 4 * chance
    clip, loaded = load_clip(tmp_path / "clip" / "model.safetensors")
    assert loaded.meta["fps"] == "4.0"
    assert VideoCLIPConfig.from_dict(loaded.config) == plan.model.model_config()
    assert clip.log_logit_scale.item() != pytest.approx(np.log(1 / 0.07))  # it was trained


def test_a_frozen_tower_trains_nothing_and_is_in_no_file_of_the_run(data, store, tmp_path):
    with open_clip_checkpoint(tmp_path) as (path, source):
        text = "clip.model.text"
        plan = section(
            data, "clip.model.embed_dim=24", f"{text}.name={NAME}", f"{text}.weights={path}",
            f"{text}.frozen=true", "clip.train.save_every_clips=16",
            "clip.train.ema_halflife_clips=16",
        )  # fmt: skip
        stage = clip_stage(plan, store, 0)
        train(stage, plan.train, RunConfig(str(tmp_path / "clip")))
        tower = source.state_dict()["token_embedding.weight"]
        assert any(torch.equal(p, tower) for p in stage.model.text.parameters())
        files = sorted((tmp_path / "clip").rglob("*.safetensors"))
        assert len(files) == 5  # model.safetensors; and in two checkpoints weights and EMA
        for file in files:
            names = load_file(file).keys()
            assert any(name.startswith("video.") for name in names), file
            assert not any(name.startswith("text.") for name in names), file
        state = torch.load(
            tmp_path / "clip/checkpoints/000000000032/optimizer.bin", weights_only=True
        )
        held = sum(len(group["params"]) for group in state["param_groups"])
        assert held == len(list(stage.model.video.parameters())) + 1  # and the logit scale
        clip, _ = load_clip(tmp_path / "clip" / "model.safetensors")
        assert any(torch.equal(p, tower) for p in clip.text.parameters())


def run_script(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_clip.py"), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_script_trains_caches_and_does_nothing_twice(data, store, tmp_path):
    run = tmp_path / "run"
    run_script(*overrides(data, run))
    model, path = run / "clip" / "model.safetensors", run / "clip" / "embeddings.safetensors"
    lines = [json.loads(row) for row in (run / "clip/metrics.jsonl").read_text().splitlines()]
    assert any("val/recall_at_10_video_to_text" in line for line in lines)
    before = {p: (p.stat().st_mtime_ns, file_hash(p)) for p in (model, path)}

    # The cache holds under each key the embedding of that clip's frames.
    cache = EmbeddingCache.load(path, file_hash(model))
    clip, _ = load_clip(model)
    assert sorted(cache.keys) == sorted(store.key(i) for i in range(len(store)))
    for i in (0, 17, 63):
        frames = torch.from_numpy(store.frames([i]))
        expected = clip.encode_video(to_float(frames))
        assert torch.allclose(cache.rows([store.key(i)]), expected, atol=1e-5)

    cache_embeddings(run / "clip", store)  # the same checkpoint: nothing is computed
    assert {p: (p.stat().st_mtime_ns, file_hash(p)) for p in (model, path)} == before

    # Training goes on: another checkpoint, so the cache is made again, with the new hash.
    plan = section(data, "clip.train.clips=48")
    train(clip_stage(plan, store, 0), plan.train, RunConfig(str(run / "clip")))
    assert file_hash(model) != before[model][1]
    cache_embeddings(run / "clip", store)
    again = EmbeddingCache.load(path, file_hash(model))
    assert again.keys == cache.keys
    assert not torch.equal(again.embeddings, cache.embeddings)


def test_two_steps_resumed_to_four_end_with_the_same_weights(data, store, tmp_path):
    weights = {}
    for name, stops in (("whole", [64]), ("resumed", [32, 64])):
        for clips in stops:
            plan = section(data, "clip.train.clips=64", "clip.train.lr_schedule=constant")
            settings = dataclasses.replace(plan.train, clips=clips)
            train(clip_stage(plan, store, 0), settings, RunConfig(str(tmp_path / name)))
        weights[name] = load_model(tmp_path / name / "model.safetensors", "clip").state
    for name, tensor in weights["whole"].items():
        assert torch.equal(tensor, weights["resumed"][name]), name
