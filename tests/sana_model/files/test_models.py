"""Loading and saving one model: what is recognised, what is replaced, what is refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, assert_same_tensors, diffusers_transformer, nvlabs_state, scramble

PUBLISHED_WIDTH = replace(TINY, dim=1152, depth=1, num_cross_heads=16, ffn_dim=96)


def test_a_safetensors_file_is_known_by_the_config_beside_it(tmp_path):
    ours = scramble(SanaTransformer(TINY))
    ours.save_pretrained(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    for file in ("ours/model.safetensors", "diffusers/diffusion_pytorch_model.safetensors"):
        assert_same_tensors(SanaTransformer.from_pretrained(tmp_path / file).state_dict(), ours.state_dict())


def test_another_layout_saved_into_the_same_folder_replaces_the_first(tmp_path):
    first, second = (scramble(SanaTransformer(TINY), seed) for seed in (0, 1))
    first.null_caption_embeds = torch.zeros(3, TINY.caption_dim)
    for one, two in (("diffusers", "sana"), ("sana", "diffusers")):
        first.save_pretrained(tmp_path, layout=one)
        assert SanaTransformer.from_pretrained(tmp_path).null_caption_embeds is not None
        second.save_pretrained(tmp_path, layout=two)
        loaded = SanaTransformer.from_pretrained(tmp_path)
        assert_same_tensors(loaded.state_dict(), second.state_dict())
        assert loaded.null_caption_embeds is None


def test_saving_over_shards_leaves_none_behind(tmp_path):
    diffusers_transformer(TINY).save_pretrained(tmp_path, max_shard_size="200KB")
    model = SanaTransformer.from_pretrained(tmp_path)
    with torch.no_grad():
        model.head.weight.add_(1)
    model.save_pretrained(tmp_path, layout="diffusers")
    assert torch.equal(SanaTransformer2DModel.from_pretrained(tmp_path).proj_out.weight, model.head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_state_dict_of_a_published_file_loads_into_a_fresh_model(tmp_path):
    torch.save({"state_dict": nvlabs_state(TINY)}, tmp_path / "x.pth")
    loaded = SanaTransformer.from_pretrained(tmp_path / "x.pth", num_cross_heads=4)
    assert loaded.null_caption_embeds is not None and not loaded.training
    SanaTransformer(loaded.config).load_state_dict(loaded.state_dict())


def test_ema_is_taken_when_asked_for(tmp_path):
    state = nvlabs_state(PUBLISHED_WIDTH)
    ema = {name: value + 1 if name != "pos_embed" else value for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": ema}, tmp_path / "both.pth")
    torch.save({"state_dict": state}, tmp_path / "one.pth")
    plain = SanaTransformer.from_pretrained(tmp_path / "both.pth")
    averaged = SanaTransformer.from_pretrained(tmp_path / "both.pth", use_ema=True)
    assert plain.config.num_cross_heads == 16  # of the published width
    assert torch.equal(averaged.head.bias, plain.head.bias + 1)
    with pytest.raises(ValueError, match="no state_dict_ema"):
        SanaTransformer.from_pretrained(tmp_path / "one.pth", use_ema=True)


def test_dtype_casts_and_weights_stay_trainable(tmp_path):
    scramble(SanaTransformer(TINY)).save_pretrained(tmp_path)
    model = SanaTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checkpoints_of_another_model_are_named(tmp_path):
    transformer, autoencoder = scramble(SanaTransformer(TINY)), scramble(DCAutoencoder.from_preset("tiny"))
    transformer.save_pretrained(tmp_path / "dit")
    autoencoder.save_pretrained(tmp_path / "ae")
    autoencoder.save_pretrained(tmp_path / "ae-diffusers", layout="diffusers")
    autoencoder.save_pretrained(tmp_path / "ae-ours.pth", layout="nvlabs")
    torch.save({"state_dict": torch.load(tmp_path / "ae-ours.pth")["state_dict"]}, tmp_path / "ae.pth")
    torch.save({"state_dict": nvlabs_state(TINY)}, tmp_path / "dit.pth")
    for load, message in [
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae"), "not a linear DiT.*'dc_autoencoder'"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae-diffusers"), "not a linear DiT.*'AutoencoderDC'"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae-ours.pth"), "not a linear DiT.*'dc_autoencoder'"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae.pth"), r"no checkpoint of a linear DiT.*x_embedder\.proj"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "dit.pth"), "width 64.*num_cross_heads="),
        (lambda: DCAutoencoder.from_pretrained(tmp_path / "dit"), "not a DC-AE.*'sana_transformer'"),
        (lambda: DCAutoencoder.from_pretrained(tmp_path / "dit.pth"), "no checkpoint of a DC-AE"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "dit", use_ema=True), "use_ema"),
        (lambda: transformer.save_pretrained(tmp_path / "x", layout="gguf"), "unknown layout 'gguf'.*diffusers"),
    ]:
        with pytest.raises(ValueError, match=message):
            load()
    with pytest.raises(FileNotFoundError, match="hf://owner/name"):
        SanaTransformer.from_pretrained("Efficient-Large-Model/Sana_600M_512px_diffusers")


def test_missing_extra_and_misshapen_tensors_are_named_as_the_file_names_them(tmp_path):
    diffusers_transformer(TINY).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    changes = {
        r"missing transformer_blocks\.1\.attn1\.to_k\.weight": lambda s: s.pop("transformer_blocks.1.attn1.to_k.weight"),
        r"extra transformer_blocks\.0\.lora": lambda s: s.update({"transformer_blocks.0.lora": torch.zeros(2)}),
        r"misshapen proj_out\.bias: \(3,\), expected \(8,\)": lambda s: s.update({"proj_out.bias": torch.zeros(3)}),
        r"misshapen .*0\.attn1\.to_k\.weight: \(64, 32\), expected \(64, 64\)": lambda s: s.update(
            {"transformer_blocks.0.attn1.to_k.weight": torch.zeros(64, 32)}
        ),
        # Their sum is right, so that joined they would fit, with rows in the wrong roles.
        r"misshapen .*0\.attn1\.to_k\.weight: \(32, 64\).*\n.*misshapen .*to_v\.weight: \(96, 64\)": lambda s: s.update(
            {f"transformer_blocks.0.attn1.to_{n}.weight": torch.zeros(rows, 64) for n, rows in (("k", 32), ("v", 96))}
        ),
        r"misshapen patch_embed\.proj\.weight: \(64, 8\)": lambda s: s.update({"patch_embed.proj.weight": torch.zeros(64, 8)}),
    }
    for message, change in changes.items():
        state = dict(whole)
        change(state)
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            SanaTransformer.from_pretrained(tmp_path)
