"""Find faults in captions that a VLM wrote, by pure functions of the text; a policy decides what to do about them.

The patterns know English openings and excuses. The language itself is told by its script alone: a French caption passes where a
Chinese one is found.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pipelines.caption.config import QualityConfig

REFUSAL = re.compile(
    r"""^\W*(
        (i['’]?m|i\ am)\ (really\ |very\ |so\ )?sorry | sorry[,.!\ ] | i\ apologi[sz]e | unfortunately,?\ i\b
        | i\ (can\ ?not|can['’]t|could\ ?n[o'’]t|am\ unable|am\ not\ able|do\ not\ have|don['’]t\ have)\b
        | i['’]m\ (unable|not\ able)\b
        | (as|i\ am|i['’]m)\ an?\ (ai|artificial\ intelligence|(large\ )?language\ model|text-based|virtual\ assistant)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
BOILERPLATE = re.compile(
    r"""^\W*((sure|certainly|of\ course)[,.!:]\s*)?(
        here(['’]s|\ is)\ (a|an|the|your)\ [\w\ ,-]{0,40}(description|caption)[^.:\n]{0,60}[:.]\s*
        | (in\ )?(the|this)\ (provided\ |given\ |attached\ )?(image|picture|photo|photograph)
          (\ (you['’]ve\ |you\ )?(provided|shared))?,?\s*
          (there\ (is|are)|we\ (can\ )?see|you\ can\ see|appears\ to\ (show|be|depict)
            |(shows|depicts|features|displays|captures|presents|portrays|contains|illustrates|showcases|is)(\ of)?)
          [,:]?\s+
    )""",
    re.IGNORECASE | re.VERBOSE,
)
SENTENCE_END = re.compile(r"[.!?…。！？)\]\"'”’]\s*$")
# No English sentence ends on these; a caption that was cut without saying so often does.
# fmt: off
OPEN_WORDS = frozenset((
    "a", "an", "the", "and", "or", "but", "of", "with", "in", "on", "at", "by", "for", "to", "from", "as", "its", "their",
    "his", "her", "which", "that", "is", "are", "was", "were",
))
MAX_UNIT = 40
"""Longest repeated passage that is looked for, words."""
SAME_CHARACTER = re.compile(r"(\S)\1{15,}")


@dataclass(frozen=True)
class Fault:
    """`name`: the reject reason or flag; `detail`: for people."""

    name: str
    detail: str


def find_faults(caption: str, *, finish_reason: str, num_tokens: int, prompt: str, config: QualityConfig) -> list[Fault]:
    """All faults of one caption, whatever the policies are. `num_tokens` is counted for the token budget."""
    found = [
        ("refusal", REFUSAL.search(caption) and f"begins with {caption[:60]!r}"),
        ("prompt_echo", echoes(caption, prompt) and f"begins with the prompt {prompt[:60]!r}"),
        ("repetition", repetition(caption)),
        ("cut_off", cut_off(caption, finish_reason)),
        ("boilerplate", (opening := BOILERPLATE.search(caption)) and f"begins with {opening[0].strip()!r}"),
        ("wrong_script", wrong_script(caption, config.script)),
        ("over_budget", num_tokens > config.token_budget and f"{num_tokens} tokens, over token_budget={config.token_budget}"),
    ]
    return [Fault(name, detail) for name, detail in found if detail]


def find_same_captions(captions: Sequence[str], config: QualityConfig) -> dict[str, int]:
    """Captions that too many images of a shard share, with the number of images."""
    times = Counter(captions)
    least = max(config.same_caption_min, config.same_caption_share * len(captions))
    return {caption: count for caption, count in times.items() if count >= least}


def strip_boilerplate(caption: str) -> str:
    """Remove the opening and capitalize the rest; a caption that is only an opening is returned as it is."""
    rest = BOILERPLATE.sub("", caption, count=1).strip()
    return rest[:1].upper() + rest[1:] if rest and rest != caption else caption


def echoes(caption: str, prompt: str) -> bool:
    """Whether a caption begins with the prompt; prompts of one or two words are not checked."""
    asked = _words(prompt)
    return len(asked) > 2 and _words(caption)[: len(asked)] == asked


def repetition(caption: str) -> str | None:
    """A description of the caption's repetition, or None.

    A passage that stands three times in a row (a single word five times, two words four times), one character sixteen times,
    or one sentence three times anywhere.
    """
    if match := SAME_CHARACTER.search(caption):
        return f"{match[1]!r} stands {len(match[0])} times in a row"
    words = _words(caption)
    for size in range(1, min(MAX_UNIT, len(words) // 3) + 1):
        least, run = {1: 5, 2: 4}.get(size, 3), 0
        for place in range(size, len(words)):
            run = run + 1 if words[place] == words[place - size] else 0
            if run >= size * (least - 1):
                unit = " ".join(words[place - size + 1 : place + 1])
                return f"{unit!r} stands {least} times in a row"
    sentences = Counter(" ".join(_words(sentence)) for sentence in re.split(r"[.!?\n]+", caption))
    sentence, times = max(sentences.items(), key=lambda entry: entry[1] if len(entry[0].split()) > 2 else 0)
    return f"the sentence {sentence!r} stands {times} times" if times >= 3 and len(sentence.split()) > 2 else None


def cut_off(caption: str, finish_reason: str) -> str | None:
    """Why the caption seems to be cut off, or None. A missing full stop alone does not count."""
    if finish_reason == "length":
        return "the model was stopped by the limit on its tokens"
    text = caption.rstrip()
    words = _words(text)
    if SENTENCE_END.search(text) or not words:
        return None
    if text[-1] in ",;:-–—" or words[-1] in OPEN_WORDS:
        return f"ends with {text[-30:]!r}"
    return None


def wrong_script(caption: str, script: str) -> str | None:
    """A description of the other scripts if over a fifth of the letters are not of `script`, or None."""
    scripts = Counter(_script(character) for character in caption if character.isalpha())
    others = scripts.total() - scripts[script]
    if others <= 0.2 * scripts.total():
        return None
    told = ", ".join(f"{name} {count}" for name, count in scripts.most_common() if name != script)
    return f"{others} of {scripts.total()} letters are not {script}: {told}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split()[0]
