"""What depends on the hardware: device, autocast type, memory format, compiling, memory, and the noise drawn there."""

import gc
import re
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from . import checks

# How the CPU's allocator and oneDNN put it; CUDA has an error of its own.
_NO_MEMORY = re.compile(r"can't allocate memory|bad_alloc|could not create a (memory|primitive)")

AUTOCAST = ("none", "bfloat16", "float16")

# From how many steps a layer on compiling pays. Of ResNet-20 on two cores it takes about two seconds a layer and saves
# a step 0.4 to 1.2 ms a layer (benchmarks/steps.py): even after 100 to 260. Counted, not timed: runs are repeatable.
COMPILE_STEPS = 500


def has_cuda() -> bool:
    """Whether there is a CUDA device, asked of the driver alone: processes forked afterwards can still use it."""
    return torch.cuda.device_count() > 0


def device(name: str) -> torch.device:
    """The device called "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1"; ValueError that lists those here."""
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return torch.device(checks.choice("device", name, ["auto", "cpu", *(["cuda", *found] if found else [])]))


def autocast_used(name: str, device: torch.device) -> str:
    """The autocast type that `device` really gets: "none" for "bfloat16" on a CPU without it, told once by a warning.

    A CPU of AVX2 and no more would take ten times as long in bfloat16 as in float32.
    """
    if name == "bfloat16" and device.type == "cpu" and not has_bfloat16():
        _tell_of_float32()
        return "none"
    return name


def has_bfloat16() -> bool:
    """Whether oneDNN has kernels for bfloat16 on this CPU, which without them is slower in it than in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _tell_of_float32() -> None:
    told = "this processor has no fast bfloat16: what asks for it on the CPU runs in float32, which is faster here"
    warnings.warn(told, stacklevel=3)


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """The context in which a forward pass runs in "bfloat16" or "float16", if it has that; "none" changes nothing."""
    name = autocast_used(name, device)
    if name == "none":
        return nullcontext()
    # CUDA graphs cannot have the cache, which saves nothing where each weight is cast once a step
    return torch.autocast(device.type, dtype=getattr(torch, name), cache_enabled=device.type != "cuda")


def fails_channels_last(conv: nn.Conv2d) -> bool:
    """Whether `conv` has a gradient on a CPU that needs its input and weight to be contiguous.

    That of a strided 1x1 convolution of few channels-last input channels writes outside its buffer and crashes, hangs
    or is wrong (oneDNN issue 6035, seen with torch 2.14.1). `layers.SafeConv2d` computes it in another way.
    """
    return set(conv.kernel_size) == {1} and max(conv.stride) > 1 and conv.in_channels < 16


def _stays_contiguous(model: nn.Module, device: torch.device) -> bool:
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return device.type == "cpu" and any(map(fails_channels_last, convolutions))


def memory_format(model: nn.Module, channels_last: bool, device: torch.device) -> torch.memory_format:
    """The format for the weights and images (N, C, H, W) of `model`: channels-last where asked for and safe."""
    safe = channels_last and not _stays_contiguous(model, device)
    return torch.channels_last if safe else torch.contiguous_format


def compiled(model: nn.Module, how: bool | str, steps: int) -> nn.Module:
    """`model` through torch.compile, where `how` is True, or "auto" and the run has steps enough to earn that back.

    On a CPU a network with a convolution that `fails_channels_last` is not compiled: the compiler chooses formats by
    itself, and what it made of such networks crashed or gave NaN even when told to keep theirs (torch 2.14.1).
    """
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    pays = how == "auto" and steps >= COMPILE_STEPS * layers
    safe = not _stays_contiguous(model, next(model.parameters()).device)
    return torch.compile(model) if safe and (how is True or pays) else model


class Graphed:
    """Training passes of `model` on a GPU as CUDA graphs, one for each shape of a batch and each `state`.

    A network of small kernels spends most of a step on launching them one by one; a graph launches all at once.
    state: tells what the passes depend on, such as the bit-width, besides their input and tensors that are changed in
    place. The first call of its kind is the network's own, as are calls while a submodule is hooked.
    """

    def __init__(self, model: nn.Module, state: Callable[[], Hashable]) -> None:
        self.model, self.state, self.pool = model, state, torch.cuda.graph_pool_handle()
        self.known: dict[Hashable, Callable[[Tensor], Tensor] | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the network in training for x (B, ...) on a CUDA device."""
        _, *parts = self.model.modules()
        if any(part._forward_pre_hooks or part._forward_hooks for part in parts):
            return self.model(x)
        kind = (self.state(), x.shape, x.stride(), x.dtype)
        if kind not in self.known:  # what is made at first sight, such as the ranges of inputs, is not for a graph
            self.known[kind] = None
            return self.model(x)
        if self.known[kind] is None:
            self.known[kind] = self._captured(x)
        return self.known[kind](x)

    def _captured(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Whatever the passes that warm up have changed, running statistics for one, is put back."""
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        without_hooks = nn.Sequential(self.model).train()
        own = {"allow_unused_input": True, "pool": self.pool}  # one memory for all, of which two are never at work
        with _no_garbage_collection():
            graphed = torch.cuda.make_graphed_callables(without_hooks, (x.clone(),), **own)
        for buffer, value in before:
            buffer.copy_(value)
        return graphed


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within the block; an earlier network's graphs, collected while another is captured, would spoil the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def enough_memory(name: str, value: int, advice: str) -> Iterator[None]:
    """Within the block, too little memory is a MemoryError that names a parameter and says what to try instead.

    What was computed until then is let go: a traceback that is kept, as Jupyter does, would keep all of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).partition("\n")[0]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _NO_MEMORY.search(told):
            raise
        traceback.clear_frames(error.__traceback__)
        raise MemoryError(f"{name}={value}: out of memory ({told}); try {advice}") from None


def noise(device: torch.device) -> list[Tensor]:
    """The states (K,), in bytes, of the global generators that a network on `device` draws from: the CPU's first."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.default_generator.get_state(), *cuda]


def set_noise(device: torch.device, states: list[Tensor]) -> None:
    """Take over what `noise` gave, states (K,); a CUDA device leaves its own where they are a CPU's alone."""
    torch.default_generator.set_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
