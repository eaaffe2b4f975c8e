"""Which fused Triton kernels run, and where: only on CUDA devices, and only those that are turned on.

All are off unless the environment variable SANA_FUSED_KERNELS names them, such as `attention,layer_norm` or `all`, because
whether a kernel is faster depends on the card: `python -m jobs.benchmark gpu` measures each one at the published shapes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

KERNELS = ("attention", "mix_ffn", "layer_norm")
VARIABLE = "SANA_FUSED_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 128)
LARGEST_LAYER_NORM = 8192
"""A program holds a whole token in registers."""


def parse_kernels(text: str) -> frozenset[str]:
    """Read names separated by commas, `all` or `none`. Raises ValueError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return frozenset(KERNELS)
    names = [] if names == ["none"] else names
    if unknown := [name for name in names if name not in KERNELS]:
        raise ValueError(
            f"{VARIABLE}={text!r}: unknown {', '.join(unknown)}; choose from {', '.join(KERNELS)}, or all, or none"
        )
    return frozenset(names)


_turned_on = parse_kernels(os.environ.get(VARIABLE, ""))


@contextmanager
def fused_kernels(names: Iterable[str]) -> Iterator[None]:
    """Turn on these kernels and no others, in all threads of this process."""
    global _turned_on
    before, _turned_on = _turned_on, parse_kernels(",".join(names))
    try:
        yield
    finally:
        _turned_on = before


def serves(kernel: str, *tensors: Tensor | None) -> bool:
    """Whether the kernel is turned on and can compute these tensors: all on the current CUDA device, of one dtype, none empty.

    torch.compile and function transforms see the plain form; so does autocast, which chooses dtypes by operation.
    """
    if kernel not in _turned_on or torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0]
    return bool(
        first.device.type == "cuda"
        and first.device.index == torch.cuda.current_device()  # on which Triton launches
        and first.dtype in DTYPES
        and all(t.device == first.device and t.dtype == first.dtype and t.numel() > 0 for t in given)
        and not torch.is_autocast_enabled("cuda")
        and not torch._C._are_functorch_transforms_active()
        and has_triton()
    )


@cache
def has_triton() -> bool:
    """Whether Triton can be imported. CUDA builds of torch bring it."""
    return find_spec("triton") is not None
