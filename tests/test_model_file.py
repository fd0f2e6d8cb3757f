"""Model files: round trip, one hash for equal weights, errors that name the file and the cause."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dalle2_video.model_file import (
    CheckpointError,
    file_hash,
    load_model,
    load_weights,
    read_header,
    save_model,
)

CONFIG = {"width": 4, "levels": [1, 2], "inner": {"on": True, "rate": 0.5, "none": None}}


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3))


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    save_model(path, "prior", CONFIG, net().state_dict(), {"clip_hash": "é"})
    written = file_hash(path)
    loaded = load_model(path, "prior")
    assert loaded.config == CONFIG
    assert loaded.meta == {"clip_hash": "é"}
    assert loaded.hash == written == file_hash(path)
    assert len(loaded.hash) == 16
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    load_weights(other, loaded)
    for a, b in zip(net().state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]  # no temporary left


def test_bytes_depend_on_content_alone(tmp_path):
    meta = {name: name for name in "abcdefgh"}
    hashes = {
        save_model(tmp_path / f"{i}.safetensors", "prior", CONFIG, net().state_dict(), meta)
        for i in range(4)
    }
    assert len(hashes) == 1
    changed = net().state_dict()
    changed["0.bias"] = changed["0.bias"] + 1e-7
    save_model(tmp_path / "x.safetensors", "prior", CONFIG, changed, meta)
    assert file_hash(tmp_path / "x.safetensors") not in hashes


def test_dtypes_tied_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base,
        "tied": base,
        "turned": base.T,
        "half": base.bfloat16(),
        "n": torch.tensor(3),
    }
    save_model(tmp_path / "m.safetensors", "x", {}, state)
    loaded = load_model(tmp_path / "m.safetensors", "x").state
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_header_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", CONFIG, net().state_dict(), {"a": "b"})
    header = read_header(path)
    assert (header.kind, header.config, header.meta) == ("prior", CONFIG, {"a": "b"})


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"clip/model\.safetensors: no such file.*clip model"):
        load_model(tmp_path / "clip/model.safetensors", "clip")


@pytest.mark.parametrize("size", [0, 4, 200, -10])
def test_truncated_file(tmp_path, size):
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", CONFIG, net().state_dict())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"m\.safetensors: not a whole safetensors file"):
        load_model(path, "prior")


def test_foreign_and_other_kind(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="none of this project"):
        load_model(tmp_path / "foreign.safetensors", "prior")
    save_model(tmp_path / "clip.safetensors", "clip", {}, net().state_dict())
    with pytest.raises(CheckpointError, match="holds a 'clip' model where 'prior' is needed"):
        load_model(tmp_path / "clip.safetensors", "prior")


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", {}, net().state_dict())
    loaded = load_model(path, "prior")
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*another shape: 0\.weight \(3, 4\)"):
        load_weights(net(5), loaded)
    with pytest.raises(CheckpointError, match=r"not in the model: 1\.bias"):
        load_weights(nn.Sequential(nn.Linear(4, 3)), loaded)
    bigger = nn.Sequential(*net(), nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match=r"missing: 2\.weight, 2\.bias"):
        load_weights(bigger, loaded)
    load_weights(bigger, loaded, optional=lambda name: name.startswith("2."))
    assert torch.equal(bigger[0].weight, net()[0].weight)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", {}, net().state_dict())
    before = file_hash(path)
    with pytest.raises(TypeError, match=r"meta\['clip_hash'\]"):
        save_model(path, "prior", {}, net().state_dict(), {"clip_hash": None})  # type: ignore
    with pytest.raises(ValueError):
        save_model(path, "prior", {"rate": float("nan")}, net().state_dict())
    assert file_hash(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_disk_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", {}, net().state_dict())
    before = file_hash(path)

    def failing(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("dalle2_video.model_file.os.replace", failing)
    with pytest.raises(OSError, match="no space left"):
        save_model(path, "prior", {"other": 1}, net().state_dict())
    assert file_hash(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_no_pickle(tmp_path):
    """The file is a safetensors header (JSON) and raw numbers."""
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", CONFIG, net().state_dict())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert set(header) == {"__metadata__", *net().state_dict()}


def rewritten(path, key: str, change) -> None:
    """A model file with `change` of its header under `key`, as another version writes it."""
    with safe_open(path, framework="pt") as file:
        (text,) = file.metadata().values()
        state = {name: file.get_tensor(name) for name in file.keys()}
    save_file(state, path, metadata={key: json.dumps(change(json.loads(text)))})


def test_a_file_of_format_1_is_read_in_the_names_of_today(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    old = {"model": {"low_frames": 8, "low_size": 32, "dim": 4}, "list": [{"low_size": 1}]}
    new = {"model": {"num_lowres_frames": 8, "lowres_size": 32, "dim": 4}}
    new["list"] = [{"lowres_size": 1}]
    save_model(path, "tsr", old, net().state_dict(), {"clip_hash": "a", "low_size": "b"})

    def as_format_1(header):
        assert header.pop("format") == 2
        return header

    rewritten(path, "dalle2-video/1", as_format_1)
    bytes_before = path.read_bytes()
    loaded = load_model(path, "tsr")
    assert loaded.config == new
    assert loaded.meta == {"clip_hash": "a", "low_size": "b"}  # free strings stay
    load_weights(net(), loaded)
    assert path.read_bytes() == bytes_before
    save_model(tmp_path / "new.safetensors", "tsr", old, net().state_dict())
    assert read_header(tmp_path / "new.safetensors").config == old  # translated in format 1 alone


def test_a_file_of_a_newer_format_is_refused(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, "prior", CONFIG, net().state_dict())
    rewritten(path, "dalle2-video", lambda header: header | {"format": 3, "unheard_of": 1})
    wanted = r"m\.safetensors: has format 3, and this code knows formats up to 2: update the code"
    for read in (read_header, lambda path: load_model(path, "prior")):
        with pytest.raises(CheckpointError, match=wanted):
            read(path)
