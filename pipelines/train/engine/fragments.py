"""Which elements of which parameter this rank's master weights hold: what the ZeRO stages differ in, once.

With it a checkpoint speaks of parameters by their names, and any world size and ZeRO stage reads what another wrote.
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
        """Its elements, as a view of a list of tensors like the master weights: those, their moments or their averages."""
        return masters[self.master].detach().view(-1)[self.offset : self.offset + self.numel]


def find_fragments(module: nn.Module, optimizer: Any, masters: Sequence[Tensor], *, zero_stage: int) -> list[Fragment]:
    """The fragments of this rank, in the order of the parameters.

    Args:
        module: what DeepSpeed trains.
        optimizer: DeepSpeed's.
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
    """ZeRO 3 cuts each parameter by itself into equal parts; the last ones may be short, or empty."""
    master, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * size
    return Fragment(name, start, max(min(size, parameter.ds_numel - start), 0), master, offset)


def _linked(name: str, parameter: Any) -> Fragment:
    """ZeRO 1 and 2 cut all parameters, laid end to end, and note where each came to lie."""
    mapping = parameter._hp_mapping
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, there.start, there.numel, mapping.param_group_index, here.start)
