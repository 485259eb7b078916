"""Choose where and in which arithmetic a site's network runs: the fastest safe setting of the machine.

"auto" means bfloat16 autocast and channels-last memory where the processor multiplies bfloat16 itself
(CUDA since Ampere; CPUs with AVX512-BF16 or AMX: 2 to 3 times the speed of float32 there), and float32 in
channels-last elsewhere. Weights, optimiser and loss stay float32 throughout. "float32" is PyTorch's plain
arithmetic, the same on every machine of a federation and the same as any textbook loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedward_common.errors import RefusalCode, TrainingError

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """Device, autocast and memory layout of one training or evaluation."""

    device: torch.device
    bfloat16: bool
    channels_last: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """Open the context in which the network's forward pass runs."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def place_model(self, model: nn.Module, num_dims: int) -> None:
        """Move a model here in place; `num_dims` is that of a batch, `2 + spatial dimensions`."""
        model.to(self.device)
        # `channels_last` applies to 4-D tensors only, `channels_last_3d` to 5-D ones
        model.to(memory_format=self._memory_format(num_dims))  # type: ignore[call-overload]

    def place_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Move a batch `(batch, channels, *size)` here in the network's memory layout."""
        return images.to(self.device, memory_format=self._memory_format(images.dim()))

    def _memory_format(self, num_dims: int) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if num_dims == 5 else torch.channels_last


def choose(device: str, precision: Precision) -> Compute:
    """Turn the site's device setting and the plan's precision into a setting for this machine.

    Args:
        device: "auto" (CUDA, then MPS, then CPU), or a PyTorch device.
        precision: of the plan; "bfloat16" is kept even where it is emulated, and slow.

    Raises:
        TrainingError: the site's configuration names a device that this machine does not have.
    """
    chosen = _device(device)
    if precision == "float32":
        return Compute(chosen, bfloat16=False, channels_last=False)
    fast = multiplies_bfloat16(chosen.type)
    return Compute(chosen, bfloat16=fast or precision == "bfloat16", channels_last=chosen.type != "mps")


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Tell whether the hardware has bfloat16 arithmetic of its own, so that autocast gains time."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device_type != "cpu" or not onednn:
        return False
    try:
        listing = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux: no machine known there has these instructions
        return False
    flags = next((line for line in listing.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _device(name: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.partition(":")[0], False):
        raise TrainingError(
            f"device {name!r} is not available on this machine",
            remedy='Set device = "auto" in site.toml, or install the PyTorch build for that device.',
        )
    return torch.device(name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads, and put the number back; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_errors_named() -> Iterator[None]:
    """Turn the several ways in which Python and PyTorch say "no memory" into one error.

    Raises:
        TrainingError: with code OUT_OF_MEMORY.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator has no error class of its own
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise TrainingError(
                "not enough memory for a batch of this plan",
                remedy="Free memory, or ask the coordinator for a smaller batch_size or transforms.size.",
                code=RefusalCode.OUT_OF_MEMORY,
            ) from error
        raise
