"""The cache pairs by key, not position; another CLIP, a missing clip, another order are errors."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dalle2_video.data.store.embeddings import EmbeddingCache, EmbeddingError, write_embeddings

KEYS = ["-a_bcdefghi_0_0:0", "jklmnopqrst_1_0:0", "uvwxyz01234_10_2:0"]
HASH = "0123456789abcdef"


@pytest.fixture
def vectors():
    return F.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def path(tmp_path, vectors):
    path = tmp_path / "clip" / "embeddings.safetensors"
    write_embeddings(path, KEYS, vectors, HASH)
    return path


def test_rows_follow_the_keys_asked_for(path, vectors):
    cache = EmbeddingCache.load(path, HASH)
    assert torch.equal(cache.embeddings, vectors)
    assert cache.keys == tuple(KEYS)
    assert (cache.dim, cache.clip_hash) == (5, HASH)
    shuffled = [KEYS[2], KEYS[0], KEYS[2]]
    assert torch.equal(cache.rows(shuffled), vectors[[2, 0, 2]])


def test_a_cache_from_a_shuffled_loader_gives_the_same_rows(tmp_path, path, vectors):
    # Mistake 1: embeddings saved from a shuffled loader, then paired by index.
    order = [1, 2, 0]
    other = tmp_path / "shuffled.safetensors"
    write_embeddings(other, [KEYS[i] for i in order], vectors[order], HASH)
    assert torch.equal(
        EmbeddingCache.load(other, HASH).rows(KEYS), EmbeddingCache.load(path, HASH).rows(KEYS)
    )
    with pytest.raises(EmbeddingError, match=f"row 0 is clip {KEYS[1]}, expected {KEYS[0]}"):
        EmbeddingCache.load(other, HASH).check_order(KEYS)


def test_check_order(path):
    cache = EmbeddingCache.load(path, HASH)
    cache.check_order(KEYS)
    with pytest.raises(EmbeddingError, match="holds 3 clips, expected 2"):
        cache.check_order(KEYS[:2])
    with pytest.raises(EmbeddingError, match="holds 3 clips, expected 4"):
        cache.check_order([*KEYS, "x:0"])


def test_another_clip_checkpoint_is_an_error_that_names_both_hashes(path):
    with pytest.raises(EmbeddingError, match=f"{HASH}.*fedcba9876543210"):
        EmbeddingCache.load(path, "fedcba9876543210")
    assert EmbeddingCache.load(path, None).clip_hash == HASH


def test_a_missing_clip_is_an_error_that_names_it(path):
    cache = EmbeddingCache.load(path, HASH)
    with pytest.raises(EmbeddingError, match="no embedding of clip new_clip:0"):
        cache.rows([KEYS[0], "new_clip:0"])


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(EmbeddingError, match=r"gone\.safetensors: no such file"):
        EmbeddingCache.load(tmp_path / "gone.safetensors", HASH)


def test_a_truncated_or_foreign_file_is_an_error(tmp_path, path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(EmbeddingError, match=r"half\.safetensors: not a whole embedding cache"):
        EmbeddingCache.load(half, HASH)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"embeddings": torch.eye(3)}, foreign)
    with pytest.raises(EmbeddingError, match=r"foreign\.safetensors: .* no embedding cache"):
        EmbeddingCache.load(foreign, HASH)


def test_a_norm_may_differ_by_what_rounding_does(tmp_path, vectors):
    write_embeddings(tmp_path / "e.safetensors", KEYS, vectors * 1.0005, HASH)
    with pytest.raises(EmbeddingError, match=r"has norm 1\.005 instead of 1"):
        write_embeddings(tmp_path / "e.safetensors", KEYS, vectors * 1.005, HASH)


def test_a_failed_write_leaves_the_old_cache(path, vectors):
    before = path.read_bytes()
    with pytest.raises(EmbeddingError, match=f"clip {KEYS[0]} occurs more than once"):
        write_embeddings(path, [KEYS[0], KEYS[1], KEYS[0]], vectors, HASH)
    with pytest.raises(EmbeddingError, match=f"clip {KEYS[1]} has norm 2 instead of 1"):
        write_embeddings(path, KEYS, vectors * torch.tensor([[1.0], [2.0], [1.0]]), HASH)
    with pytest.raises(EmbeddingError, match="has norm nan"):
        write_embeddings(path, KEYS, torch.full((3, 5), float("nan")), HASH)
    with pytest.raises(EmbeddingError, match=r"3 keys for embeddings of shape \(2, 5\)"):
        write_embeddings(path, KEYS, vectors[:2], HASH)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file remains
