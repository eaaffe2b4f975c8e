from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sana_model.nn.captions import project_captions
from sana_model.nn.config import SanaConfig
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import SanaBlock
from tests.support.peers import TINY, assert_close, diffusers_transformer, scramble

VARIANTS = {
    "plain": TINY,
    "qk-norm": replace(TINY, qk_norm=True, cross_qk_norm=True),
    "positions": replace(TINY, position_scale=2.0),
    "patch-2": replace(TINY, patch_size=2, base_size=4, position_scale=1.0),
}
SIZES = {"square": (8, 8), "wide": (4, 14), "tall": (10, 6)}


def make_inputs(config: SanaConfig, size: tuple[int, int], batch_size: int = 3, length: int = 11, seed: int = 1):
    """Latents, timestep, caption embeddings and a mask with captions of 1, `length` and 4 real tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch_size, config.in_channels, *size, generator=generator)
    timestep = torch.rand(batch_size, generator=generator) * 1000
    caption_embeds = torch.randn(batch_size, length, config.caption_dim, generator=generator)
    lengths = torch.tensor([1, length, 4])[:batch_size]
    caption_mask = torch.arange(length) < lengths[:, None]
    return latents, timestep, caption_embeds, caption_mask


def load_pair(config: SanaConfig, folder) -> tuple[SanaTransformer, torch.nn.Module]:
    theirs = diffusers_transformer(config)
    theirs.save_pretrained(folder)
    return SanaTransformer.from_pretrained(folder, time_input="continuous").eval(), theirs  # as their model itself does


def run_theirs(theirs, latents, timestep, caption_embeds, caption_mask):
    return theirs(
        latents,
        encoder_hidden_states=caption_embeds,
        timestep=timestep,
        encoder_attention_mask=caption_mask.long(),
        return_dict=False,
    )[0]


@pytest.mark.parametrize(
    ("preset", "count"), [("sana-0.6b", 591_747_872), ("sana-1.6b", 1_604_462_752), ("sana-4.8b", 4_721_825_952)]
)
def test_parameter_counts_are_the_published_ones(preset, count):
    with torch.device("meta"):
        model = SanaTransformer.from_preset(preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_forward_equals_diffusers(config, size, tmp_path):
    ours, theirs = load_pair(config, tmp_path)
    assert ours.config == config
    inputs = make_inputs(config, size)
    with torch.no_grad():
        assert_close(ours(*inputs), run_theirs(theirs, *inputs))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_a_training_step_equal_diffusers(config, tmp_path):
    ours, theirs = load_pair(config, tmp_path / "theirs")
    inputs = make_inputs(config, (8, 8))
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    F.mse_loss(ours(*inputs), target).backward()
    F.mse_loss(run_theirs(theirs, *inputs), target).backward()
    with torch.no_grad():  # carry our gradients over as weights, so that the key map names them
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    ours.save_pretrained(tmp_path / "gradients", layout="diffusers")
    gradients = type(theirs).from_pretrained(tmp_path / "gradients").state_dict()
    for name, parameter in theirs.named_parameters():
        tolerance = 1e-4 * parameter.grad.abs().max().item() + 1e-7
        torch.testing.assert_close(gradients[name], parameter.grad, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_and_junk_behind_the_mask_never_matter():
    model = scramble(SanaTransformer(TINY))
    latents, timestep, caption_embeds, caption_mask = make_inputs(TINY, (6, 8))
    junk = caption_embeds.masked_fill(~caption_mask[..., None], float("nan"))
    longer = F.pad(junk, (0, 0, 0, 50), value=float("nan"))
    longer_mask = F.pad(caption_mask, (0, 50))
    with torch.no_grad():
        wanted = model(latents, timestep, caption_embeds, caption_mask)
        assert torch.equal(model(latents, timestep, junk, caption_mask), wanted)
        assert torch.equal(model(latents, timestep, longer, longer_mask.long()), wanted)
        alone = model(latents[:1], timestep[:1], caption_embeds[:1, :1])
    assert_close(alone, wanted[:1], 1e-5)


@pytest.mark.parametrize("lengths", [(1, 11, 4), (1, 1, 11), (1, 1, 1), (11, 1, 4), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_caption_state_serves_in_place_of_the_embeddings(config, lengths):
    model = scramble(SanaTransformer(config))
    latents, timestep, caption_embeds, _ = make_inputs(config, (8, 8))
    caption_mask = torch.arange(caption_embeds.shape[1]) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        state = model.encode_captions(caption_embeds, caption_mask)
        assert state.num_single == [length == 1 for length in (*lengths, 0)].index(False)
        wanted = model(latents, timestep, caption_embeds, caption_mask)
        assert_close(model(latents, timestep, state), wanted, 1e-5)
        for count in (1, 2):
            assert_close(model(latents[count:], timestep[count:], state.without_first(count)), wanted[count:], 1e-5)
    with pytest.raises(ValueError, match="3 captions came with 2 latents"):
        model(latents[1:], timestep[1:], state)


def test_gradient_checkpointing_changes_memory_not_gradients():
    model = scramble(SanaTransformer(replace(TINY, depth=4))).train()
    inputs = make_inputs(TINY, (8, 8))
    gradients = []
    saved = []
    for every in (0, 1, 2):
        model.enable_gradient_checkpointing(every)
        model.zero_grad()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = model(*inputs).square().mean()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        saved.append(sum(kept))
    for other in gradients[1:]:
        for ours, plain in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(ours, plain)
    assert saved[1] < saved[2] < saved[0]
    with pytest.raises(ValueError, match="every=-1"):
        model.enable_gradient_checkpointing(-1)


def test_one_block_overfits_one_batch():
    torch.manual_seed(0)
    model = SanaTransformer(replace(TINY, depth=1))
    latents, timestep, caption_embeds, caption_mask = make_inputs(TINY, (4, 4), batch_size=2)
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    to_zero = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=300)
    for _ in range(300):
        loss = F.mse_loss(model(latents, timestep, caption_embeds, caption_mask), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        to_zero.step()
    assert loss.item() < 0.01, f"loss is still {loss.item():.3f} of 1"


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = SanaTransformer(SanaConfig(dim=256, depth=1, num_cross_heads=4, ffn_dim=640, caption_dim=512))
    block: SanaBlock = model.blocks[0]
    assert torch.all(model.caption_proj.norm.weight == 0.01)
    for linear in (model.time_embed.linear_1, model.time_embed.modulation, model.caption_proj.linear_1):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    xavier = (6 / (256 + 3 * 256)) ** 0.5
    assert block.attention.qkv.weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
    assert block.ffn.expand.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)  # a convolution's default
    assert block.modulation.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert torch.all(block.cross_attention.proj.bias == 0)


def test_reset_parameters_leaves_nothing_as_it_was():
    with torch.device("meta"):
        model = SanaTransformer(TINY)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.reset_parameters()
    assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def test_block_compiles_without_graph_breaks():
    model = scramble(SanaTransformer(TINY))
    latents, timestep, caption_embeds, caption_mask = make_inputs(TINY, (4, 4))
    caption = project_captions(model.caption_proj, caption_embeds, caption_mask)
    memory = model.encode_captions(caption_embeds, caption_mask).memories[0]
    tokens = model.patch_embed(latents)
    _, modulation = model.time_embed(timestep)
    for kind in (caption, memory):
        mask = caption.attention_mask if kind is caption else caption.attention_mask[1:]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                explanation = torch._dynamo.explain(model.blocks[0])(tokens, modulation, kind, mask, (4, 4))
            assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.slow
def test_compiled_block_computes_the_same():
    model = scramble(SanaTransformer(TINY))
    inputs = make_inputs(TINY, (4, 4))
    with torch.no_grad():
        wanted = model(*inputs)
        for block in model.blocks:
            block.compile(fullgraph=True)
        assert_close(model(*inputs), wanted)


def test_bad_input_is_named():
    model = SanaTransformer(TINY)
    latents, timestep, caption_embeds, caption_mask = make_inputs(TINY, (4, 4))
    cases = [
        ((latents[:, :4], timestep, caption_embeds, caption_mask), r"\(3, 4, 4, 4\).*\(B, 8, H, W\)"),
        ((latents, timestep[:2], caption_embeds, caption_mask), r"timestep has shape \(2,\)"),
        ((latents, timestep, caption_embeds[..., :7], caption_mask), r"\(3, 11, 7\).*\(B, L, 48\)"),
        ((latents, timestep, caption_embeds, caption_mask[:, :5]), r"caption_mask has shape \(3, 5\)"),
        ((latents, timestep, caption_embeds, torch.zeros_like(caption_mask)), "masks every token"),
        ((latents, timestep, caption_embeds[:2], caption_mask[:2]), "2 captions came with 3 latents"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    patched = SanaTransformer(replace(TINY, patch_size=2))
    with pytest.raises(ValueError, match="3x4 must divide by patch_size=2"):
        patched(latents[:, :, :3], timestep, caption_embeds, caption_mask)
    with pytest.raises(ValueError, match=r"unknown preset 'sana-7b'.*sana-0.6b"):
        SanaTransformer.from_preset("sana-7b")
    with pytest.raises(TypeError, match="colour"):
        SanaTransformer.from_preset("tiny", colour="red")
    with pytest.raises(ValueError, match="dim=100"):
        SanaConfig(dim=100)
