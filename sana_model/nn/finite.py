"""Values that are not finite: a picture made of them would be black, so whoever draws or encodes checks for them."""

import torch
from torch import Tensor, nn

NUM_NAMED = 3
"""So many bad weights are named; the others are counted."""


class NotFiniteError(ValueError):
    """A model gave values that are not finite. The message names the part, its dtype and what to do.

    Args:
        message: the whole message.
        bad_weights: a weight of the model is not finite itself, so that other inputs are likely to fail as well.
    """

    def __init__(self, message: str, *, bad_weights: bool = False):
        super().__init__(message)
        self.bad_weights = bad_weights


def check_finite(values: Tensor, model: nn.Module, part: str, *, dtype: torch.dtype | None = None, hint: str = "") -> None:
    """Raise NotFiniteError if `values` (B, ...), which `model` computed, are not all finite.

    Args:
        part: what the model is, for the message.
        dtype: that it computed in; None: that of its first weight.
        hint: what else to try, if its weights are finite and its dtype has the range of float32.
    """
    if bool(torch.isfinite(values).all()):  # the only cost of a good batch
        return
    dtype = dtype or next(model.parameters()).dtype
    num_bad = int((~torch.isfinite(values)).flatten(1).any(1).sum())
    told = f"the {part} gives values that are not finite, in {name_dtype(dtype)}, for {num_bad} of {len(values)} inputs"
    if bad := find_bad_weights(model):
        more = f" and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
        lead = "too large for float16, or damaged: take bfloat16 or float32, or" if dtype is torch.float16 else "damaged: take"
        raise NotFiniteError(
            f"{told}: its weights {', '.join(bad[:NUM_NAMED])}{more} are not finite either, {lead} another copy of them",
            bad_weights=True,
        )
    if dtype is torch.float16:
        raise NotFiniteError(f"{told}: float16 ends at 65504; take bfloat16 or float32 for it")
    raise NotFiniteError(f"{told}, though its weights are finite: {hint or 'try float32, or another checkpoint'}")


def find_bad_weights(model: nn.Module) -> list[str]:
    """Find the names of the weights and buffers that hold values which are not finite."""
    tensors = model.state_dict().items()
    return [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]


def name_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype as a configuration has it, such as "float16"."""
    return str(dtype).removeprefix("torch.")
