"""Each Triton kernel against its plain form and against torch.compile of that, at the shapes of the published models.

`python -m jobs.benchmark.gpu.kernels NAME` checks one kernel, in a process of its own: after an access to foreign memory a
process can use its GPU no more. Only a kernel that has passed is used.
"""

import atexit
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from jobs.benchmark.gpu.bench import DTYPES, Bench, Figures, Line, NotHere, judge, relative_error
from jobs.benchmark.gpu.ceilings import measure_copy_rate
from jobs.benchmark.gpu.clock import OutOfTime
from sana_model.kernels.fused import KERNELS, VARIABLE, fused_kernels
from sana_model.kernels.linear_attention import plain_linear_attention, relu_linear_attention
from sana_model.kernels.mix_ffn import plain_silu_depthwise_gate, silu_depthwise_gate
from sana_model.kernels.modulate import modulate, plain_modulate
from sana_model.nn.config import LINEAR_HEAD_DIM, PRESETS
from sana_model.nn.finite import name_dtype

SECTION = "Fused kernels"
Function = Callable[..., Tensor]
SHAPES = (("sana-0.6b", 1024, 1), ("sana-0.6b", 1024, 16), ("sana-1.6b", 512, 64))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, its plain form, and its inputs by (side of the picture in tokens, batch, model, device).

    passes: how many tensors of the result's size are read or written at least, forward, and forward and backward.
    """

    name: str
    chosen: Function
    plain: Function
    inputs: Callable[[int, int, str, torch.device], Sequence[Tensor]]
    passes: tuple[int, int]


def _attention_inputs(side: int, count: int, model: str, device: torch.device) -> Sequence[Tensor]:
    dim = PRESETS[model].dim
    packed = torch.randn(count, side**2, 3 * dim, device=device, dtype=torch.bfloat16)
    return [x.unflatten(-1, (-1, LINEAR_HEAD_DIM)) for x in packed.chunk(3, dim=-1)]


def _mix_ffn_inputs(side: int, count: int, model: str, device: torch.device) -> Sequence[Tensor]:
    wide = 2 * PRESETS[model].ffn_dim
    options = {"device": device, "dtype": torch.bfloat16}
    return [torch.randn(size, **options) for size in ((count, side, side, wide), (wide, 1, 3, 3), (wide,))]  # type: ignore[call-overload]


def _norm_inputs(side: int, count: int, model: str, device: torch.device) -> Sequence[Tensor]:
    dim = PRESETS[model].dim
    options = {"device": device, "dtype": torch.bfloat16}
    return [torch.randn(size, **options) for size in ((count, side**2, dim), (count, 1, dim), (count, 1, dim))]  # type: ignore[call-overload]


TABLE = (
    Kernel(
        name="attention", chosen=relu_linear_attention, plain=plain_linear_attention, inputs=_attention_inputs, passes=(4, 11)
    ),
    Kernel(name="mix_ffn", chosen=silu_depthwise_gate, plain=plain_silu_depthwise_gate, inputs=_mix_ffn_inputs, passes=(3, 8)),
    Kernel(name="layer_norm", chosen=modulate, plain=plain_modulate, inputs=_norm_inputs, passes=(2, 5)),
)
"""In the order of `fused.KERNELS`."""


def check_kernel(kernel: Kernel, device: torch.device) -> dict[str, float]:
    """Errors of results and gradients by dtype, at Sana-0.6B's width."""
    drawn = kernel.inputs(17, 2, "sana-0.6b", device)
    return {name_dtype(dtype): largest_error(kernel, drawn, dtype) for dtype in DTYPES}


def largest_error(kernel: Kernel, inputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Of result and gradients, against the plain form in float32 without TF32; NaN if one is. The inputs stay as they are."""
    own = [x.detach().to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in own]
    with fused_kernels([kernel.name]):
        ours = kernel.chosen(*own)
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, own, upstream)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = kernel.plain(*exact)
        correct = torch.autograd.grad(wanted, exact, upstream.float())
    pairs = ((ours, wanted), *zip(gradients, correct, strict=True))
    return float(torch.tensor([relative_error(*pair) for pair in pairs]).max())  # Python's max may drop a NaN


class Check:
    """The check of one kernel in a process of its own, which begins at once and ends with this process at the latest."""

    def __init__(self, name: str):
        self.output, self.errors = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115 (they live as long as this)
        program = [sys.executable, "-m", "jobs.benchmark.gpu.kernels", name]
        self.process = subprocess.Popen(program, stdout=self.output, stderr=self.errors)
        self.waited = False
        atexit.register(self.process.kill)

    def result(self) -> Figures:
        """Errors by dtype, or why there are none. Waits for the end, but not again in a later line if time ran out."""
        if self.waited and self.process.poll() is None:
            return Figures(remark="its check was not finished", wrong=True)
        self.waited = True
        if code := self.process.wait():
            told = [f"exit code {code}", *_read_lines(self.errors)]
            return Figures(remark=told[-1][:150], wrong=True)
        return judge(json.loads(_read_lines(self.output)[-1]))


def _read_lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()


@cache
def start_checks() -> dict[str, Check]:
    """All at once, since each takes a CPU to compile: a line that waits for one waits for the others too. Once a process."""
    return {name: Check(name) for name in KERNELS}


def kernel_result(name: str) -> Figures:
    """The result of one kernel's check, which is made once."""
    return start_checks()[name].result()


def passed_kernels() -> tuple[list[str], str]:
    """The kernels that have passed their check, and a remark that names the others. Raises NotHere if none has."""
    bad = [name for name in KERNELS if kernel_result(name).wrong]
    if len(bad) == len(KERNELS):
        raise NotHere("no kernel has passed its check")
    left_out = f"without {', '.join(bad)}, not passed by the check" if bad else ""
    return [name for name in KERNELS if name not in bad], left_out


def kernel_lines(bench: Bench) -> list[Line]:
    lines = []
    for kernel in TABLE:
        for model, size, count in SHAPES:
            for training in (False, True):
                passes = "forward and backward" if training else "forward"
                lines.append(
                    Line(
                        section=SECTION,
                        name=f"{kernel.name}, {model} {size} px batch {count}, {passes}",
                        weight=8,
                        only_gpu=True,
                        needs="triton",
                        run=partial(measure_kernel, bench, kernel, model, size // 32, count, training),
                    )
                )
    return lines


def measure_kernel(bench: Bench, kernel: Kernel, model: str, side: int, count: int, training: bool) -> Figures:
    """Time the three forms; the share is that of the copy's rate, for the bytes that must be moved at least.

    The error at this shape comes first: a wrong kernel is not timed.
    """
    if (check := kernel_result(kernel.name)).wrong:
        raise NotHere(f"not passed by its check: {check.remark}")
    inputs = [x.requires_grad_(training) for x in kernel.inputs(side, count, model, bench.device)]
    figures = judge({name_dtype(bench.dtype): largest_error(kernel, inputs, bench.dtype)})
    if figures.wrong:
        return figures

    def spare(x: Tensor, *rest: Tensor) -> Tensor:
        return kernel.plain(x + 0, *rest)  # which overwrites its input where no gradients are recorded

    with torch.no_grad():
        upstream = torch.randn_like(spare(*inputs))

    def make_run(form: Function) -> Callable[[], object]:
        if not training:
            return torch.no_grad()(lambda: form(*inputs))
        return lambda: torch.autograd.grad(form(*inputs), inputs, upstream)

    values = bench.so_far
    values["plain_s"] = bench.measure(make_run(kernel.plain))
    with fused_kernels([kernel.name]):
        values["fused_s"] = bench.measure(make_run(kernel.chosen))
    values["share"] = kernel.passes[training] * upstream.nbytes / values["fused_s"] / measure_copy_rate(bench.device)
    gain = values["plain_s"] / values["fused_s"]
    remark = f"{gain:.2f}x: " + (f"put {kernel.name} into {VARIABLE}" if gain > 1 else f"leave {kernel.name} off")
    torch.compiler.reset()
    try:
        values["compiled_s"] = bench.measure(make_run(torch.compile(spare, dynamic=False)))
    except OutOfTime:
        remark += "; no time for torch.compile"
    return Figures(values=values, remark=remark)


if __name__ == "__main__":
    (asked,) = (kernel for kernel in TABLE if kernel.name == sys.argv[1])
    print(json.dumps(check_kernel(asked, torch.device("cuda", 0))))
