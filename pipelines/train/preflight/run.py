"""The needs of a training, computed before it starts: weights, memory by part, steps, facts of the dataset, problems."""

from dataclasses import dataclass

from pipelines.train.config import TrainConfig
from pipelines.train.loop.meter import PEAK_FLOPS
from pipelines.train.meter import step_flops
from pipelines.train.preflight.dataset import DatasetFacts, read_dataset
from pipelines.train.preflight.memory import (
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
from pipelines.train.preflight.models import ModelShapes, find_shapes

ASSUMED_MFU = 0.4
"""Share of a GPU's peak FLOPs that a training is assumed to reach."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The result of a preflight.

    training: the configuration. shapes: its models. sizes: their numbers of weights. memory: of one device. step: the largest
    micro-batch. dataset: facts about its tables. problems: sentences for a person, a lack of memory first.
    """

    training: TrainConfig
    shapes: ModelShapes
    sizes: ModelSizes
    memory: Memory
    step: StepShape
    dataset: DatasetFacts
    problems: list[str]


def run_preflight(dataset_uri: str, training: TrainConfig, *, device_gib: float) -> Preflight:
    """Estimate what a training will need, from its configuration, its models' shapes and its tables. Needs no Ray and no GPU.

    Args:
        dataset_uri: the training's dataset; its tables need not exist yet.
        training: the training.
        device_gib: memory of a GPU, in GiB; more than this is a problem.

    Raises FileNotFoundError or ValueError if the shape of the transformer cannot be known.
    """
    problems: list[str] = []
    shapes = find_shapes(training, problems)
    dataset = read_dataset(dataset_uri, training, shapes, problems)
    step = _largest_step(training, shapes, dataset)
    dtype = training.engine.torch_dtype
    with fake_transformer(shapes.transformer, training) as model:
        total, trained = count_weights(model)
        activations = count_activations(model, step, dtype)
    encodes = training.caption_embeds is None
    text_encoder_size = shapes.text_encoder_size if encodes else 0
    sizes = ModelSizes(transformer=total, trained=trained, text_encoder=text_encoder_size, autoencoder=shapes.autoencoder_size)
    text_activations = decoding = 0
    if encodes and shapes.text_encoder is not None:
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


def _largest_step(training: TrainConfig, shapes: ModelShapes, dataset: DatasetFacts) -> StepShape:
    """Return the micro-batch that takes most memory: it has the largest bucket and the longest captions.

    Without tables it has square images of the transformer's base size, and captions as long as allowed.
    """
    side = shapes.transformer.base_size * shapes.transformer.patch_size
    height, width = max(dataset.buckets, key=lambda size: size[0] * size[1], default=(side, side))
    longest = max(dataset.caption_tokens, default=shapes.prompts.max_tokens)
    tokens = min(longest, shapes.prompts.max_tokens)
    return StepShape(samples=training.micro_batch_size, height=height, width=width, caption_tokens=tokens)


def _too_large(training: TrainConfig, memory: Memory, device_gib: float) -> str:
    """Return the message that memory does not suffice, with the settings that would lower it."""
    ways, optimizer = [], training.optim.optimizer
    if not training.engine.checkpoint_blocks:
        ways.append("engine.checkpoint_blocks=1")
    if training.micro_batch_size > 1:
        ways.append("a smaller micro_batch_size")
    if training.num_workers > 1 and training.engine.zero_stage < 2 and not optimizer.startswith("came"):
        ways.append("engine.zero_stage=2")
    if optimizer in ("adamw", "came"):
        ways.append(f"optim.optimizer={optimizer}_8bit")
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
    for table in dataset.tables:
        if table.channels and table.channels != config.in_channels:
            problems.append(
                f"{table.name} holds latents of {table.channels} channels, the transformer takes {config.in_channels}"
            )
    area = max((height * width for height, width in dataset.buckets), default=0) / config.patch_size**2
    if area and not 0.6 < area / config.base_size**2 < 1.6:
        problems.append(
            f"the transformer is made for {config.base_size}x{config.base_size} tokens, the images have about "
            f"{area**0.5:.0f}x{area**0.5:.0f}: set positions.base_size"
        )
    if config.base_size >= 64 and config.position_scale is None:
        problems.append(
            f"base_size={config.base_size} without a positional embedding, which the published models have at 2048 px and "
            "above: set positions.scale"
        )
    rare = [count for count in dataset.buckets.values() if count < training.micro_batch_size * training.num_workers]
    if rare:
        problems.append(
            f"{len(rare)} of {len(dataset.buckets)} buckets, with {sum(rare)} samples, have fewer than one micro-batch for "
            "each worker: their samples wait for those of later epochs; a smaller micro_batch_size avoids it"
        )
    if dataset.truncated:
        share = dataset.truncated / len(dataset.caption_tokens)
        problems.append(f"{share:.1%} of the captions are longer than {shapes.prompts.max_tokens} tokens, and are cut there")
    return problems


def format_preflight(result: Preflight) -> str:
    """Return the result as a text for people."""
    lines = ["MODEL", *_model_lines(result), "", "MEMORY OF ONE DEVICE", *_memory_lines(result)]
    lines += ["", "STEPS", *_step_lines(result), "", "DATASET", *_dataset_lines(result), "", "PROBLEMS"]
    lines += [f"  - {problem}" for problem in result.problems] or ["  none found"]
    return "\n".join(lines)


def _model_lines(result: Preflight) -> list[str]:
    config, sizes = result.shapes.transformer, result.sizes
    return [
        f"  transformer          {sizes.transformer:>14,} weights, {sizes.trained:,} of them trained",
        f"                       {config.depth} blocks, {config.dim} wide, for {config.base_size}x{config.base_size} tokens",
        f"  text encoder         {result.shapes.text_encoder_size:>14,} weights ({result.shapes.text_encoder_path})"
        + ("" if result.training.caption_embeds is None else ", not on the device: captions were embedded before"),
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
    adapters = training.lora is not None
    sizes = {"batch_size": batch, "image_tokens": image_tokens, "caption_tokens": caption_tokens}
    flops = step_flops(config, **sizes, adapters=adapters)
    if training.engine.checkpoint_blocks:  # recomputing takes another forward pass
        flops *= 1 + 1 / ((2 if adapters else 3) * training.engine.checkpoint_blocks)
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
            name: training.num_steps * flops / (PEAK_FLOPS[name] * ASSUMED_MFU * training.num_workers) / 86400
            for name in ("A100", "H100")
        }
        shown = ", ".join(f"{value:.1f} days on {training.num_workers} {name}" for name, value in days.items())
        lines.append(f"                       {shown}, if they reach {ASSUMED_MFU:.0%} of their peak")
    return lines


def _dataset_lines(result: Preflight) -> list[str]:
    training, dataset = result.training, result.dataset
    if not dataset.tables:
        return ["  its latents tables do not exist yet"]
    steps = dataset.draws / training.global_batch_size
    smallest = min(dataset.buckets.values(), default=0)
    lines = [
        f"  {table.name}: {table.rows:,} samples in {table.shards} shards, weight {table.weight:g}: {table.draws:,.0f} in an "
        f"epoch, {table.draws / max(dataset.draws, 1):.1%} of it"
        for table in dataset.tables
    ]
    lines += [
        f"  an epoch is {dataset.draws:,} samples, {steps:,.1f} steps; the training is "
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
