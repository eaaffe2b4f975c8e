"""The map from this rank's master weights to the elements of parameters that they hold.

ZeRO stages differ in this, and only this file knows how. Checkpoints use it to store parameters by name, so that any world size
and ZeRO stage can read what another one wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter (flattened) lie at [offset, offset + numel) of master tensor `master`."""

    name: str
    start: int
    numel: int
    master: int
    offset: int

    def of(self, masters: Sequence[Tensor]) -> Tensor:
        """Return a view of this fragment's elements in `masters`: the master weights, their averages, or a moment of them."""
        return masters[self.master].detach().view(-1)[self.offset : self.offset + self.numel]


def find_fragments(module: nn.Module, optimizer: Any, masters: Sequence[Tensor], *, zero_stage: int) -> list[Fragment]:
    """Return the fragments of this rank, in the order of the parameters.

    Args:
        module: the module that DeepSpeed trains.
        optimizer: DeepSpeed's optimizer.
        masters: the master weights of this rank.
        zero_stage: DeepSpeed's ZeRO stage.
    """
    trained: list[tuple[str, Any]] = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    if zero_stage == 3:
        found = [_partition(name, parameter, optimizer) for name, parameter in trained]
    elif zero_stage:
        found = [_linked(name, parameter) for name, parameter in trained if parameter._hp_mapping is not None]
    else:
        assert [parameter.shape for _, parameter in trained] == [master.shape for master in masters]
        found = [Fragment(name, 0, parameter.numel(), index, 0) for index, (name, parameter) in enumerate(trained)]
    return [fragment for fragment in found if fragment.numel]


def _partition(name: str, parameter: Any, optimizer: Any) -> Fragment:
    """Return a parameter's fragment under ZeRO 3, which cuts each into equal parts; the last ones may be short or empty."""
    master, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * size
    return Fragment(name, start, max(min(size, parameter.ds_numel - start), 0), master, offset)


def _linked(name: str, parameter: Any) -> Fragment:
    """Return a parameter's fragment under ZeRO 1 and 2, which lay all parameters end to end and cut the whole."""
    mapping = parameter._hp_mapping
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, there.start, there.numel, mapping.param_group_index, here.start)
