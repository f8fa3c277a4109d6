"""Devices, autocast types and memory formats."""

import copy
import gc
import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any

import pytest
import torch
from networks import SPECS
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.proxy_tensor import make_fx

import emqlib as emq
from emqlib import models
from emqlib.convert import quantized_layers
from emqlib.layers import prepare
from emqlib.norms import MultiBitBatchNorm
from emqlib.train import distributed, loop

CPU = torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    assert distributed.device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distributed.device_named("cpu") == CPU


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv2d(16, 32, 1, stride=2), torch.channels_last),
        (nn.Conv2d(8, 16, 1, stride=1), torch.channels_last),
        (nn.Conv2d(3, 16, 3, stride=2), torch.channels_last),
        (nn.Conv2d(8, 16, 1, stride=2), torch.contiguous_format),
    ],
)
def test_channels_last_only_where_it_is_safe(convolution: nn.Conv2d, expected: torch.memory_format) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), convolution)
    assert distributed.memory_format(net, True, CPU) == expected
    assert distributed.memory_format(net, True, torch.device("cuda")) == torch.channels_last
    assert distributed.memory_format(net, False, CPU) == torch.contiguous_format


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("could not create a memory object"),
        MemoryError("Unable to allocate 9 GiB for an array"),
    ],
)
def test_too_little_memory_names_what_to_try_and_lets_go_of_what_was_computed(error: Exception) -> None:
    def work() -> None:
        held = torch.ones(3)
        kept.append(weakref.ref(held))
        raise error

    kept: list[weakref.ref] = []
    with pytest.raises(MemoryError) as caught, distributed.enough_memory(128, "batch_size=64"):
        work()
    told = str(error).splitlines()[0]
    assert str(caught.value) == f"batch_size=128: out of memory ({told}); try batch_size=64"
    gc.collect()
    assert kept[0]() is None


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("bad_alloc"), KeyboardInterrupt()])
def test_other_errors_are_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, distributed.enough_memory(128, "batch_size=64"):
        raise error
    assert caught.value is error


def test_a_captured_pass_quantizes_weights_first_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    net = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4))).train()
    layers, prepared, x = quantized_layers(net).values(), [], torch.rand(2, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def captured(module: nn.Module, given: tuple[Tensor], **_: object) -> nn.Module:
        module(*given).square().sum().backward()
        prepared.extend(layer.prepared is not None for layer in layers)
        return net

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    distributed.Graphed(net)._captured(x)
    gradients = [p.grad.clone() for p in net.parameters()]
    assert prepared and all(prepared) and all(layer.prepared is None for layer in layers)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    net.zero_grad()
    net(x).square().sum().backward()
    for found, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operations_recorded_at_one_bit_width_serve_every_other(spec: dict[str, Any]) -> None:
    """As a CUDA graph records them: numbers that Python knew stay what they were, tensors are read again."""
    torch.manual_seed(0)
    net = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4, 8), **spec)).double().train()
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    net(images)  # ranges start from a first batch
    plain, step = copy.deepcopy(net), Lock()
    layers = list(quantized_layers(net).values())

    def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
        with step:
            prepare(quantized_layers(model).values(), step)
            logits = model(x)
            return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    emq.set_bits(net, 4)
    norms = [m for m in net.modules() if isinstance(m, MultiBitBatchNorm)]
    kept = [buffer.clone() for buffer in net.buffers()]
    with distributed.bits_in_tensors([*layers, *norms]):
        recorded = make_fx(lambda x: passes(net, x))(images)
    for buffer, before in zip(net.buffers(), kept, strict=True):
        buffer.copy_(before)
    for bits in (4, 2, 8, 2):
        emq.set_bits(net, bits)
        emq.set_bits(plain, bits)
        with torch.no_grad():  # the backward pass was recorded too
            found = recorded(images)
        torch.testing.assert_close(found, passes(plain, images), rtol=1e-8, atol=1e-10)
        for (name, found), expected in zip(net.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=f"{name}, {bits} bits")


class Replayed(Function):
    """A pass that gives the gradients of each call in the same memory, as a CUDA graph does."""

    @staticmethod
    def forward(ctx: FunctionCtx, module: nn.Module, memory: list[Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.own = memory, parameters
        with torch.enable_grad():
            ctx.output = module(x)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        memory, parameters = ctx.own
        for there, found in zip(memory, torch.autograd.grad(ctx.output, parameters, grad), strict=True):
            there.copy_(found)
        return None, None, None, *(there.detach() for there in memory)


@pytest.mark.parametrize(("bits", "accumulate"), [((8, 4, 2), 1), ((4,), 2)])
def test_gradients_of_replayed_passes_are_summed(
    bits: tuple[int, ...], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(module: nn.Module, _: object, **__: object) -> Callable[[Tensor], Tensor]:
        parameters = list(module.parameters())
        memory = [torch.zeros_like(p) for p in parameters]
        return lambda x: Replayed.apply(module, memory, x, *parameters)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    images, labels = torch.rand(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 10
    data = emq.Dataset.from_tensors(images.float(), labels)
    config = emq.TrainConfig(scheme="joint", batch_size=8, accumulate=accumulate, device="cpu")
    torch.manual_seed(0)
    plain = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4, 8))).double().train()
    networks = [plain, copy.deepcopy(plain)]
    for network in networks:
        run = loop._Run(network, data, config, (2, 4, 8))
        if network is plain:
            run.forward = distributed.Graphed(network)
        for _ in range(3):
            watch = loop.LossWatch(run.place, network, run.device)
            loop._step(run, bits, 8, (images, labels, torch.arange(8)), 0.1, watch, "")
    for found, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Collecting another network's graphs then makes CUDA give the capture up, seen on a GPU."""
    seen = []

    def captured(model: nn.Module, *_: object, **__: object) -> nn.Module:
        seen.append(gc.isenabled())
        return model

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    graphed = distributed.Graphed(nn.Linear(2, 2))
    (gc.enable if on else gc.disable)()
    try:
        for _ in range(3):
            graphed(torch.ones(1, 2))
        assert seen == [False] and gc.isenabled() == on
    finally:
        gc.enable()
