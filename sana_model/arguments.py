"""What people pass to `TextToImage`: numbers of NumPy, whole numbers written as floats, None; taken, or refused in words."""

from collections.abc import Iterable
from typing import Any

import torch

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""What torch's generators take."""


def whole_number(name: str, value: Any) -> int:
    """Return a whole number, also one of NumPy or torch, or one written as 64.0. Raises ValueError for anything else."""
    if not isinstance(value, (bool, str, bytes)):
        try:
            if (number := int(value)) == value:
                return number
        except (TypeError, ValueError, OverflowError):  # no number; NaN; infinite
            pass
    raise ValueError(f"{name}={value!r} must be a whole number")


def real_number(name: str, value: Any) -> float:
    """Return a finite number, also one of NumPy or torch. Raises ValueError for anything else."""
    if not isinstance(value, (bool, str, bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if torch.isfinite(torch.tensor(number)):
            return number
    raise ValueError(f"{name}={value!r} must be a finite number")


def check_size(height: Any, width: Any, unit: int) -> tuple[int, int]:
    """Return a picture's size in pixels. Raises ValueError unless both are positive multiples of `unit`."""
    for name, value in (("height", height), ("width", width)):
        size = whole_number(name, value)
        if size <= 0 or size % unit:
            raise ValueError(
                f"{name}={size} must be a positive multiple of {unit}; the nearest is {nearest_multiple(size, unit)}"
            )
    return int(height), int(width)


def nearest_multiple(size: int, unit: int) -> int:
    """The positive multiple of `unit` nearest to `size`."""
    return max(round(size / unit), 1) * unit


def interval(name: str, value: Any) -> tuple[float, float]:
    """Return two finite numbers, of a pair of any kind. Raises ValueError for anything else."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be two numbers, (lo, hi)") from None
    return real_number(name, low), real_number(name, high)


def image_seeds(seed: Any, generator: torch.Generator | None, num_prompts: int, num_each: int) -> list[int] | None:
    """Return the seed of each image, `num_each` for each prompt; None: the generator draws the noise.

    Args:
        seed: None (new seeds), a whole number for every prompt, or a list, range, array or tensor with one for each prompt.

    Raises ValueError for both a seed and a generator, another number of seeds than of prompts, and what is no seed.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError(f"seed={seed} and a generator were given: give one of them")
        return None
    if seed is None:
        return torch.randint(2**31, (num_prompts * num_each,)).tolist()
    listed = isinstance(seed, Iterable) and not isinstance(seed, (str, bytes)) and getattr(seed, "ndim", 1) > 0
    seeds = list(seed) if listed else [seed] * num_prompts
    if len(seeds) != num_prompts:
        raise ValueError(f"{len(seeds)} seeds came with {num_prompts} prompts: give one to each, or a single number")
    return [_check_seed(whole_number("seed", one) + k) for one in seeds for k in range(num_each)]


def _check_seed(seed: int) -> int:
    if not MIN_SEED <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} must be from {MIN_SEED} to {MAX_SEED}")
    return seed


def text(name: str, value: Any) -> str:
    """Return a text; "" for None. Raises TypeError for anything else."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give a str, or None for none")
    return value or ""


def describe_cut(prompts: list[str], counts: list[int], max_tokens: int) -> str | None:
    """Say which prompts the text encoder cuts; None if none is cut. `counts`: tokens of each prompt before it is cut."""
    cut = [index for index, count in enumerate(counts) if count > max_tokens]
    if not cut:
        return None
    first = prompts[cut[0]]
    shown = first if len(first) <= 40 else f"{first[:40]}..."
    return (
        f"{len(cut)} of {len(prompts)} prompts are cut at the text encoder's max_tokens={max_tokens}; the first, "
        f"number {cut[0] + 1}, has {counts[cut[0]]} tokens: {shown!r}"
    )
