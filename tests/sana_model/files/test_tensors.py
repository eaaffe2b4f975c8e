"""Files of weights: shards and variants, damaged and hostile files, a save that fails."""

import os
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sana_model.files import tensors
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, assert_same_tensors, diffusers_transformer, nvlabs_state, scramble

PUBLISHED_WIDTH = replace(TINY, dim=1152, depth=1, num_cross_heads=16, ffn_dim=96)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_sharded_and_variant_safetensors_load(variant, tmp_path):
    theirs = diffusers_transformer(TINY)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB", variant=variant)
    theirs.save_pretrained(tmp_path / "single", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    plain = SanaTransformer.from_pretrained(tmp_path / "shards").state_dict()
    assert_same_tensors(plain, SanaTransformer.from_pretrained(tmp_path / "single").state_dict())
    next((tmp_path / "shards").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"shards that are not there.*00002-of"):
        SanaTransformer.from_pretrained(tmp_path / "shards")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    state = nvlabs_state(PUBLISHED_WIDTH)
    planted = np.array([Evil()], dtype=object)  # an array of numbers is allowed there, one of anything else is not
    for name, rng_state in (("call.pth", {"numpy": Evil()}), ("array.pth", {"numpy": ("MT19937", planted)})):
        torch.save({"state_dict": state, "rng_state": rng_state}, tmp_path / name)
    for name in ("evil.pth", "raw.pth", "call.pth", "array.pth"):
        with pytest.raises(ValueError, match=rf"{name} is refused: it asks for posix\.mkdir, which could run code") as error:
            SanaTransformer.from_pretrained(tmp_path / name)
        assert "\x1b" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_name_in_a_pickle_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02cos\nsystem\x1b[2Jx\n.")
    with pytest.raises(ValueError, match=r"x\.pth is refused") as error:
        SanaTransformer.from_pretrained(tmp_path / "x.pth")
    assert "\x1b" not in str(error.value) and "\\x1b[2J" in str(error.value)


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
def test_a_checkpoint_of_nvlabs_training_loads_with_and_without_its_average(prefix, tmp_path):
    """As its save_checkpoint writes it under DDP: the state of random generators holds a numpy array."""
    state = {prefix + name: tensor for name, tensor in nvlabs_state(PUBLISHED_WIDTH).items()}
    moved = {name: tensor + (0 if "pos_embed" in name else 1) for name, tensor in state.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    rng_state = {
        "torch": torch.get_rng_state(), "torch_cuda": [], "numpy": np.random.get_state(), "python": random.getstate(),
        "generator": torch.Generator().get_state(),
    }  # fmt: skip
    content = {"state_dict": state, "state_dict_ema": moved, "optimizer": optimizer.state_dict(), "epoch": 1, "step": 7}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content | {"scheduler": {"last_epoch": 7}, "rng_state": rng_state}, folder / "epoch_1_step_7.pth")
    plain = SanaTransformer.from_pretrained(folder / "epoch_1_step_7.pth")
    average = SanaTransformer.from_pretrained(tmp_path / "run", use_ema=True)  # a folder that holds only this file
    assert torch.equal(average.head.bias, plain.head.bias + 1)
    (folder / "epoch_2.pth").write_bytes((folder / "epoch_1_step_7.pth").read_bytes())
    with pytest.raises(ValueError, match=r"holds epoch_1_step_7\.pth, epoch_2\.pth: name the one to load"):
        SanaTransformer.from_pretrained(tmp_path / "run")
    (folder / "latest.pth").symlink_to("epoch_1_step_7.pth")
    assert torch.equal(SanaTransformer.from_pretrained(tmp_path / "run").head.bias, plain.head.bias)


def test_damaged_files_are_named(tmp_path):
    scramble(SanaTransformer(TINY)).save_pretrained(tmp_path / "ours")
    weights = tmp_path / "ours" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"model\.safetensors {'cannot be read' if length else 'is empty'}"):
            SanaTransformer.from_pretrained(tmp_path / "ours")
    weights.write_bytes(whole)
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "sana_tr')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        SanaTransformer.from_pretrained(tmp_path / "ours")
    torch.save({"state_dict": nvlabs_state(TINY)}, tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        SanaTransformer.from_pretrained(tmp_path / "cut.pth")


def test_torch_files_of_something_else_are_named(tmp_path):
    for content in (torch.zeros(3), [torch.zeros(3)], {"state_dict": [torch.zeros(3)]}, {"step": 7}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth"):
            SanaTransformer.from_pretrained(tmp_path / "x.pth")
    generator = torch.Generator().manual_seed(0)
    for start in (b"PK", b"\x80", b"\x80\x02}q", b""):
        for _ in range(20):
            noise = torch.randint(0, 256, (60,), generator=generator, dtype=torch.uint8).numpy().tobytes()
            (tmp_path / "x.pth").write_bytes(start + noise)
            with pytest.raises(ValueError, match=r"x\.pth"):
                SanaTransformer.from_pretrained(tmp_path / "x.pth")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = scramble(SanaTransformer(TINY), 0)
    old.save_pretrained(tmp_path)

    def fill_the_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        scramble(SanaTransformer(TINY), 1).save_pretrained(tmp_path)
    assert_same_tensors(SanaTransformer.from_pretrained(tmp_path).state_dict(), old.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
