"""Compiles the Triton kernels for a Hopper card on a machine that has none, and prints what each one takes."""

import inspect
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sana_model.kernels import triton_attention as attention
from sana_model.kernels import triton_mix_ffn as mix_ffn
from sana_model.kernels import triton_modulate as norm

TARGET = GPUTarget("cuda", 90, 32)
ATTENTION: dict[str, Any] = {"D": 32, "BLOCK": attention.BLOCK}
MIX_FFN: dict[str, Any] = {"BLOCK_C": mix_ffn.BLOCK_C}
ROLLING: dict[str, Any] = MIX_FFN | {"ROWS": mix_ffn.ROWS, "BLOCK_W": mix_ffn.BLOCK_W}
TENSORS = {"tokens", "shift", "scale", "output", "grad", "query", "key", "value", "expanded", "weight", "bias"}
FLOAT32 = {"key_value", "key_sum", "grad_key_value", "grad_key_sum", "grad_shift", "grad_scale", "sums"}
LIKE_INPUTS = {"grad_query", "grad_key", "grad_value", "grad_tokens", "grad_expanded"}
KERNELS = (
    (attention._sum_kernel, ATTENTION, "tf32"),
    (attention._attend_kernel, ATTENTION, "tf32x3"),
    (attention._query_gradient_kernel, ATTENTION, "tf32x3"),
    (attention._key_value_gradient_kernel, ATTENTION, "tf32x3"),
    (mix_ffn._forward_kernel, ROLLING | {"BACKWARD": False}, ""),
    (mix_ffn._forward_kernel, ROLLING | {"BACKWARD": True}, ""),
    (mix_ffn._backward_kernel, MIX_FFN | {"BLOCK_PIXELS": mix_ffn.BLOCK_PIXELS}, ""),
    (norm._forward_kernel, {"BLOCK": 4096}, ""),
    (norm._backward_kernel, {"BLOCK": 4096}, ""),
)
"""Kernels, their constants, and the precision of products with which those that multiply are launched for 16 bits."""


def compile_all() -> None:
    for kernel, constants, in_16_bits in KERNELS:
        for dtype in ("bf16", "fp16", "fp32"):
            precision = {"PRECISION": "ieee" if dtype == "fp32" else in_16_bits} if in_16_bits else {}
            compile_one(kernel, constants | precision, dtype)


def compile_one(kernel: Any, constants: dict[str, Any], dtype: str) -> None:
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOAT32:
            signature[name] = "*fp32"
        elif name in TENSORS | LIKE_INPUTS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    options = {"num_warps": 8} if "BLOCK" in constants and "D" not in constants else {}
    compiled: Any = triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    print(kernel.fn.__module__, kernel.fn.__name__, dtype, f"{len(compiled.asm['cubin'])} bytes", *usage(compiled, ptx))


def usage(compiled: Any, ptx: str) -> tuple[str, ...]:
    """What ptxas says of registers and of values that do not fit into them."""
    import re
    import subprocess
    import tempfile
    from pathlib import Path

    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        ptxas = get_ptxas(TARGET.arch).path  # Triton brings several
        run = subprocess.run(
            [ptxas, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/out"], capture_output=True, text=True
        )
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", run.stderr)
    assert registers and spilled, run.stderr
    return f"{registers[1]} registers", f"{spilled[1]} bytes spilled", f"{compiled.metadata.shared} bytes shared"
