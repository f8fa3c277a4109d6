"""Devices, autocast types and memory formats."""

import gc
import weakref

import pytest
import torch
from torch import nn

import emqlib as emq
from emqlib import models
from emqlib.convert import quantized_layers
from emqlib.train import distributed

CPU = torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    assert distributed.device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distributed.has_cuda() == torch.cuda.is_available()
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
    with pytest.raises(MemoryError) as caught, distributed.enough_memory("batch_size", 128, "batch_size=64"):
        work()
    told = str(error).splitlines()[0]
    assert str(caught.value) == f"batch_size=128: out of memory ({told}); try batch_size=64"
    gc.collect()
    assert kept[0]() is None


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("bad_alloc"), KeyboardInterrupt()])
def test_other_errors_are_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, distributed.enough_memory("batch_size", 128, "batch_size=64"):
        raise error
    assert caught.value is error


def test_a_captured_pass_quantizes_weights_first_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    net = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4))).train()
    layers, prepared, x = quantized_layers(net).values(), [], torch.rand(2, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def captured(module: nn.Module, given: tuple[torch.Tensor], **_: object) -> nn.Module:
        module(*given).square().sum().backward()
        prepared.extend(layer.prepared is not None for layer in layers)
        return net

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    distributed.Graphed(net, lambda: 4)._captured(x)
    gradients = [p.grad.clone() for p in net.parameters()]
    assert prepared and all(prepared) and all(layer.prepared is None for layer in layers)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    net.zero_grad()
    net(x).square().sum().backward()
    for found, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad)


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Collecting another network's graphs then makes CUDA give the capture up, seen on a GPU."""
    seen = []

    def captured(model: nn.Module, *_: object, **__: object) -> nn.Module:
        seen.append(gc.isenabled())
        return model

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    graphed = distributed.Graphed(nn.Linear(2, 2), lambda: 8)
    (gc.enable if on else gc.disable)()
    try:
        for _ in range(3):
            graphed(torch.ones(1, 2))
        assert seen == [False] and gc.isenabled() == on
    finally:
        gc.enable()
