import json
import os
import pickle
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import fsspec
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

from sana_model.files import places, tensors
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import SanaConfig
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import FAMILIES, TINY, diffusers_autoencoder, diffusers_transformer, scramble

PUBLISHED_WIDTH = replace(TINY, dim=1152, depth=1, num_cross_heads=16, ffn_dim=96)


def nvlabs_state(config: SanaConfig) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes that the published converter reads (diffusers, convert_sana_to_diffusers.py)."""
    dim, ffn, caption = config.dim, config.ffn_dim, config.caption_dim
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}  # noqa: E731
    shapes = {
        "pos_embed": (1, config.base_size**2, dim),
        "y_embedder.y_embedding": (300, caption),
        "x_embedder.proj.weight": (dim, config.in_channels, 1, 1),
        "x_embedder.proj.bias": (dim,),
        **linear("t_embedder.mlp.0", dim, 256),
        **linear("t_embedder.mlp.2", dim, dim),
        **linear("t_block.1", 6 * dim, dim),
        **linear("y_embedder.y_proj.fc1", dim, caption),
        **linear("y_embedder.y_proj.fc2", dim, dim),
        "attention_y_norm.weight": (dim,),
        **linear("final_layer.linear", config.in_channels, dim),
        "final_layer.scale_shift_table": (2, dim),
    }
    for i in range(config.depth):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.scale_shift_table": (6, dim),
            f"{block}.attn.qkv.weight": (3 * dim, dim),
            **linear(f"{block}.attn.proj", dim, dim),
            **linear(f"{block}.cross_attn.q_linear", dim, dim),
            **linear(f"{block}.cross_attn.kv_linear", 2 * dim, dim),
            **linear(f"{block}.cross_attn.proj", dim, dim),
            f"{block}.mlp.inverted_conv.conv.weight": (2 * ffn, dim, 1, 1),
            f"{block}.mlp.inverted_conv.conv.bias": (2 * ffn,),
            f"{block}.mlp.depth_conv.conv.weight": (2 * ffn, 1, 3, 3),
            f"{block}.mlp.depth_conv.conv.bias": (2 * ffn,),
            f"{block}.mlp.point_conv.conv.weight": (dim, ffn, 1, 1),
        }
        if config.qk_norm:
            norms = (f"{block}.{part}.{name}_norm.weight" for part in ("attn", "cross_attn") for name in "qk")
            shapes |= {name: (dim,) for name in norms}
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["pos_embed"].zero_()
    return state


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_nvlabs_to_ours_to_diffusers_to_ours_to_nvlabs_is_bit_for_bit(qk_norm, tmp_path):
    config = replace(TINY, qk_norm=qk_norm, cross_qk_norm=qk_norm)
    state = nvlabs_state(config)
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    first = SanaTransformer.from_pretrained(tmp_path / "published.pth", num_cross_heads=4)
    assert first.config == config
    first.save_pretrained(tmp_path / "ours")
    SanaTransformer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "diffusers", layout="diffusers")
    second = SanaTransformer.from_pretrained(tmp_path / "diffusers")
    second.save_pretrained(tmp_path / "back.pth", layout="nvlabs")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert_same_tensors(back, state)


def test_nvlabs_weights_mean_what_the_published_converter_says(tmp_path):
    """diffusers' own converter and ours turn one .pth into the same diffusers tensors."""
    state = nvlabs_state(TINY)
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    ours = SanaTransformer.from_pretrained(tmp_path / "published.pth", num_cross_heads=4)
    ours.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    mine = load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")
    assert_same_tensors(mine, convert_sana_transformer_to_diffusers(dict(state)))


@pytest.mark.parametrize("config", [TINY, replace(TINY, qk_norm=True, cross_qk_norm=True, position_scale=2.0)])
def test_diffusers_loads_what_we_save(config, tmp_path):
    ours = scramble(SanaTransformer(config))
    ours.save_pretrained(tmp_path, layout="diffusers")
    theirs, report = SanaTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "again")
    assert_same_tensors(SanaTransformer.from_pretrained(tmp_path / "again").state_dict(), ours.state_dict())


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


def test_a_safetensors_file_is_known_by_the_config_beside_it(tmp_path):
    ours = scramble(SanaTransformer(TINY))
    ours.save_pretrained(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    for file in ("ours/model.safetensors", "diffusers/diffusion_pytorch_model.safetensors"):
        assert_same_tensors(SanaTransformer.from_pretrained(tmp_path / file).state_dict(), ours.state_dict())


def test_hub_addresses_name_owner_revision_and_folder(tmp_path, monkeypatch):
    """Against a cache as the hub's own client lays it out; nothing is fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    for revision, seed in (("main", 0), ("refs/pr/3", 1)):
        commit = f"{seed:040x}"
        ref = repository / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        scramble(SanaTransformer(TINY), seed).save_pretrained(repository / "snapshots" / commit / "transformer")
    for address, seed in [("owner/name", 0), ("owner/name/transformer", 0), ("owner/name@refs%2Fpr%2F3/transformer", 1)]:
        loaded = SanaTransformer.from_pretrained(f"hf://{address}")
        assert_same_tensors(loaded.state_dict(), scramble(SanaTransformer(TINY), seed).state_dict())
    with pytest.raises(FileNotFoundError, match="holds no 'vae'"):
        DCAutoencoder.from_pretrained("hf://owner/name/vae")
    with pytest.raises(ValueError, match="hf://owner/name"):
        SanaTransformer.from_pretrained("hf://gpt2")


class UnstampedFileSystem(MemoryFileSystem):
    """As https: it does not tell when a file changed."""

    protocol = "unstamped"

    def info(self, path, **kwargs):
        return {name: value for name, value in super().info(path, **kwargs).items() if name != "created"}


def test_a_uri_that_tells_no_time_is_fetched_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    fsspec.register_implementation("unstamped", UnstampedFileSystem, clobber=True)
    for seed in (0, 1):
        model = scramble(SanaTransformer(TINY), seed)
        model.save_pretrained(tmp_path / "ours")
        fsspec.filesystem("unstamped").put(str(tmp_path / "ours") + "/", "unstamped://run/", recursive=True)
        assert_same_tensors(SanaTransformer.from_pretrained("unstamped://run").state_dict(), model.state_dict())


class CountingFileSystem(MemoryFileSystem):
    """Slow, and notes what is fetched."""

    protocol = "counting"
    fetched: ClassVar[list[str]] = []

    def get_file(self, rpath, lpath, **kwargs):
        time.sleep(0.05)
        self.fetched.append(rpath)
        super().get_file(rpath, lpath, **kwargs)


def test_of_workers_that_start_together_one_fetches(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    scramble(SanaTransformer(TINY), 0).save_pretrained(tmp_path / "ours")
    fsspec.filesystem("counting").put(str(tmp_path / "ours") + "/", "counting://run/", recursive=True)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: places.resolve("counting://run"), range(8)))
    (place,) = found
    names = sorted(path.name for path in place.iterdir())
    assert names and sorted(name.rpartition("/")[2] for name in CountingFileSystem.fetched) == names


def test_saving_to_a_uri_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for layout in ("sana", "diffusers", "nvlabs"):
        for model in (SanaTransformer(TINY), DCAutoencoder.from_preset("tiny")):
            with pytest.raises(ValueError, match="s3://bucket/x' is a URI"):
                model.save_pretrained("s3://bucket/x", layout=layout)
    assert not list(tmp_path.iterdir())


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


def test_sanas_published_spelling_of_conv_is_understood(tmp_path):
    diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_block_type": "Conv"}))
    assert DCAutoencoder.from_pretrained(tmp_path).config == FAMILIES["dc-ae-f32c32-sana-1.1"]


def test_state_dict_of_a_published_file_loads_into_a_fresh_model(tmp_path):
    torch.save({"state_dict": nvlabs_state(TINY)}, tmp_path / "x.pth")
    loaded = SanaTransformer.from_pretrained(tmp_path / "x.pth", num_cross_heads=4)
    assert loaded.null_caption_embeds is not None and not loaded.training
    SanaTransformer(loaded.config).load_state_dict(loaded.state_dict())


def test_a_feed_forward_width_that_rounds_down_survives_diffusers(tmp_path):
    config = replace(TINY, dim=352, ffn_dim=480)
    assert int(480 / 352 * 352) == 479
    SanaTransformer(config).save_pretrained(tmp_path, layout="diffusers")
    assert SanaTransformer2DModel.from_pretrained(tmp_path).transformer_blocks[0].ff.conv_point.weight.shape[1] == 480


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


@pytest.mark.parametrize(("scale", "base_size"), [(1.0, 64), (2.0, 128)])
def test_positional_embedding_is_read_from_the_weights(scale, base_size, tmp_path):
    config = replace(TINY, position_scale=scale, base_size=base_size, depth=1)
    scramble(SanaTransformer(config)).save_pretrained(tmp_path / "some-name.pth", layout="nvlabs")
    assert SanaTransformer.from_pretrained(tmp_path / "some-name.pth", num_cross_heads=4).config == config


@pytest.mark.parametrize("name", FAMILIES)
def test_autoencoder_layouts_round_trip_bit_for_bit(name, tmp_path):
    theirs = diffusers_autoencoder(FAMILIES[name])
    theirs.save_pretrained(tmp_path / "diffusers")
    first = DCAutoencoder.from_pretrained(tmp_path / "diffusers")
    first.save_pretrained(tmp_path / "ours")
    DCAutoencoder.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "published.pth", layout="nvlabs")
    published = torch.load(tmp_path / "published.pth", weights_only=True)["state_dict"]
    assert_same_tensors(convert_autoencoder_dc_checkpoint_to_diffusers(dict(published)), theirs.state_dict())
    last = DCAutoencoder.from_pretrained(tmp_path / "published.pth", scaling_factor=0.5)
    assert last.config == replace(FAMILIES[name], scaling_factor=0.5)
    last.save_pretrained(tmp_path / "back", layout="diffusers")
    again, report = AutoencoderDC.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()) and again.config.scaling_factor == 0.5
    assert_same_tensors(dict(again.state_dict()), dict(theirs.state_dict()))


def test_published_autoencoder_weights_need_the_scale_that_they_do_not_hold(tmp_path):
    scramble(DCAutoencoder(FAMILIES["dc-ae-f64c128-in-1.0"])).save_pretrained(tmp_path / "x.pth", layout="nvlabs")
    with pytest.raises(ValueError, match="scaling_factor="):
        DCAutoencoder.from_pretrained(tmp_path / "x.pth")


def test_fsspec_uri_loads_and_a_changed_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    uri = f"memory://{uuid.uuid4().hex}"
    for seed in (0, 1):
        model = scramble(SanaTransformer(TINY), seed)
        model.save_pretrained(tmp_path / "ours")
        fsspec.filesystem("memory").put(str(tmp_path / "ours") + "/", f"{uri}/run/", recursive=True)
        loaded = SanaTransformer.from_pretrained(f"{uri}/run")
        assert_same_tensors(loaded.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "x.pth", layout="nvlabs")
    fsspec.filesystem("memory").put(str(tmp_path / "x.pth"), f"{uri}/x.pth")
    assert SanaTransformer.from_pretrained(f"{uri}/x.pth", num_cross_heads=4).config.depth == TINY.depth
    with pytest.raises(FileNotFoundError, match="nothing at"):
        SanaTransformer.from_pretrained(f"{uri}/none")


def test_dtype_casts_and_weights_stay_trainable(tmp_path):
    scramble(SanaTransformer(TINY)).save_pretrained(tmp_path)
    model = SanaTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(ValueError, match=f"{name} is refused"):
            SanaTransformer.from_pretrained(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_damaged_files_are_named(tmp_path):
    scramble(SanaTransformer(TINY)).save_pretrained(tmp_path / "ours")
    weights = tmp_path / "ours" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
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


def test_checkpoints_of_another_model_are_named(tmp_path):
    transformer, autoencoder = scramble(SanaTransformer(TINY)), scramble(DCAutoencoder.from_preset("tiny"))
    transformer.save_pretrained(tmp_path / "dit")
    autoencoder.save_pretrained(tmp_path / "ae")
    autoencoder.save_pretrained(tmp_path / "ae-diffusers", layout="diffusers")
    autoencoder.save_pretrained(tmp_path / "ae.pth", layout="nvlabs")
    transformer.save_pretrained(tmp_path / "dit.pth", layout="nvlabs")
    for load, message in [
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae"), "not a linear DiT.*'dc_autoencoder'"),
        (lambda: SanaTransformer.from_pretrained(tmp_path / "ae-diffusers"), "not a linear DiT.*'AutoencoderDC'"),
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


def test_unsupported_siblings_are_refused_by_name(tmp_path):
    diffusers_transformer(TINY).save_pretrained(tmp_path / "dit")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"guidance_embeds": True}))
    with pytest.raises(ValueError, match="guidance_embeds"):
        SanaTransformer.from_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "config.json").write_text(json.dumps(config | {"timestep_scale": 0.001}))
    with pytest.raises(ValueError, match=r"timestep_scale=0\.001"):
        SanaTransformer.from_pretrained(tmp_path / "dit")
    diffusers_autoencoder(FAMILIES["dc-ae-f32c32-sana-1.1"]).save_pretrained(tmp_path / "ae")
    config = json.loads((tmp_path / "ae" / "config.json").read_text())
    (tmp_path / "ae" / "config.json").write_text(json.dumps(config | {"encoder_out_shortcut": False}))
    with pytest.raises(ValueError, match="encoder_out_shortcut=False"):
        DCAutoencoder.from_pretrained(tmp_path / "ae")


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
