"""Each Triton kernel against its plain form and against torch.compile of that, at the shapes of the published models.

`python -m jobs.benchmark.gpu.kernels NAME` checks one kernel, in a process of its own: after an access to foreign memory a
process can use its GPU no more. Only a kernel that has passed is used.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from jobs.benchmark.gpu.bench import DTYPES, Bench, Figures, Line, NotHere, judge, need, relative_error
from jobs.benchmark.gpu.ceilings import measure_copy_rate
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
    """Errors of results and gradients by dtype, against the plain form in float32, at Sana-0.6B's width."""
    drawn = kernel.inputs(17, 2, "sana-0.6b", device)
    errors = {}
    for dtype in DTYPES:
        own = [x.detach().to(dtype).requires_grad_() for x in drawn]
        exact = [x.detach().float().requires_grad_() for x in own]
        with fused_kernels([kernel.name]):
            ours = kernel.chosen(*own)
        wanted = kernel.plain(*exact)
        upstream = torch.randn_like(wanted).to(dtype)
        gradients = torch.autograd.grad(ours, own, upstream)
        correct = torch.autograd.grad(wanted, exact, upstream.float())
        errors[name_dtype(dtype)] = max(
            relative_error(*pair) for pair in ((ours, wanted), *zip(gradients, correct, strict=True))
        )
    return errors


def checked(bench: Bench, name: str) -> Figures:
    """The result of one kernel's check, which is made once. Raises NotHere without Triton."""
    need("triton")
    if name not in bench.checked_kernels:
        bench.checked_kernels[name] = Figures(remark="its check was not finished", wrong=True)  # if the time ends before
        program = [sys.executable, "-m", "jobs.benchmark.gpu.kernels", name]
        run = subprocess.run(program, capture_output=True, text=True)
        told = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        passed = run.returncode == 0
        figures = judge(json.loads(run.stdout.splitlines()[-1])) if passed else Figures(remark=told[-1][:150], wrong=True)
        bench.checked_kernels[name] = figures
    return bench.checked_kernels[name]


def need_kernels(bench: Bench, names: Sequence[str] = KERNELS) -> None:
    """Raise NotHere unless these kernels have passed their check."""
    if bad := [name for name in names if checked(bench, name).wrong]:
        raise NotHere(f"the check of {', '.join(bad)} failed")


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
                        run=partial(measure_kernel, bench, kernel, model, size // 32, count, training),
                    )
                )
    return lines


def measure_kernel(bench: Bench, kernel: Kernel, model: str, side: int, count: int, training: bool) -> Figures:
    """Time the three forms; the share is that of the copy's rate, for the bytes that must be moved at least."""
    need_kernels(bench, [kernel.name])
    inputs = [x.requires_grad_(training) for x in kernel.inputs(side, count, model, bench.device)]
    with torch.no_grad():
        result = kernel.plain(*(x.clone() for x in inputs))
    upstream = torch.randn_like(result)

    def make_run(form: Function) -> Callable[[], object]:
        if not training:
            return torch.no_grad()(lambda: form(*inputs))
        return lambda: torch.autograd.grad(form(*inputs), inputs, upstream)

    values = bench.so_far  # the compiler may take longer than there is time
    values["plain_s"] = bench.measure(make_run(kernel.plain))
    with fused_kernels([kernel.name]):
        values["fused_s"] = bench.measure(make_run(kernel.chosen))
    values["share"] = kernel.passes[training] * result.nbytes / values["fused_s"] / measure_copy_rate(bench.device)
    torch.compiler.reset()
    values["compiled_s"] = bench.measure(make_run(torch.compile(kernel.plain, dynamic=False)))
    gain = values["plain_s"] / values["fused_s"]
    advice = f"put {kernel.name} into {VARIABLE}" if gain > 1 else f"leave {kernel.name} off"
    return Figures(values=values, remark=f"{gain:.2f}x: {advice}")


if __name__ == "__main__":
    (asked,) = (kernel for kernel in TABLE if kernel.name == sys.argv[1])
    print(json.dumps(check_kernel(asked, torch.device("cuda", 0))))
