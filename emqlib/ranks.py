"""Several processes, a rank each, that train one network on parts of each batch: what they share and what each does.

Alone, a process is rank 0 of 1, and nothing here costs anything. Accelerate starts the others and joins them.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import devices, versions


@dataclass(frozen=True)
class Ranks:
    """This process's place, `rank` of `count`, among those that train together; alone it needs no accelerator."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that records scores, shows progress and writes files."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of that name, see `devices.device`; among several ranks, this one's own."""
        if self.accelerator is None:
            return devices.device(name)
        own = self.accelerator.device
        return own if own.type == "cuda" else torch.device(own.type)  # not "cpu:0", which no checkpoint loads onto

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of a batch (B, ...), of near-equal size to the others'."""
        return x.tensor_split(self.count)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` so that its gradients are averaged over ranks in the backward pass."""
        if self.accelerator is None:
            return model
        # not Accelerate's own, which would put the launcher's mixed precision into the model for good
        own = self.device("")
        own = [own] if own.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=own, **versions.unsynced_buffers())

    def alone(self, wrapped: nn.Module) -> AbstractContextManager:
        """The context of a forward and backward pass whose gradients wait for those of a later one to be averaged."""
        return wrapped.no_sync() if self.accelerator is not None else nullcontext()

    def first(self) -> AbstractContextManager:
        """The context of what rank 0 does before the others."""
        return nullcontext() if self.accelerator is None else self.accelerator.main_process_first()

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.accelerator is None:
            return value
        values = [value if self.main else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        if self.accelerator is None:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather(self, indices: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Sample indices (B,) and what belongs to them, tensors (B, ...), of all ranks: a sample's are on one alone.

        Ranks have parts of unequal size, so they are padded on the way, by indices of -1, which are then left out.
        """
        if self.accelerator is None:
            return indices, *tensors
        padded = self.accelerator.pad_across_processes(indices, pad_index=-1)
        real = self.accelerator.gather(padded) >= 0
        found = [None if t is None else self.accelerator.pad_across_processes(t) for t in (indices, *tensors)]
        return tuple(None if t is None else self.accelerator.gather(t)[real] for t in found)

    def sums(self, *values: float) -> list[float]:
        """Each of `values` summed over ranks."""
        if self.accelerator is None:
            return list(values)
        return total(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()

    @contextmanager
    def joined(self, where: str) -> Iterator[None]:
        """Within the block, the error that a rank gets when another one has gone says so, and where to go on from."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1:
                raise
            lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()
            if not lost:
                raise
            text = f"rank {self.rank} of {self.count}: another rank has stopped, see its own error; start all of them"
            raise RuntimeError(f"{text} again, and training goes on from {where}") from error


def started() -> int:
    """How many processes a launcher started, this one included; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def current(device: str = "auto") -> Ranks:
    """Where this process stands: alone, unless accelerate launch, torchrun or notebook_launcher started several.

    device: "cpu" to stay off CUDA devices. ImportError that says what to install: several without Accelerate.
    """
    if started() == 1:
        return Ranks()
    place = accelerate().Accelerator(cpu=devices.device(device).type == "cpu")
    return Ranks(place.process_index, place.num_processes, place)


def accelerate() -> ModuleType:
    """The package, which only several processes need; ImportError that says how to install it."""
    try:
        import accelerate
    except ImportError as error:
        raise ImportError('several processes need Accelerate: pip install "emqlib[distributed]"') from error
    return accelerate


class _Total(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return versions.returned(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return _Total.apply(grad)  # each rank's loss depends on every rank's x


def total(x: Tensor) -> Tensor:
    """x (any shape) summed over ranks; differentiable."""
    return _Total.apply(x)


class _Awaited(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


def awaited(x: Tensor, parameter: Tensor) -> Tensor:
    """x (any shape) as it is; its gradient brings zeros for a `parameter` (any shape) that takes no part in it.

    Several ranks wait for a gradient of each parameter; alone, an optimizer's momentum goes on as it does among them.
    """
    return _Awaited.apply(x, parameter)


def mean(x: Tensor) -> Tensor:
    """x (any shape), a statistic of each rank's part, averaged over ranks."""
    return total(x) / dist.get_world_size()


def lowest(x: Tensor) -> Tensor:
    """The lowest x (any shape) of all ranks."""
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


@contextmanager
def synchronized(model: nn.Module, place: Ranks, accumulate: int = 1) -> Iterator[None]:
    """Within the block, what layers measure of a batch they measure over all ranks: means, variances, ranges.

    accumulate: in how many parts each rank takes its share of a step.
    """
    layers = [m for m in model.modules() if hasattr(m, "across_ranks")] if place.count * accumulate > 1 else []
    for layer in layers:
        layer.across_ranks, layer.parts = place.count > 1, place.count * accumulate
    try:
        yield
    finally:
        for layer in layers:
            del layer.across_ranks, layer.parts  # the class's own are back
