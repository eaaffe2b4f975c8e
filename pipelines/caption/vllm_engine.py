"""The `vllm` engine: rows go through `ray.data.llm`, whose actors each run a vLLM engine that batches by itself."""

import importlib.util
from functools import partial
from typing import Any

import ray

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.rows import (
    Answer,
    CaptionJudge,
    Outcome,
    data_uri,
    make_question,
    message,
    refusal_of,
)
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.rows import stream_rows
from pipelines.stages.run import run_stream
from pipelines.stages.shards import LIGHT
from pipelines.storage.lease import Leases
from pipelines.tables.chance import row_seed
from pipelines.tables.errors import StageError
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table
from pipelines.workers.models import pretrained

ERROR = "__inference_error__"
"""Column of ray.data.llm: rows that have a value in it skip the engine."""
ASKED = ("shard", "place", "shard_rows", "id", "source_uri", "caption", "reason", "detail")
INSTALL = 'pip install "sana-on-ray[vllm]"'
ANSWERED = ("generated_text", "generated_tokens", ERROR)


def run_vllm(
    output: Table, identity: Identity, images: Table, config: CaptionerConfig, *, on_progress: OnProgress, leases: Leases | None
) -> StageResult:
    """Make the missing shards of `output`. Raises as `run_stream`."""
    stream = partial(
        stream_rows,
        output,
        identity.fingerprint,
        num_actors=config.resources.num_actors,
        read_shard=partial(images.read_shard, columns=config.columns),
        make_row=partial(make_request, config=config),
        run_model=partial(run_engine, config=config),
        make_finisher=partial(AnswerReader, config),
    )
    return run_stream(
        output,
        identity,
        images.list_shards(),
        stream,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


def make_request(row: Row, config: CaptionerConfig) -> Row:
    """A row of `images` as plain strings. If its image cannot be decoded, the engine skips it, and the row has the reason."""
    kept = {name: row.get(name) or "" for name in ("id", "source_uri", "caption")}
    try:
        question = make_question(row, config)
    except RowRefused as error:
        return {**kept, "reason": error.reason, "detail": error.detail, ERROR: error.reason, "question": "", "image_uri": ""}
    uri = data_uri(question.image, "png")
    return {**kept, "reason": "", "detail": "", ERROR: "", "question": question.prompt, "image_uri": uri}


def ask(row: Row, config: CaptionerConfig) -> Row:
    """The columns that the stages of ray.data.llm read."""
    if row[ERROR]:
        return {}
    sampling = config.sampling
    params: Row = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        params["seed"] = row_seed(sampling.seed, row["id"])
    return {"messages": [message(row["question"], row["image_uri"])], "sampling_params": params}


def run_engine(dataset: ray.data.Dataset, config: CaptionerConfig) -> ray.data.Dataset:
    """Requests -> answers, through the stages of ray.data.llm."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from pipelines.caption.vllm_guard import guard_engine

    if not ray.get(ray.remote(num_cpus=LIGHT)(_has_vllm).remote()):
        raise StageError(f"captioner {config.name!r}: engine=vllm needs vLLM on the nodes of the cluster: {INSTALL}")
    options, (model, pinned) = config.vllm, pretrained(config.model, config.revision)
    trusted = config.trust_remote_code
    code = {"trust_remote_code": trusted, **pinned}
    engine_kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_prefix_caching": options.prefix_caching,
        "limit_mm_per_prompt": {"image": 1},
        **({"max_model_len": config.context_length} if config.context_length else {}),
        **code,
        **options.engine_args,
    }
    from transformers import AutoProcessor

    template = AutoProcessor.from_pretrained(
        model, trust_remote_code=trusted, **pinned
    ).chat_template  # that stage would take it of "main"
    resources, parts = config.resources, options.tensor_parallel_size
    bundle = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    messages = {"chat_template_content_format": options.content_format, "model_config_kwargs": code}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=engine_kwargs,
            batch_size=options.batch_size,
            concurrency=(resources.num_actors, resources.num_actors),
            max_concurrent_batches=options.max_concurrent_batches,
            placement_group_config={"bundles": [{name: value / parts for name, value in bundle.items() if value}] * parts},
            runtime_env={"env_vars": options.env} if options.env else None,
            should_continue_on_error=True,
            log_engine_metrics=False,
            prepare_multimodal_stage={"enabled": True, **messages},
            chat_template_stage={"enabled": True, "chat_template": template},
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        preprocess=partial(ask, config=config),
        postprocess=keep_answer,
    )
    guard_engine(processor)
    return processor(dataset).map(keep_answer)  # once more: what passed by the engine passed by the first


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def keep_answer(row: Row) -> Row:
    """Keep the answer and drop the image, so that it never reaches the driver."""
    return {name: row.get(name) for name in ASKED + ANSWERED}


class AnswerReader:
    """Reads the answers of the engine and judges them."""

    def __init__(self, config: CaptionerConfig):
        self.judge = CaptionJudge(config)
        self.stops = stop_tokens(config)

    def finish(self, rows: list[Row]) -> ShardOutput:
        return self.judge.judge(rows, [self._read(row) for row in rows])

    def _read(self, row: Row) -> Outcome:
        if row["reason"]:
            return RowRefused(row["reason"], row["detail"])
        if row[ERROR]:
            return refusal_of(row[ERROR])
        tokens = list(row["generated_tokens"])
        ended = bool(tokens) and tokens[-1] in self.stops
        return Answer(row["generated_text"], len(tokens) - ended, "stop" if ended else "length")


def stop_tokens(config: CaptionerConfig) -> set[int]:
    """The token ids that end a caption, as vLLM has them: from the tokenizer and the generation settings."""
    model, pinned = pretrained(config.model, config.revision)
    options: dict[str, Any] = dict(pinned)
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code, **options)
    try:
        known = GenerationConfig.from_pretrained(model, trust_remote_code=False, **options).eos_token_id
    except OSError:  # there is no such file
        known = None
    return {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
