"""Brings the parts of a pipeline onto their device when they work, and takes them away when another part does."""

import copy
import mmap
import tempfile
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_model.kernels.quantized import check_fp8
from sana_model.memory import MemoryPlan
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.quantized import precision_of, quantize_blocks, quantize_layers
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer

ALIGNMENT = 64
"""Bytes: every tensor in a file begins at a multiple of it."""


class Offload:
    """Fits the parts of one pipeline to a device, as a plan says, and knows which of them are away from it.

    A part that is away from a GPU lies in the computer's memory. On the CPU, the weights of a part lie in a temporary file that
    is mapped into memory: pages that are not used take none. The file is in the folder for temporary files (TMPDIR), which
    should be on a disk, and goes away with the process.

    Raises ValueError if the plan needs another device.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device):
        if plan.transformer == "fp8":
            check_fp8(device)
        self.plan, self.device = plan, device
        self._leaving: list[nn.Module] = []
        self._present: set[nn.Module] = set()
        self._mapped: dict[nn.Module, mmap.mmap] = {}

    def take(self, part: nn.Module) -> None:
        """Quantize a part that was just loaded, and put it where it waits for its turn.

        A part that was saved quantized keeps its precision. Raises ValueError if the plan's owner asked for another one; but a
        text encoder may have other bits than the transformer, so it is refused only where full precision was asked for.
        """
        self._quantize(part)
        if self.plan.kept == "everything":
            part.to(self.device)
            return
        part.requires_grad_(False)
        part.offload = self  # type: ignore[assignment]  # found by `bring`
        if self.plan.kept == "all but the text encoder" and not isinstance(part, TextEncoder):
            part.to(self.device)
            return
        self._leaving.append(part)
        if self.device.type == "cpu":
            self.renew(part)
        else:
            part.to("cpu")

    def own(self, controlnet: str | Path | SanaControlNet | None) -> str | Path | SanaControlNet | None:
        """A ControlNet that is to be given to `take`; a copy if it came loaded and must stay as it is for others who use it.

        It must if the plan quantizes it or moves it about, and if it belongs to another pipeline whose plan does.
        """
        if not isinstance(controlnet, SanaControlNet):
            return controlnet
        belongs_to_another = hasattr(controlnet, "offload")
        if self.plan.transformer == "full" and self.plan.kept == "everything" and not belongs_to_another:
            return controlnet
        alone = copy.copy(controlnet)  # with the same weights
        vars(alone).pop("offload", None)  # of the other pipeline, with all its parts
        return copy.deepcopy(alone)

    def _quantize(self, part: nn.Module) -> None:
        if not isinstance(part, SanaTransformer | SanaControlNet | TextEncoder):
            return
        is_text, found = isinstance(part, TextEncoder), precision_of(part)
        wanted = self.plan.text_encoder if is_text else self.plan.transformer
        if found == "full":
            (quantize_layers if is_text else quantize_blocks)(part, wanted)
        elif self.plan.asked and found != wanted and (not is_text or wanted == "full"):
            name = type(part).__name__
            raise ValueError(f"precision={wanted}: the {name} was saved as {found}; take a folder in full precision")

    def bring(self, parts: tuple[nn.Module, ...]) -> None:
        """Have these parts on the device, and none of the others that leave it."""
        for part in self._leaving:
            if part in self._present and part not in parts:
                self._send_away(part)
                self._present.remove(part)
        for part in parts:
            if part in self._leaving and part not in self._present:
                if part not in self._mapped:
                    self._fetch(part)
                self._present.add(part)

    def _fetch(self, part: nn.Module) -> None:
        try:
            part.to(self.device)
        except BaseException:  # such as too little memory: some of its weights are there by now
            part.to("cpu")
            raise

    def _send_away(self, part: nn.Module) -> None:
        if (mapped := self._mapped.get(part)) is None:
            part.to("cpu")
        elif hasattr(mapped, "madvise"):  # not on Windows, where the system alone decides what stays in memory
            mapped.madvise(mmap.MADV_DONTNEED)

    def renew(self, part: nn.Module) -> None:
        """Write the weights of a part into its file; to be called again when they were changed in place."""
        if part not in self._leaving or self.device.type != "cpu":
            return
        self._mapped[part] = _map_into_file([tensor for tensor in chain(part.parameters(), part.buffers()) if tensor.numel()])


def bring(*parts: nn.Module) -> None:
    """Have these parts of one pipeline on their device, for the work that follows; other parts may leave it.

    Nothing happens in a pipeline that stays where it is.
    """
    offload = getattr(parts[0], "offload", None)
    if isinstance(offload, Offload):
        offload.bring(parts)


def tile_of(part: nn.Module) -> int | None:
    """Side of the tiles, in pixels, in which the plan of a part has pictures decoded; None: large pictures alone are tiled."""
    offload = getattr(part, "offload", None)
    return offload.plan.tile if isinstance(offload, Offload) else None


def _map_into_file(tensors: list[Tensor]) -> mmap.mmap:
    """Write tensors of the CPU into a temporary file without a name, and have them share its memory. Returns the mapping."""
    with tempfile.TemporaryFile() as file:
        places = []
        for tensor in tensors:
            places.append(file.tell())
            flat = torch.as_strided(tensor.detach(), (_extent(tensor),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)
            file.write(bytes(-file.tell() % ALIGNMENT))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with torch.no_grad():
        for tensor, place in zip(tensors, places, strict=True):
            flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=_extent(tensor), offset=place)
            tensor.data = flat.as_strided(tensor.shape, tensor.stride())
    return mapped


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor, whatever its order in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
