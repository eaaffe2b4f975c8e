"""The text encoder, of Gemma-2-2B's shape: with the instruction's kept keys and values, and padded as published."""

from functools import partial

import torch

from jobs.benchmark.gpu.bench import Bench, Figures, Line
from jobs.benchmark.inputs import CAPTION_TOKENS, INSTRUCTION_TOKENS, PADDED_TOKENS, make_text_encoder
from jobs.benchmark.timing import count_flops

DEPTH = 26  # of gemma-2-2b
FLOPS_A_TOKEN = 2 * 78e6  # of a layer
LAYER_BYTES = 2 * 78e6


def text_lines(bench: Bench) -> list[Line]:
    return [
        Line(
            section="Text encoder",
            name=f"{count} captions, {way}",
            weight=bench.plan(gpu_s=6, cpu_s=10),
            run=partial(_measure, bench, count, way),
        )
        for way in ("kept prefix", "padded")
        for count in bench.some((16, 128))
    ]


def _measure(bench: Bench, count: int, way: str) -> Figures:
    computed = CAPTION_TOKENS if way == "kept prefix" else INSTRUCTION_TOKENS + PADDED_TOKENS - 2
    depth, fitted, remark = bench.fit(DEPTH, count, DEPTH * FLOPS_A_TOKEN * count * computed, DEPTH * LAYER_BYTES)
    encoder, captions = bench.keep(("text", depth, count), lambda: make_text_encoder(bench.device, bench.dtype, depth, count))
    ids = torch.full((fitted, computed), 5, device=bench.device)
    mask = (torch.arange(computed, device=bench.device) < INSTRUCTION_TOKENS + CAPTION_TOKENS).expand(fitted, -1)
    bench.forget_peak()

    @torch.no_grad()
    def run() -> object:
        if way == "kept prefix":
            return encoder.encode(captions[:fitted])
        return encoder.model(input_ids=ids, attention_mask=mask, use_cache=False)

    run()  # which computes the prefix
    seconds = bench.measure(run, warm=False)
    flops = count_flops(run) if bench.on_gpu else depth * FLOPS_A_TOKEN * fitted * computed
    figures = bench.compute(seconds, flops, fitted)
    remark = ", ".join(part for part in (remark, "images/s are captions/s") if part)
    return Figures(values=figures, remark=remark)
