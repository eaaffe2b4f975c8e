import copy
import inspect
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from torch import Tensor, nn
from transformers import Gemma2ForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

from sana_model.nn import text_encoder
from sana_model.nn.config import (
    COMPLEX_HUMAN_INSTRUCTION,
    DIFFUSERS_HUMAN_INSTRUCTION,
    DIFFUSERS_PROMPTS,
    NVLABS_PROMPTS,
    TextEncoderConfig,
)
from sana_model.nn.text_encoder import TextEncoder
from tests.support.tiny_gemma import TokenizerKind, tiny_gemma, tiny_tokenizer

LONG = "a red circle above a blue square, " * 60
CAPTIONS = [
    "two small dogs running through the snow",
    "",
    "A",
    "cat",
    LONG,
    "a green triangle, a yellow star and three black dots in the lower left corner",
    "  A Busy City Street, with SPACES around it \n",
    "cat",
    "日本語 émigré 🙂",
    "a red circle above a blue square on a white background, highly detailed, soft light" * 3,
    "User Prompt: A cat sleeping",
    ". a full stop first",
]
KINDS: list[TokenizerKind] = ["bpe", "merging", "word"]


@torch.no_grad()
def encode_padded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
    config: TextEncoderConfig = NVLABS_PROMPTS,
    use_instruction: bool = True,
) -> list[Tensor]:
    """The published computation, padded and all: the real tokens (L_i, D) of each caption."""
    instruction = config.instruction if use_instruction else ""
    texts = [instruction + (caption.lower() if config.lowercase else caption).strip() for caption in captions]
    max_length = config.max_tokens + (len(tokenizer.encode(instruction)) - 2 if instruction else 0)
    inputs = tokenizer(
        texts, padding="max_length", padding_side="right", max_length=max_length, truncation=True, return_tensors="pt"
    )
    hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    select = [0, *range(-config.max_tokens + 1, 0)]
    masks = inputs["attention_mask"][:, select].bool()
    return [states[mask] for states, mask in zip(hidden[:, select], masks, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def assert_same(encoded: tuple[Tensor, Tensor], expected: list[Tensor]) -> None:
    """Real tokens as expected, first in their row, and zeros behind them; no longer than the longest."""
    embeds, mask = encoded
    assert mask.dtype == torch.bool and embeds.shape[:2] == mask.shape
    assert mask.sum(dim=1).tolist() == [len(states) for states in expected]
    assert mask.shape[1] == max(len(states) for states in expected)
    assert not embeds[~mask].any()
    for row, states in zip(embeds, expected, strict=True):
        assert_close(row[: len(states)], states)


def record_inputs(model: nn.Module) -> list[Tensor]:
    """The input ids of every forward of `model` from now on."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    return seen


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    return LlamaModel(config).eval()


def test_instructions_are_the_published_ones() -> None:
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(default) == DIFFUSERS_HUMAN_INSTRUCTION
    assert COMPLEX_HUMAN_INSTRUCTION.replace('"', "'") == DIFFUSERS_HUMAN_INSTRUCTION
    assert COMPLEX_HUMAN_INSTRUCTION.count('"Enhanced prompt"') == 1


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_padded_computation(kind: TokenizerKind, bos: bool) -> None:
    model, tokenizer = tiny_gemma(tokenizer=kind, bos=bos)
    encoder = TextEncoder(model, tokenizer)
    assert_same(encoder.encode(CAPTIONS), encode_padded(model, tokenizer, CAPTIONS))
    with_tokens = [caption for caption in CAPTIONS if caption or bos]
    expected = encode_padded(model, tokenizer, with_tokens, use_instruction=False)
    assert_same(encoder.encode(with_tokens, use_instruction=False), expected)


@pytest.mark.parametrize(("kind", "num_different"), [("word", 0), ("bpe", 1), ("merging", 2)])
def test_tokenizers_merge_the_end_of_the_instruction(kind: TokenizerKind, num_different: int) -> None:
    """How many of the instruction's last tokens change when a caption follows: the tests above meet all these cases."""
    tokenizer = tiny_tokenizer(kind)
    instruction = tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION)
    with_caption = tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION + "A cat sleeping")
    assert with_caption[: len(instruction) - num_different] == instruction[: len(instruction) - num_different]
    assert num_different == 0 or with_caption[len(instruction) - num_different] != instruction[-num_different]


@pytest.mark.parametrize("max_tokens", [1, 2, 8])
def test_cut_at_published_place(max_tokens: int) -> None:
    model, tokenizer = tiny_gemma()
    config = TextEncoderConfig(max_tokens=max_tokens)
    encoder = TextEncoder(model, tokenizer, config)
    assert_same(encoder.encode([LONG, ""]), encode_padded(model, tokenizer, [LONG, ""], config))

    whole, _ = TextEncoder(model, tokenizer, TextEncoderConfig(max_tokens=2000)).encode([LONG])
    seen = record_inputs(model)
    cut, _ = encoder.encode([LONG])
    assert cut.shape[1] == max_tokens
    assert_close(cut, whole[:, :max_tokens])
    num_chi = len(tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION))
    uncut_ids = tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION + LONG.strip())
    assert seen[-1][0, -1] == uncut_ids[num_chi + max_tokens - 2 - 1]


def test_count_tokens_tells_what_is_cut() -> None:
    model, tokenizer = tiny_gemma()
    encoder = TextEncoder(model, tokenizer, TextEncoderConfig(max_tokens=20))
    roomy = TextEncoder(model, tokenizer, TextEncoderConfig(max_tokens=2000))
    for use_instruction in (True, False):
        counts = encoder.count_tokens(CAPTIONS, use_instruction=use_instruction)
        assert counts == roomy.encode(CAPTIONS, use_instruction=use_instruction)[1].sum(dim=1).tolist()
        assert max(counts) > 20


def test_equals_diffusers() -> None:
    model, tokenizer = tiny_gemma()
    encoder = TextEncoder(model, tokenizer, DIFFUSERS_PROMPTS)
    pipeline = SanaPipeline(tokenizer, model, vae=None, transformer=None, scheduler=None)
    negative = "Blurry, low quality"
    for negative_prompt, ours in [("", encoder.null()), (negative, encoder.encode([negative], use_instruction=False))]:
        embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(
            CAPTIONS,
            negative_prompt=negative_prompt,
            complex_human_instruction=DIFFUSERS_HUMAN_INSTRUCTION.split("\n"),
        )
        expected = [states[real.bool()] for states, real in zip(embeds, mask, strict=True)]
        assert_same(encoder.encode(CAPTIONS), expected)
        assert_same(ours, [negative_embeds[0][negative_mask[0].bool()]])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_sliding_window_shorter_than_instruction(kind: TokenizerKind, attn_implementation: str) -> None:
    model, tokenizer = tiny_gemma(sliding_window=16, tokenizer=kind)
    model.set_attn_implementation(attn_implementation)
    encoded = TextEncoder(model, tokenizer).encode(CAPTIONS)
    assert_same(encoded, encode_padded(model, tokenizer, CAPTIONS))
    wide_model, _ = tiny_gemma(tokenizer=kind)
    wide, _ = TextEncoder(wide_model, tokenizer).encode(CAPTIONS)
    assert (wide - encoded[0]).abs().max() > 0.1 * wide.abs().max(), "the window makes no difference here"


@pytest.mark.parametrize("bos", [True, False])
def test_llama(bos: bool) -> None:
    tokenizer = tiny_tokenizer("bpe", bos=bos)
    model = tiny_llama(tokenizer)
    encoder = TextEncoder(model, tokenizer)
    assert_same(encoder.encode(CAPTIONS), encode_padded(model, tokenizer, CAPTIONS))
    assert encoder.embed_dim == 64


@pytest.mark.parametrize("instruction", ["", "A", "Draw: "])
def test_short_or_no_instruction(instruction: str) -> None:
    for bos in (True, False):
        model, tokenizer = tiny_gemma(tokenizer="bpe", bos=bos)
        config = TextEncoderConfig(instruction=instruction)
        captions = [caption for caption in CAPTIONS if caption or instruction or bos]
        encoded = TextEncoder(model, tokenizer, config).encode(captions)
        assert_same(encoded, encode_padded(model, tokenizer, captions, config))


def test_null_without_bos_is_one_finite_token() -> None:
    embeds, mask = TextEncoder(*tiny_gemma(bos=False)).null()
    assert embeds.shape == (1, 1, 64) and mask.all() and embeds.isfinite().all()


def test_caption_does_not_depend_on_its_companions() -> None:
    encoder = TextEncoder(*tiny_gemma(tokenizer="merging"))
    together, mask = encoder.encode(CAPTIONS)
    backwards, _ = encoder.encode(CAPTIONS[::-1])
    assert_close(backwards.flip(0), together)
    for index, caption in enumerate(CAPTIONS):
        alone, _ = encoder.encode([caption])
        assert_close(alone[0], together[index][mask[index]])


def test_instruction_runs_once_and_padding_hardly() -> None:
    model, tokenizer = tiny_gemma()
    encoder = TextEncoder(model, tokenizer)
    num_chi = len(tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION))
    captions = [LONG[:length] for length in range(5, 400, 7)]
    num_real = sum(len(tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION + c.strip())) - (num_chi - 1) for c in captions)
    seen = record_inputs(model)
    encoder.encode(captions)
    first_call = sum(ids.numel() for ids in seen)
    seen.clear()
    encoder.encode(captions)
    second_call = sum(ids.numel() for ids in seen)
    assert num_real <= second_call <= 1.2 * num_real
    assert first_call - second_call == num_chi - 1


@pytest.mark.parametrize("use_instruction", [True, False])
def test_one_forward_is_bounded(monkeypatch: pytest.MonkeyPatch, use_instruction: bool) -> None:
    model, tokenizer = tiny_gemma()
    encoder = TextEncoder(model, tokenizer)
    captions = ["a red circle above a blue square"] * 200 + ["cat"] * 300
    encoder.encode([""])  # the instruction itself
    seen = record_inputs(model)
    encoder.encode(captions, use_instruction=use_instruction)
    assert max(ids.numel() for ids in seen) > 200

    monkeypatch.setattr(text_encoder, "MAX_FORWARD_TOKENS", 200)
    seen.clear()
    encoded = encoder.encode(captions, use_instruction=use_instruction)
    assert max(ids.numel() for ids in seen) <= 200
    circle, cat = encode_padded(model, tokenizer, captions[199:201], use_instruction=use_instruction)
    assert_same(encoded, [circle] * 200 + [cat] * 300)

    monkeypatch.setattr(text_encoder, "MAX_FORWARD_KEYS", 2000)
    seen.clear()
    encoder.encode(captions, use_instruction=use_instruction)
    prefix = len(tokenizer.encode(COMPLEX_HUMAN_INSTRUCTION)) - 1 if use_instruction else 0
    assert max(len(ids) * (prefix + ids.shape[1]) for ids in seen) <= 2000


def test_kept_prefix_is_never_changed_and_follows_the_weights() -> None:
    encoder = TextEncoder(*tiny_gemma(sliding_window=16))
    encoder.encode(["cat"])
    before = copy.deepcopy(encoder._get_prefix().layers)
    encoder.encode(CAPTIONS)
    for (keys, values), (keys_before, values_before) in zip(encoder._get_prefix().layers, before, strict=True):
        assert torch.equal(keys, keys_before) and torch.equal(values, values_before)

    exact, _ = encoder.encode(["cat"])
    encoder.to(torch.bfloat16).to(torch.float32)  # rounds the weights
    rounded, _ = encoder.encode(["cat"])
    fresh, _ = TextEncoder(encoder.model, encoder.tokenizer).encode(["cat"])
    assert torch.equal(rounded, fresh) and not torch.equal(rounded, exact)
    encoder.model.load_state_dict({name: 2 * tensor for name, tensor in encoder.model.state_dict().items()})
    loaded, _ = encoder.encode(["cat"])
    fresh, _ = TextEncoder(encoder.model, encoder.tokenizer).encode(["cat"])
    assert torch.equal(loaded, fresh) and not torch.equal(loaded, rounded)
    encoder.model.to(torch.bfloat16)  # behind the encoder's back
    half, _ = encoder.encode(["cat"])
    fresh, _ = TextEncoder(encoder.model, encoder.tokenizer).encode(["cat"])
    assert half.dtype == torch.bfloat16 and torch.equal(half, fresh)


def test_frozen_whatever_surrounds_it() -> None:
    encoder = TextEncoder(*tiny_gemma())
    with torch.inference_mode():
        encoder.encode(["cat"])
    expected, _ = encoder.encode(["cat"])
    nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder._apply(lambda tensor: tensor)  # forget the prefix
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds, _ = encoder.encode(["cat"])
    assert torch.equal(embeds, expected) and not embeds.requires_grad


def test_from_pretrained(tmp_path: Path) -> None:
    model, tokenizer = tiny_gemma()
    causal_lm = Gemma2ForCausalLM(model.config)
    causal_lm.model.load_state_dict(model.state_dict())
    causal_lm.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected, _ = TextEncoder(model, tokenizer, DIFFUSERS_PROMPTS).encode(CAPTIONS)

    loaded = TextEncoder.from_pretrained(
        tmp_path / "text_encoder", tokenizer_path=tmp_path / "tokenizer", config=DIFFUSERS_PROMPTS
    )
    assert torch.equal(loaded.encode(CAPTIONS)[0], expected)
    loaded.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(str(tmp_path / "saved"), config=DIFFUSERS_PROMPTS)
    assert torch.equal(again.encode(CAPTIONS)[0], expected)
    assert TextEncoder.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_only_eager_attention_soft_caps(tmp_path: Path) -> None:
    """Why `attn_implementation` is there: with logits beyond the cap, transformers' default gives something else."""
    model, _ = tiny_gemma()
    model.config.attn_logit_softcapping = 2.0
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    default, _ = TextEncoder.from_pretrained(tmp_path).encode(["cat"])
    capped, _ = TextEncoder.from_pretrained(tmp_path, attn_implementation="eager").encode(["cat"])
    uncapped, _ = TextEncoder(*tiny_gemma()).encode(["cat"])
    assert_close(default, uncapped)
    assert (capped - default).abs().max() > 0.1 * default.abs().max()


@pytest.mark.parametrize(
    ("captions", "error", "message"),
    [
        ("a cat", TypeError, r"'a cat' must be a list.*\[caption\]"),
        (["a cat", None], TypeError, r"captions\[1\]=None is a NoneType"),
        (["a cat", 3.5], TypeError, r"captions\[1\]=3.5 is a float"),
        ([], ValueError, "at least one"),
    ],
)
def test_bad_captions(captions: list[str], error: type[Exception], message: str) -> None:
    encoder = TextEncoder(*tiny_gemma())
    for call in (encoder.encode, encoder.count_tokens):
        with pytest.raises(error, match=message):
            call(captions)


def test_bad_max_tokens() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        TextEncoderConfig(max_tokens=0)
