"""The verifier of Sana 1.5's inference-time scaling: a VLM says whether a picture fits its prompt."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from pipelines.evaluate.dpg.questions import read_answer
from pipelines.evaluate.metric import iter_shards
from pipelines.evaluate.verifier_config import PROMPT, VerifierConfig
from pipelines.evaluate.vlm import VlmMetric
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from pipelines.caption.rows import Outcome

SPACES = " \u0120\u2581"
"""As tokenizers spell it, too: BPE and SentencePiece."""


class Verifier(VlmMetric[VerifierConfig]):
    """Xie et al. 2025 (SANA 1.5, arXiv 2501.18427). Figure: `verifier`, the share of pictures of which the VLM says yes.

    Which of two pictures is the better one is as in NVlabs' `nvila_sana_pick.py`: yes is better than no; of two yes, the surer;
    of two no, the less sure. It asks about each picture alone, so once a picture is enough for a whole tournament. "Sure" is
    there the logit of the first token, and here its log-probability, since servers tell no logits.
    """

    name: ClassVar = "verifier"

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        from pipelines.caption.rows import Question, as_text

        asked = [self.config.question.replace(PROMPT, as_text(row["prompt"])) for row in rows]
        questions = [
            Question(row["id"], row["picture"], prompt, self.config.num_first_tokens)
            for row, prompt in zip(rows, asked, strict=True)
        ]
        return [self._read(outcome) for outcome in self.asker.ask(questions)]

    def _read(self, outcome: "Outcome") -> Row | RowRefused:
        from pipelines.caption.rows import ScoredAnswer

        if isinstance(outcome, RowRefused):
            return outcome
        if not isinstance(outcome, ScoredAnswer):
            raise StageError(f"{self.config.model} tells no log-probabilities of tokens: take a server that does, such as vLLM")
        yes = bool(read_answer(outcome.caption))  # what is neither yes nor no counts as no, as published
        return {"yes": yes, "log_prob": word_log_prob(outcome.first_tokens, "yes" if yes else "no")}

    @classmethod
    def rank(cls, row: Row) -> tuple[float, ...]:
        """Yes before no; then the surest yes, and the least sure no."""
        return (1.0, row["log_prob"]) if row["yes"] else (0.0, -row["log_prob"])

    @classmethod
    def describe(cls, row: Row) -> list[str]:
        return [f"{'yes' if row['yes'] else 'no'}, log-probability {row['log_prob']:.4g}"]

    @classmethod
    def summarize(cls, table: Table, config: VerifierConfig) -> dict[str, float]:
        said = Counter(value for _, _, value in cls.scores(table))
        return {cls.name: said[1.0] / said.total()} if said else {}

    @classmethod
    def scores(cls, table: Table) -> Iterator[tuple[str, str, float]]:
        for shard in iter_shards(table, ["prompt", "yes"]):
            for row in shard.to_pylist():
                yield cls.name, row["prompt"], float(row["yes"])


def word_log_prob(first_tokens: Mapping[str, float], word: str) -> float:
    """The log-probability that an answer begins with a word, in any case and with or without a space before it.

    Args:
        first_tokens: the log-probabilities of the likeliest first tokens, by their texts. A word that is not among them is at
            most as likely as the least likely of them: that is returned.
    """
    own = [value for token, value in first_tokens.items() if token.strip(SPACES).lower() == word]
    return math.log(sum(math.exp(value) for value in own)) if own else min(first_tokens.values(), default=-100.0)
