"""The `http` engine: any OpenAI-compatible endpoint.

A row that the server refuses is a reject; a server that is down ends the job, and what was written stays.
"""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pyarrow as pa
from PIL import Image
from tenacity import RetryCallState, Retrying, retry_if_result

from pipelines.caption.config import CaptionerConfig, HttpConfig
from pipelines.caption.rows import (
    Answer,
    CaptionJudge,
    Outcome,
    Question,
    ScoredAnswer,
    data_uri,
    make_question,
    message,
    refusal_of,
    source_rows,
)
from pipelines.stages.contract import ShardOutput
from pipelines.tables.chance import row_seed
from pipelines.tables.errors import StageError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from sana_model.files.redact import SHORTEST_SECRET, redact, texts_in
from sana_model.files.retry import TRANSIENT_STATUS, Backoff, parse_retry_after

ROW_STATUS = {400, 413, 415, 422}
"""The server has read the request, and will not have it: the row is refused."""
BUSY_STATUS = {409, *TRANSIENT_STATUS} - {500, 502, 504}
"""Not now: the row has no part in it, and waits. For any other status from 500 on it may be blamed; what is left under 500 (no
key, no such model) ends the job at once."""
SIZE_OF_TRIAL = 32  # pixels
AGAIN = "Start again when the server is back: what is finished stays"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trouble:
    """An attempt that may go better later. `is_busy`: the row cannot be why; `retry_after`: seconds, where they were named."""

    detail: str
    is_busy: bool = False
    retry_after: float | None = None


class HttpCaptioner:
    """Ray Data actor: images -> captions, by a server elsewhere."""

    def __init__(self, config: CaptionerConfig):
        self.config = config
        self.options = config.http
        key = os.environ.get(self.options.api_key_variable)
        limits = httpx.Limits(max_connections=self.options.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(headers=headers, limits=limits, timeout=self.options.timeout)
        self.url = f"{self.options.base_url.rstrip('/')}/chat/completions"
        self.shown_url = redact(self.url)
        # Servers quote the request in their complaints. Short texts are words such as "low", which messages have anyway.
        given = {key or "", *texts_in(self.options.extra)}
        self.secrets = {secret for secret in given if len(secret) >= SHORTEST_SECRET}
        self.judge = CaptionJudge(config)

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of captions for each image, or a reject. Raises StageError if the server is at fault."""
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="ask")
        try:
            outcomes = list(pool.map(self._describe, table.to_pylist()))
        finally:
            pool.shutdown(cancel_futures=True)
        return self.judge.judge(source_rows(table), outcomes)

    def _describe(self, row: Row) -> Outcome:
        try:
            question = make_question(row, self.config)
        except RowRefused as error:
            return error.bare()
        return self.answer(question)

    def answer(self, question: Question) -> Outcome:
        """Ask, again and again where it helps. Raises StageError if no other row would fare better."""
        limits = _Limits(self.shown_url, self.options)
        told = Retrying(
            retry=retry_if_result(lambda told: isinstance(told, Trouble)),
            stop=limits.are_reached,
            wait=Backoff(first=self.options.backoff, longest=self.options.max_backoff),
            before_sleep=limits.spend,
            retry_error_callback=lambda state: self._give_up(_trouble(state)),
        )(self._ask, self._body(question))
        assert not isinstance(told, Trouble)
        return told

    def _give_up(self, told: Trouble) -> RowRefused:
        """Refuse the row if the server answers something else. Raises StageError if it does not, or is busy."""
        if told.is_busy:
            raise StageError(f"{self.shown_url} is busy for {self.options.patience:g} s: {told.detail}. {AGAIN}")
        trial = Question("trial", Image.new("RGB", (SIZE_OF_TRIAL, SIZE_OF_TRIAL), "white"), "Describe the image.")
        if isinstance(self._ask(self._body(trial) | {"max_tokens": 1}), Trouble):
            attempts = f"{self.options.max_attempts} attempts at a request"
            raise StageError(f"{self.shown_url} gave up after {attempts}: {told.detail}. {AGAIN}")
        return RowRefused("server_error", f"the server answers others, but not this row: {told.detail}"[:500])

    def _ask(self, body: Row) -> Outcome | Trouble:
        """One attempt. Raises StageError for what no attempt can change."""
        try:
            response = self.client.post(self.url, json=body)
        except httpx.RequestError as error:
            return Trouble(self._hide(f"{type(error).__name__}: {error}"))
        status = response.status_code
        if status in ROW_STATUS:
            return refusal_of(f"{status}: {self._complaint(response)}")
        if status in BUSY_STATUS or status >= 500:
            return Trouble(
                f"{status}: {self._complaint(response)}",
                status in BUSY_STATUS,
                parse_retry_after(response.headers.get("retry-after")),
            )
        if status != 200:
            told = f"{status}: {self._complaint(response)}"
            raise StageError(f"{self.shown_url} answers {told}. Look at http.base_url, model and the key")
        return self._read(response)

    def _complaint(self, response: httpx.Response) -> str:
        return self._hide(read_complaint(response))[:400]

    def _hide(self, text: str) -> str:
        return redact(text, self.secrets)

    def _read(self, response: httpx.Response) -> Outcome | Trouble:
        """The body of an answer that says 200, which may be an error all the same."""
        try:
            content = response.json()
            if content.get("error"):
                code = content["error"].get("code") if isinstance(content["error"], dict) else None
                complaint = f"200 with an error: {self._complaint(response)}"
                return refusal_of(complaint) if code in ROW_STATUS else Trouble(complaint, code in BUSY_STATUS)
            choice = content["choices"][0]
            caption, reason = choice["message"].get("content"), choice.get("finish_reason") or "stop"
            used = (content.get("usage") or {}).get("completion_tokens")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            told = self._hide(response.text)[:200]
            return Trouble(f"200 with what is no chat completion ({type(error).__name__}): {told!r}")
        if reason == "content_filter" or choice["message"].get("refusal"):
            told = self._hide(str(choice["message"].get("refusal") or reason))
            return RowRefused("refusal", f"the server refused: {told}"[:500])
        caption = caption if isinstance(caption, str) else ""
        ended = reason != "length"
        # The token that ends a caption is counted by servers; one that counts none is helped out by words.
        num_tokens = len(caption.split()) if used is None else max(int(used) - ended, 0)
        answer = Answer(caption, num_tokens, "stop" if ended else "length")
        first = _first_tokens(choice)
        return answer if first is None else ScoredAnswer(**vars(answer), first_tokens=first)

    def _body(self, question: Question) -> Row:
        sampling = self.config.sampling
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [message(question.prompt, data_uri(question.image, self.options.image_format))],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
        }
        if question.num_first_tokens:
            body |= {"logprobs": True, "top_logprobs": question.num_first_tokens}
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p, "seed": row_seed(sampling.seed, question.row_id)}
        return body | self.options.extra


def _first_tokens(choice: Row) -> dict[str, float] | None:
    """The log-probabilities of the first tokens of a chat completion's choice; None if the server told none."""
    try:
        return {told["token"]: float(told["logprob"]) for told in choice["logprobs"]["content"][0]["top_logprobs"]}
    except (KeyError, IndexError, TypeError, ValueError):
        return None


class _Limits:
    """How long one request is asked again: `max_attempts` faults, or `patience` seconds of a busy server."""

    def __init__(self, url: str, options: HttpConfig):
        self.url, self.max_attempts, self.patience = url, options.max_attempts, options.patience
        self.faults = 0
        self.begun = time.monotonic()  # of the attempt

    def are_reached(self, state: RetryCallState) -> bool:
        """tenacity's `stop`."""
        told = _trouble(state)
        self.faults += not told.is_busy
        return self.patience <= 0 if told.is_busy else self.faults == self.max_attempts

    def spend(self, state: RetryCallState) -> None:
        """tenacity's `before_sleep`: log the attempt, and count its time and the wait that follows as patience."""
        told, wait = _trouble(state), state.upcoming_sleep
        logger.warning("%s: %s; attempt %d, again in %.1f s", self.url, told.detail, state.attempt_number, wait)
        next_begin = time.monotonic() + wait
        self.patience -= (next_begin - self.begun) * told.is_busy
        self.begun = next_begin


def _trouble(state: RetryCallState) -> Trouble:
    assert state.outcome is not None
    return state.outcome.result()


def read_complaint(response: httpx.Response) -> str:
    """What an error's body says, on one line."""
    try:
        content = response.json()
        error = content.get("error", content.get("detail", content))
        text = error.get("message") or json.dumps(error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split()) or response.reason_phrase
