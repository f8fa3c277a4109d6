"""What differs between releases: what this one has, and what others have."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from emqlib import kernels as versions
from emqlib import models
from emqlib.train import distributed as ranks

DDP = nn.parallel.DistributedDataParallel


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_buffers_are_left_alone() -> None:
    """By an argument of which this release does not warn: here a warning is an error."""
    assert DDP(nn.BatchNorm1d(2)).broadcast_buffers
    assert not DDP(nn.BatchNorm1d(2), **versions.unsynced_buffers()).broadcast_buffers


def older(module: nn.Module, broadcast_buffers: bool = True) -> None: ...


def newer(module: nn.Module, broadcast_buffers: Any = None, forward_sync_buffers: Any = None) -> None: ...


@pytest.mark.parametrize(("release", "name"), [(older, "broadcast_buffers"), (newer, "forward_sync_buffers")])
def test_the_newest_name_is_taken(release: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", release)
    assert versions.unsynced_buffers() == {name: False}


@pytest.mark.filterwarnings("ignore")  # that it is to go, in the words of each release
def test_static_quantization(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions.static_quantization()
    if found is not None:
        mapping, prepare, convert = found
        net, images = models.resnet8().eval(), torch.rand(64, 3, 32, 32, generator=rng)
        with torch.no_grad():
            prepared, expected = prepare(net, mapping("x86"), (images[:1],)), net(images)
            torch.testing.assert_close(prepared(images), expected)
            error = (convert(prepared)(images) - expected).abs().max()
        assert 0 < error < 0.5 * expected.std()  # integers of eight bits: close, and not the same
    monkeypatch.setitem(sys.modules, "torch.ao.quantization.quantize_fx", None)
    assert versions.static_quantization() is None


class Half(torch.autograd.Function):
    """Half of x, written in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return versions.returned((x + x).div_(4))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("function", "slope"), [(Half.apply, 0.5), (ranks.total, 1.0)])
def test_compiled_functions_keep_their_gradient(function: Callable, slope: float) -> None:
    torch._dynamo.reset()
    x = torch.arange(4.0, requires_grad=True)
    y = torch.compile(lambda x: function(2 * x), backend="eager", fullgraph=True)(x)
    y.square().sum().backward()
    torch._dynamo.reset()
    y_over_x = 2 * slope
    assert torch.equal(y, y_over_x * x) and torch.equal(x.grad, 2 * y_over_x**2 * x)
