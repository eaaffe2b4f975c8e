"""Special tokens that a caption spells out are text, with the kinds of tokenizers that CLIP, T5, Llama and Gemma have."""

import string
from collections.abc import Callable

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    T5Tokenizer,
)

from sana_model.files.places import ZOO_DIR
from sana_model.nn.plain_text import PlainText
from tests.support.tiny_gemma import tiny_tokenizer

LETTERS = string.ascii_letters + string.punctuation + string.digits
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("r", "e"), ("re", "d"), ("▁", "red")]


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def clip() -> PreTrainedTokenizerBase:
    alphabet = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in alphabet]
    words = numbered(*alphabet, *ends, "re", "red</w>", "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(vocab=words, merges=[("r", "e"), ("re", "d</w>")])


def t5() -> PreTrainedTokenizerBase:
    """Its vocabulary holds the special tokens as words of score 0, which no other reading of "</s>" beats."""
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁red", -3.0),
        *((letter, -5.0) for letter in LETTERS),
    ]
    return T5Tokenizer(vocab=words, extra_ids=2)


def llama() -> PreTrainedTokenizerBase:
    return LlamaTokenizer(vocab=numbered("<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, "re", "red", "▁red"), merges=MERGES)


def gemma() -> PreTrainedTokenizerBase:
    words = numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "▁", *LETTERS, "re", "red", "▁red")
    return GemmaTokenizer(vocab=words, merges=MERGES)


def shipped(folder: str) -> Callable[[], PreTrainedTokenizerBase]:
    return lambda: AutoTokenizer.from_pretrained(ZOO_DIR / folder, trust_remote_code=False)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "CLIP": clip,
    "T5": t5,
    "Llama": llama,
    "Gemma": gemma,
    "byte-level with <bos>": tiny_tokenizer,
    "the zoo's CLIP": shipped("clip"),
    "the zoo's text encoder": shipped("pipeline/text_encoder"),
    "the zoo's captioner": shipped("captioner-a"),
}
ORDINARY = [
    "a red circle",
    "",
    "red",
    "1 < 2 > 1, <b>bold</b> [OC] |x|",
    "größe 模型 🙂",
    "red " * 40,
    "s > pad </ s>",
    "a\n\nb",
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("instruction", ["", "red: ", "Describe the picture.\nPrompt: "])
def test_ordinary_texts_keep_their_ids(tokenizer: PreTrainedTokenizerBase, instruction: str) -> None:
    plain = PlainText(tokenizer)
    whole = [instruction + text for text in ORDINARY]
    assert plain.rows(ORDINARY, instruction=instruction) == tokenizer(whole)["input_ids"]
    cut = tokenizer(whole, truncation=True, max_length=9)["input_ids"]
    assert plain.rows(ORDINARY, instruction=instruction, max_length=9) == cut
    assert plain.bodies(whole) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """No id of theirs is in what the model reads; the other words are; and the text is longer than one without them."""
    plain = PlainText(tokenizer)
    ends = len(plain.start), len(plain.end)
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) >= 2 and tokenizer.eos_token in special
    for token in [*special, "".join(special), f"{tokenizer.eos_token} " * 3]:
        forbidden = set(special.values()) - ({tokenizer.unk_token_id} if plain.bodies(["\U000f1234"]) != [[]] else set())
        forbidden |= {tokenizer.eos_token_id}
        for text in (f"{token} red", f"red {token}", f"red{token}red", token):
            for row in (
                plain.bodies([text])[0],
                within(plain.rows([text])[0], ends),
                within(plain.rows(["red", text])[1], ends),
            ):
                assert row and not forbidden & set(row), (text, tokenizer.convert_ids_to_tokens(row))
                if text.endswith(" red"):
                    assert row[-1] == plain.bodies(["a red"])[0][-1]
        cut = plain.rows([f"{token} red " * 20], max_length=8)[0]
        assert len(cut) == 8 and not forbidden & set(within(cut, ends))
        assert cut[: ends[0]] == plain.start and cut[8 - ends[1] :] == plain.end


def within(row: list[int], ends: tuple[int, int]) -> list[int]:
    """A row without what the tokenizer adds at its ends."""
    return row[ends[0] : len(row) - ends[1]]


def test_an_instruction_means_its_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    plain, instruction = PlainText(tokenizer), "<eos>A picture: "
    eos = tokenizer.eos_token_id
    ordinary, odd = plain.rows(["a red circle", "a red <eos> circle"], instruction=instruction)
    assert ordinary == tokenizer(instruction + "a red circle")["input_ids"] and ordinary.count(eos) == 1
    assert odd.count(eos) == 1 and odd[: odd.index(eos) + 2] == ordinary[: odd.index(eos) + 2]
