"""What is found in captions, and what is left alone."""

import pytest

from pipelines.caption.config import FAULTS, CaptionerConfig, QualityConfig
from pipelines.caption.faults import find_faults, find_same_captions, repetition, strip_boilerplate
from pipelines.caption.rows import Answer, CaptionJudge, Outcome
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import CAPTIONS, Row

GOOD = (
    "A tabby cat sleeps on a red velvet sofa beside a window. Soft afternoon light falls across its fur, and a very, very old "
    "clock hangs on the wall behind it. On the left, a green plant; on the right, a green lamp."
)


def faults(caption: str, *, finish_reason: str = "stop", num_tokens: int = 40, prompt: str = "Describe it.") -> list[str]:
    found = find_faults(caption, finish_reason=finish_reason, num_tokens=num_tokens, prompt=prompt, config=QualityConfig())
    return [fault.name for fault in found]


@pytest.mark.parametrize(
    "caption",
    [
        GOOD,
        "a large red solid circle in the center of a white background",  # no sentence, and whole
        "The sign says 'I am sorry, we are closed'.",
        "A robot holds a card that reads: as an AI I can help.",
        "Une chatte dort sur un canapé rouge.",  # another language, the same letters
        "A woman in a knit sweater, with the word ΑΘΗΝΑ on it.",
        "Tom Tom's map, New York, New York: a very very very long bridge.",
        "Cannot Street: an old street sign on a brick wall.",
        "The imageboard's front page on a laptop screen.",
        "5 5 5 5",
        "…",
    ],
)
def test_whole_captions_are_left_alone(caption: str) -> None:
    assert faults(caption) == []


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("I'm sorry, but I can't assist with that.", ["refusal"]),
        ("I’m really sorry. I cannot describe this picture.", ["refusal"]),
        ("Sorry, I can't help with identifying people.", ["refusal"]),
        ("As an AI language model, I do not see images.", ["refusal"]),
        ("I cannot see any image here.", ["refusal"]),
        ("Unfortunately, I am not able to view it.", ["refusal"]),
        ("Describe it.", []),  # a prompt of two words proves nothing
        ("The image shows a cat on a sofa.", ["boilerplate"]),
        ("This picture depicts a cat.", ["boilerplate"]),
        ("In the image, there is a cat.", ["boilerplate"]),
        ("Sure! Here is a detailed description of the image: a cat.", ["boilerplate"]),
        ("A cat on a sofa and the", ["cut_off"]),
        ("A cat on a sofa,", ["cut_off"]),
        ("Кошка спит на красном диване.", ["wrong_script"]),
        ("一只猫睡在红色沙发上。", ["wrong_script"]),
        ("A cat. A cat. A cat. A cat.", ["repetition"]),
        ("The cat is on the sofa. It sleeps. The cat is on the sofa. It dreams. The cat is on the sofa.", ["repetition"]),
        ("red red red red red red", ["repetition"]),
        ("Wow!!!!!!!!!!!!!!!!!!!!!", ["repetition"]),
    ],
)
def test_faults_are_found(caption: str, expected: list[str]) -> None:
    assert faults(caption) == expected


def test_a_loop_is_found_however_long_its_passage_and_wherever_it_starts() -> None:
    words = [f"word{number}" for number in range(40)]
    assert repetition(" ".join(["It", "begins", *words * 3, "word0"])) is not None
    assert repetition(" ".join(words * 2)) is None
    assert repetition("") is None


def test_faults_that_the_text_alone_does_not_tell() -> None:
    assert faults("A cat sleeps.", finish_reason="length") == ["cut_off"]
    assert faults(GOOD, num_tokens=301) == ["over_budget"] and faults(GOOD, num_tokens=300) == []
    prompt = "Describe this image in detail."
    assert faults("Describe this image in detail. A cat.", prompt=prompt) == ["prompt_echo"]


def test_boilerplate_is_stripped_and_nothing_else() -> None:
    assert strip_boilerplate("The image shows a cat on a sofa.") == "A cat on a sofa."
    assert strip_boilerplate("In this photo, we can see two dogs.") == "Two dogs."
    assert strip_boilerplate(GOOD) == GOOD
    assert strip_boilerplate("The image shows ") == "The image shows "


def test_the_same_caption_on_many_images_depends_on_how_many_there_are() -> None:
    config = QualityConfig(same_caption_min=3, same_caption_share=0.1)
    assert find_same_captions(["a"] * 3 + list("bcdefg"), config) == {"a": 3}
    assert find_same_captions(["a"] * 2 + list("bcdefg"), config) == {}
    assert find_same_captions(["a"] * 3 + [str(number) for number in range(60)], config) == {}
    assert find_same_captions([], config) == {}


def judge(quality: QualityConfig, outcomes: list[Outcome]) -> tuple[dict[str, list[str]], dict[str, str], dict[str, float]]:
    """Flags by id, reject reasons by id, figures."""
    source: list[Row] = [{"id": str(place), "source_uri": f"{place}.png"} for place in range(len(outcomes))]
    made = CaptionJudge(CaptionerConfig(name="a", model="a", quality=quality)).judge(source, outcomes)
    flags = {row["id"]: row["flags"] for row in made.rows}
    return flags, {row["id"]: row["reject_reason"] for row in made.rejects}, dict(made.figures)


def test_a_policy_says_what_follows() -> None:
    outcomes: list[Outcome] = [
        Answer(GOOD, 60, "stop"),
        Answer("I'm sorry, I cannot see the", 9, "length"),
        Answer("The image shows a cat and the", 8, "length"),
        Answer("  ", 1, "stop"),
        RowRefused("not_an_image", "no bytes"),
    ]
    flags, rejects, figures = judge(QualityConfig(), outcomes)
    assert flags == {"0": [], "2": ["cut_off", "boilerplate"]}
    assert rejects == {"1": "refusal", "3": "empty_caption", "4": "not_an_image"}
    assert figures["flagged.cut_off"] == figures["flagged.boilerplate"] == 0.5 and figures["flagged.over_budget"] == 0
    assert "flagged.refusal" not in figures

    off = QualityConfig(**{name: "off" for name in FAULTS})
    assert judge(off, outcomes)[0] == {"0": [], "1": [], "2": []}
    flag_all = QualityConfig(**{name: "flag" for name in FAULTS})
    assert judge(flag_all, outcomes)[0]["1"] == ["refusal", "cut_off"]
    strict = QualityConfig(cut_off="reject", refusal="off")
    assert judge(strict, outcomes)[1] == {"1": "cut_off", "2": "cut_off", "3": "empty_caption", "4": "not_an_image"}


def test_what_is_stripped_is_judged_afterwards() -> None:
    source: list[Row] = [{"id": "0", "source_uri": "0.png"}]
    config = CaptionerConfig(name="a", model="a", quality=QualityConfig(boilerplate="strip"))
    made = CaptionJudge(config).judge(source, [Answer("The image shows a cat.", 6, "stop")])
    assert [(row["caption"], row["flags"]) for row in made.rows] == [("A cat.", [])]


def test_half_a_character_is_replaced() -> None:
    """Servers cut answers at a token, which may be one half of a pair of UTF-16."""
    source: list[Row] = [{"id": str(place), "source_uri": f"{place}.png"} for place in range(2)]
    outcomes: list[Outcome] = [Answer("a cat \ud83d", 6, "stop"), RowRefused("refusal", "no cats \ud83d")]
    rows, rejects = CaptionJudge(CaptionerConfig(name="a", model="a")).judge(source, outcomes).tables(CAPTIONS)
    assert rows["caption"].to_pylist() == ["a cat ?"]
    assert rejects["detail"].to_pylist() == ["no cats \\ud83d"]


def test_the_budget_is_counted_by_the_text_encoders_tokenizer() -> None:
    caption = "a red circle on the left"
    counted = QualityConfig(token_budget=4, budget_tokenizer="zoo://pipeline/text_encoder")
    flags, _, _ = judge(counted, [Answer(caption, 1, "stop")])
    assert flags == {"0": ["over_budget"]}
    assert judge(QualityConfig(token_budget=4), [Answer(caption, 1, "stop")])[0] == {"0": []}


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="token_budget=0 must be at least 1"):
        QualityConfig(token_budget=0)
