"""What depends on the hardware, and several processes that train one network together."""

import gc
import os
import re
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..convert import quantized_layers
from ..layers import fails_channels_last, prepare
from ..norms import MultiBitBatchNorm

# How the CPU's allocator and oneDNN put it; CUDA has an error of its own.
_NO_MEMORY = re.compile(r"can't allocate memory|bad_alloc|could not create a (memory|primitive)")

# Compile if a run has at least this many steps for each layer. On two cores, compiling ResNet-20 takes about 40 s and
# saves 8 to 23 ms a step (benchmarks/steps.py), so it pays after 100 to 260 steps for each layer. A fixed number, not
# a time, keeps runs repeatable.
COMPILE_STEPS = 500


def device_named(name: str) -> torch.device:
    """The device called "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1"; ValueError that lists those here."""
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return torch.device(checks.choice("device", name, ["auto", "cpu", *(["cuda", *found] if found else [])]))


def autocast_used(name: str, device: torch.device) -> str:
    """The autocast type that `device` really gets: "none" for "bfloat16" on a CPU without it."""
    return "none" if name == "bfloat16" and device.type == "cpu" and not has_bfloat16() else name


@cache
def has_bfloat16() -> bool:
    """Whether this CPU has kernels for bfloat16; without, a warning says once that float32 is ten times as fast."""
    found = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not found:
        told = "this processor has no fast bfloat16: what asks for it on the CPU runs in float32, which is faster here"
        warnings.warn(told, stacklevel=3)
    return found


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """The context in which a forward pass runs in "bfloat16" or "float16", if it has that; "none" changes nothing."""
    name = autocast_used(name, device)
    if name == "none":
        return nullcontext()
    # CUDA graphs cannot have the cache, which saves nothing where each weight is cast once a step
    return torch.autocast(device.type, dtype=getattr(torch, name), cache_enabled=device.type != "cuda")


def _stays_contiguous(model: nn.Module, device: torch.device) -> bool:
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return device.type == "cpu" and any(map(fails_channels_last, convolutions))


def memory_format(model: nn.Module, channels_last: bool, device: torch.device) -> torch.memory_format:
    """The format for the weights and images (N, C, H, W) of `model`: channels-last where asked for and safe."""
    tensors = (*model.parameters(), *model.buffers())
    flat = all(t.dim() < 5 for t in tensors)  # a three-dimensional convolution has another such format
    safe = channels_last and flat and not _stays_contiguous(model, device)
    return torch.channels_last if safe else torch.contiguous_format


@contextmanager
def views_explained(images: torch.memory_format) -> Iterator[None]:
    """Within the block, the error of a `view` that does not fit channels-last images says how to train without them."""
    try:
        yield
    except RuntimeError as error:
        if images is torch.channels_last and "view size is not compatible" in str(error):
            allowed = "False, as the network calls view on images (or flatten(1) or reshape in place of view)"
            raise checks.invalid("channels_last", True, allowed) from error
        raise


def compiled(model: nn.Module, how: bool | str, steps: int) -> nn.Module:
    """`model` through torch.compile, where `how` is True, or "auto" and the run has steps enough to earn that back.

    On a CPU a network with a convolution that `fails_channels_last` is not compiled: the compiler chooses formats by
    itself, and what it made of such networks crashed or gave NaN, even when told to keep theirs (torch 2.14.1).
    """
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    pays = how == "auto" and steps >= COMPILE_STEPS * layers
    safe = not _stays_contiguous(model, next(model.parameters()).device)
    return torch.compile(model) if safe and (how is True or pays) else model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network: what its sequences and lists hold, if several quantized layers are in it."""
    held = [part for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) for part in m.children()]
    found = [part for part in held if len(quantized_layers(part)) > 1 and not isinstance(part, nn.Sequential)]
    inner = {id(m) for part in found for m in part.modules() if m is not part}
    return [part for part in found if id(part) not in inner]


@contextmanager
def blocks_compiled(model: nn.Module, how: bool | str) -> Iterator[None]:
    """Within the block, if `how` is "blocks", each of `blocks` is compiled by itself; blocks alike share a graph."""
    safe = not _stays_contiguous(model, next(model.parameters()).device)
    chosen = blocks(model) if how == "blocks" and safe else []
    if not chosen:
        yield
        return
    for part in chosen:
        part.compile(dynamic=False)
    try:
        # a graph for each shape of a block, with and without rounding, of each size of batch; by default 8 in all
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for part in chosen:
            part._compiled_call_impl = None


class _Prepared(nn.Module):
    """A network that quantizes all its weights first, as `convert.step_weights` does; `step` is held by the caller."""

    def __init__(self, model: nn.Module, step: Lock) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x: Tensor) -> Tensor:
        """The output of the network for x (B, ...)."""
        prepare(quantized_layers(self.model).values(), self.step)
        return self.model(x)


@contextmanager
def bits_in_tensors(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, quantized layers and batch norms read the bit-width from tensors; 32 bits stay as they are."""
    parts = list(parts)
    for part in parts:
        part.bits_in_tensors = True
    try:
        yield
    finally:
        for part in parts:
            part.bits_in_tensors = False


class Graphed:
    """Training passes of `model` on a GPU as CUDA graphs, one for each shape of a batch, and another for 32 bits.

    A network of small kernels spends most of a step on launching them one by one; a graph launches all at once. It
    reads the bit-width from tensors that `set_bits` changes in place. The first call of each kind runs the network
    itself, and so do all calls while the network or a part of it has a hook of its forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.pool = model, torch.cuda.graph_pool_handle()
        self.layers = list(quantized_layers(model).values())
        self.norms = [m for m in model.modules() if isinstance(m, MultiBitBatchNorm)]
        self.known: dict[Hashable, Callable[[Tensor], Tensor] | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the network in training for x (B, ...) on a CUDA device."""
        if any(part._forward_pre_hooks or part._forward_hooks for part in self.model.modules()):
            return self.model(x)
        kind = (self._state(), x.shape, x.stride(), x.dtype)
        if kind not in self.known:  # what is made at first sight, such as the ranges of inputs, is not for a graph
            self.known[kind] = None
            return self.model(x)
        if self.known[kind] is None:
            self.known[kind] = self._captured(x)
        return self.known[kind](x)

    def _state(self) -> Hashable:
        """What passes depend on besides their input and the numbers in tensors."""
        rounding = tuple((layer.full, layer.levels.data_ptr()) for layer in self.layers)
        return rounding, tuple(frozenset(norm.own) for norm in self.norms)

    def _captured(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Capturing runs passes to warm up; what they change, such as running statistics, is put back."""
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        step = Lock()
        without_hooks = _Prepared(self.model, step).train()
        collecting = gc.isenabled()
        gc.disable()  # an earlier network's graphs, collected during a capture, would spoil it
        try:
            own = {"allow_unused_input": True, "pool": self.pool}  # one memory for all: no two are ever at work
            with step, bits_in_tensors([*self.layers, *self.norms]):
                graphed = torch.cuda.make_graphed_callables(without_hooks, (x.clone(),), **own)
        finally:
            for layer in self.layers:
                layer.prepared = None
            if collecting:
                gc.enable()
        for buffer, value in before:
            buffer.copy_(value)
        return graphed


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Within the block, cuDNN tries its algorithms on each shape once; not where the user asks for repeatable runs."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.benchmark
    repeatable = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = before or (device.type == "cuda" and not repeatable)
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextmanager
def enough_memory(batch_size: int, advice: str) -> Iterator[None]:
    """Within the block, too little memory is a MemoryError that names `batch_size` and says what to try instead.

    What was computed until then is let go: Jupyter keeps a traceback, and with it everything its frames hold.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _NO_MEMORY.search(told):
            raise
        traceback.clear_frames(error.__traceback__)
        raise MemoryError(f"batch_size={batch_size}: out of memory ({told}); try {advice}") from None


@dataclass(frozen=True)
class Place:
    """Which of several processes this one is, `index` of `count`, that train one network together."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that records scores, shows progress and writes files."""
        return self.index == 0

    def device(self, name: str) -> torch.device:
        """The device of that name; among several processes on GPUs, the one of this process."""
        named = device_named(name)
        several = self.count > 1 and named.type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if several else named

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a batch (B, ...); parts differ by one sample at most."""
        return x.tensor_split(self.count)[self.index]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` so that the backward pass averages its gradients over processes."""
        if self.count == 1:
            return model
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # PyTorch 2.11 calls it broadcast_buffers; 2.13, which warns of that name, forward_sync_buffers
        known = "forward_sync_buffers" in signature(ddp).parameters
        return ddp(model, device_ids=devices, **{"forward_sync_buffers" if known else "broadcast_buffers": False})

    @contextmanager
    def first(self) -> Iterator[None]:
        """The context of what the main process does before the others."""
        if not self.main:
            dist.barrier()
        yield
        if self.main and self.count > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """Every process's `value`, in every process."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def gather(self, batches: list[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
        """The `batches` of each process, in the main process, with tensors on the CPU; in the others nothing."""
        if self.count == 1:
            return [batches]
        found = [None] * self.count if self.main else None
        dist.gather_object([tuple(x.cpu() if isinstance(x, Tensor) else x for x in batch) for batch in batches], found)
        return found or []

    @contextmanager
    def joined(self, where: str) -> Iterator[None]:
        """Within the block, an error that comes from another process's end says so, and where training goes on from."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
            if self.count == 1 or not lost:
                raise
            text = f"process {self.index} of {self.count}: another process has stopped, see its own error"
            raise RuntimeError(f"{text}; start all of them again, and training goes on from {where}") from error


def current(device: str = "auto") -> Place:
    """Where this process stands among those that a launcher started; device: "cpu" to stay off CUDA devices.

    ImportError: several processes without Accelerate; says what to install.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as launchers set it
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError('several processes need Accelerate: pip install "emqlib[distributed]"') from error
        PartialState(cpu=device_named(device).type == "cpu")
    return here()


def here() -> Place:
    """Where this process stands among those of torch.distributed, if that is initialized; else alone."""
    together = dist.is_available() and dist.is_initialized()
    return Place(dist.get_rank(), dist.get_world_size()) if together else Place()


def gather(x: Tensor) -> Tensor:
    """The tensors x (...) of all processes, stacked: (P, ...)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


@contextmanager
def synchronized(model: nn.Module, place: Place, accumulate: int = 1) -> Iterator[None]:
    """Within the block, layers measure a batch's means, variances and ranges over all processes.

    Args:
        accumulate: in how many parts each process takes its share of a step.
    """
    layers = [m for m in model.modules() if hasattr(m, "gathered")]
    for layer in layers:
        layer.gathered = gather if place.count > 1 else None
        layer.parts = place.count * accumulate
    try:
        yield
    finally:
        for layer in layers:
            layer.gathered, layer.parts = None, 1
