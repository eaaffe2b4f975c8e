"""What a training will take, told before it takes anything: weights, memory by part, steps, the dataset, problems."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.data import TrainingStream
from pipelines.flops import PEAK_FLOPS, step_flops
from pipelines.memory import (
    Memory,
    ModelSizes,
    StepShape,
    count_activations,
    count_decoding,
    count_text_activations,
    count_weights,
    estimate_memory,
    fake_transformer,
)
from pipelines.model_shapes import ModelShapes, find_shapes
from pipelines.schema import LATENTS
from pipelines.tables import MissingTableError, Table
from pipelines.train_config import TrainConfig
from sana_model.text_encoder import TextEncoder

MOST_SHARDS = 200  # whose buckets are counted; of a longer table, as many spread over it, and the rest by their share
MOST_CAPTIONS = 2000
ASSUMED_SHARE = 0.4  # of a GPU's peak that a training reaches
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What there is to train on; None in `rows`: no table yet, and the sizes are those of the square image.

    buckets: samples by (height, width) of the latents. caption_tokens: of each caption of a sample of them.
    truncated: how many of those the text encoder cuts.
    """

    rows: int | None = None
    shards: int = 0
    channels: int = 0
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    caption_tokens: Sequence[int] = ()
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The result. `problems`: in plain words, the gravest first."""

    training: TrainConfig
    shapes: ModelShapes
    sizes: ModelSizes
    memory: Memory
    step: StepShape
    dataset: DatasetFacts
    problems: list[str]


def run_preflight(dataset_uri: str, training: TrainConfig, *, device_gib: float) -> Preflight:
    """Look at configuration, models' shapes and table; computes on tensors without values, and needs no Ray and no GPU.

    Raises FileNotFoundError or ValueError if the shape of the transformer cannot be known.
    """
    problems: list[str] = []
    shapes = find_shapes(training, problems)
    dataset = read_dataset(dataset_uri, training, shapes.caption_counter, problems)
    step = _largest_step(training, shapes, dataset)
    dtype = training.engine.torch_dtype
    with fake_transformer(shapes.transformer, training) as model:
        total, trained = count_weights(model)
        activations = count_activations(model, step, dtype)
    sizes = ModelSizes(
        transformer=total, trained=trained, text_encoder=shapes.text_encoder_size, autoencoder=shapes.autoencoder_size
    )
    text_activations = decoding = 0
    if shapes.text_encoder is not None:
        text_activations = count_text_activations(shapes.text_encoder, step.samples, step.caption_tokens, dtype)
    if shapes.autoencoder is not None and training.grid.prompts:
        side = shapes.transformer.base_size * shapes.transformer.patch_size * shapes.autoencoder.compression
        decoding = count_decoding(shapes.autoencoder, len(training.grid.prompts), (side, side), dtype)
    memory = estimate_memory(
        training,
        sizes,
        activations=activations,
        text_activations=text_activations,
        decoding=decoding,
        on_gpu=training.resources.num_gpus > 0,
    )
    if training.resources.num_gpus > 0 and memory.total > device_gib * GIB:
        problems.insert(0, _too_large(training, memory, device_gib))
    problems += _find_problems(training, shapes, dataset)
    return Preflight(
        training=training, shapes=shapes, sizes=sizes, memory=memory, step=step, dataset=dataset, problems=problems
    )


def read_dataset(dataset_uri: str, training: TrainConfig, counter: TextEncoder | None, problems: list[str]) -> DatasetFacts:
    """Rows, buckets and captions of the latents table, if there is one."""
    table = Table(dataset_uri, training.latents, LATENTS)
    try:
        manifest = table.require()
    except MissingTableError:
        problems.append(f"{table.uri} is not there yet: rows, buckets and captions are not counted")
        return DatasetFacts()
    if not manifest.complete:
        problems.append(f"{table.uri} is not complete: the training will refuse it until its stage has finished")
    shards = table.list_shards()
    try:
        TrainingStream(
            table,
            training.data,
            micro_batch_size=training.micro_batch_size,
            seed=training.seed,
            world_size=training.num_workers,
        )
    except ValueError as error:
        problems.append(str(error))
    rows = sum(table.read_facts(shard).num_rows for shard in shards)
    looked_at = shards[:: -(-len(shards) // MOST_SHARDS)] if shards else []
    counted: Counter[tuple[int, int]] = Counter()
    channels, captions = 0, list[str]()
    for shard in looked_at:
        columns = ["channels", "height", "width"] + (["captions"] if len(captions) < MOST_CAPTIONS else [])
        for row in table.read_shard(shard, columns).to_pylist():
            counted[row["height"], row["width"]] += 1
            channels = row["channels"]
            captions += [caption["caption"] for caption in row.get("captions", ())]
    seen = counted.total()
    buckets = Counter({bucket: round(count * rows / seen) for bucket, count in counted.items()})
    tokens = counter.count_tokens(captions[:MOST_CAPTIONS]) if counter is not None and captions else []
    truncated = sum(count > counter.config.max_tokens for count in tokens) if counter is not None else 0
    return DatasetFacts(
        rows=rows, shards=len(shards), channels=channels, buckets=buckets, caption_tokens=tokens, truncated=truncated
    )


def _largest_step(training: TrainConfig, shapes: ModelShapes, dataset: DatasetFacts) -> StepShape:
    """The micro-batch that takes most: of the largest bucket, and of the longest captions."""
    side = shapes.transformer.base_size * shapes.transformer.patch_size
    height, width = max(dataset.buckets, key=lambda size: size[0] * size[1], default=(side, side))
    longest = max(dataset.caption_tokens, default=shapes.prompts.max_tokens)
    tokens = min(longest, shapes.prompts.max_tokens)
    return StepShape(samples=training.micro_batch_size, height=height, width=width, caption_tokens=tokens)


def _too_large(training: TrainConfig, memory: Memory, device_gib: float) -> str:
    ways = []
    if not training.engine.checkpoint_blocks:
        ways.append("engine.checkpoint_blocks=1")
    if training.micro_batch_size > 1:
        ways.append("a smaller micro_batch_size")
    if training.num_workers > 1 and training.engine.zero_stage < 2 and training.optim.optimizer != "came":
        ways.append("engine.zero_stage=2")
    if training.optim.optimizer == "adamw":
        ways.append("optim.optimizer=adamw_8bit")
    if training.lora is None:
        ways.append("lora")
    return f"{memory.total / GIB:.1f} GiB are more than the {device_gib:g} GiB of a GPU: take {', or '.join(ways)}"


def _find_problems(training: TrainConfig, shapes: ModelShapes, dataset: DatasetFacts) -> list[str]:
    problems = []
    optim, config = training.optim, shapes.transformer
    if optim.warmup_steps + optim.decay_steps > training.num_steps:
        problems.append(
            f"warmup_steps={optim.warmup_steps} and decay_steps={optim.decay_steps} are more than num_steps="
            f"{training.num_steps}: the learning rate never reaches {optim.lr:g}"
        )
    if dataset.channels and dataset.channels != config.in_channels:
        problems.append(f"the table holds latents of {dataset.channels} channels, the transformer takes {config.in_channels}")
    area = max((height * width for height, width in dataset.buckets), default=0) / config.patch_size**2
    if area and not 0.6 < area / config.base_size**2 < 1.6:
        problems.append(
            f"the transformer is made for {config.base_size}x{config.base_size} tokens, the table's images have about "
            f"{area**0.5:.0f}x{area**0.5:.0f}: set positions.base_size"
        )
    if config.base_size >= 64 and config.position_scale is None:
        problems.append("at 2048 px and above the published models have a positional embedding: set positions.scale")
    rare = [count for count in dataset.buckets.values() if count < training.micro_batch_size * training.num_workers]
    if rare:
        problems.append(
            f"{len(rare)} of {len(dataset.buckets)} buckets, with {sum(rare)} samples, have fewer than one micro-batch for "
            "each worker: their samples wait for those of later epochs"
        )
    if dataset.truncated:
        share = dataset.truncated / len(dataset.caption_tokens)
        problems.append(f"{share:.1%} of the captions are longer than {shapes.prompts.max_tokens} tokens, and are cut there")
    return problems


def format_preflight(result: Preflight) -> str:
    """For people."""
    lines = ["MODEL", *_model_lines(result), "", "MEMORY OF ONE DEVICE", *_memory_lines(result)]
    lines += ["", "STEPS", *_step_lines(result), "", "DATASET", *_dataset_lines(result), "", "PROBLEMS"]
    lines += [f"  - {problem}" for problem in result.problems] or ["  none found"]
    return "\n".join(lines)


def _model_lines(result: Preflight) -> list[str]:
    config, sizes = result.shapes.transformer, result.sizes
    return [
        f"  transformer          {sizes.transformer:>14,} weights, {sizes.trained:,} of them trained",
        f"                       {config.depth} blocks, {config.dim} wide, for {config.base_size}x{config.base_size} tokens",
        f"  text encoder         {sizes.text_encoder:>14,} weights ({result.shapes.text_encoder_name})",
        f"  autoencoder          {sizes.autoencoder:>14,} weights ({result.shapes.autoencoder_name})",
    ]


def _memory_lines(result: Preflight) -> list[str]:
    engine, training, step = result.training.engine, result.training, result.step
    recompute = (
        f"every {engine.checkpoint_blocks}. block recomputed"
        if engine.checkpoint_blocks > 1
        else ("activations recomputed" if engine.checkpoint_blocks else "activations kept")
    )
    lines = [
        f"  ZeRO {engine.zero_stage}, {engine.dtype}, {training.optim.optimizer}, {training.num_workers} workers, {recompute}, "
        f"{step.samples} samples of {step.height}x{step.width} latents with {step.caption_tokens} caption tokens"
    ]
    lines += [f"  {name:<36} {size / GIB:8.2f} GiB" for name, size in result.memory.parts.items()]
    lines.append(f"  {'total, ' + result.memory.moment:<36} {result.memory.total / GIB:8.2f} GiB")
    return lines


def _step_lines(result: Preflight) -> list[str]:
    training, config, step = result.training, result.shapes.transformer, result.step
    image_tokens = step.height * step.width // config.patch_size**2
    known = result.dataset.caption_tokens
    caption_tokens = round(sum(known) / len(known)) if known else step.caption_tokens
    batch = training.global_batch_size
    flops = step_flops(config, batch_size=batch, image_tokens=image_tokens, caption_tokens=caption_tokens)
    if training.engine.checkpoint_blocks:
        flops *= 1 + 1 / (3 * training.engine.checkpoint_blocks)
    flops += 2.0 * result.sizes.text_encoder * caption_tokens * batch
    optim = training.optim
    lines = [
        f"  one step             {batch:,} images = {training.micro_batch_size} in a micro-batch x {training.num_workers} "
        f"workers x {training.grad_accum_steps} accumulated",
        f"                       {batch * image_tokens:,} image tokens, about {batch * caption_tokens:,} caption tokens, "
        f"{flops / 1e15:,.2f} PFLOP",
        f"  learning rate        {optim.lr:g} after {optim.warmup_steps} steps of warm-up, {optim.schedule}"
        + (f", down to {optim.final_lr_share * optim.lr:g}" if optim.schedule != "constant" else ""),
        f"  {training.num_steps:,} steps".ljust(23) + f"{training.num_steps * batch:,} images",
    ]
    if training.resources.num_gpus > 0:
        days = {
            name: training.num_steps * flops / (PEAK_FLOPS[name] * ASSUMED_SHARE * training.num_workers) / 86400
            for name in ("A100", "H100")
        }
        shown = ", ".join(f"{value:.1f} days on {training.num_workers} {name}" for name, value in days.items())
        lines.append(f"                       {shown}, if they reach {ASSUMED_SHARE:.0%} of their peak")
    return lines


def _dataset_lines(result: Preflight) -> list[str]:
    training, dataset = result.training, result.dataset
    if dataset.rows is None:
        return [f"  {training.latents} is not there yet"]
    steps = dataset.rows / training.global_batch_size
    smallest = min(dataset.buckets.values(), default=0)
    lines = [
        f"  {dataset.rows:,} samples in {dataset.shards} shards; an epoch is {steps:,.1f} steps, the training "
        f"{training.num_steps / max(steps, 1e-9):,.1f} epochs",
        f"  {len(dataset.buckets)} buckets, the smallest of {smallest:,} samples, against micro-batches of "
        f"{training.micro_batch_size}",
    ]
    if dataset.caption_tokens:
        tokens = sorted(dataset.caption_tokens)
        lines.append(
            f"  captions of {tokens[len(tokens) // 2]} tokens (median), {tokens[-1]} at most; {dataset.truncated} of "
            f"{len(tokens):,} looked at are cut"
        )
    return lines
