"""What differs between the releases of PyTorch that are supported."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_BEFORE_2_13 = torch.__version__ < (2, 13)


def unsynced_buffers() -> dict[str, bool]:
    """The argument by which DistributedDataParallel leaves buffers as each rank's forward pass has them.

    PyTorch 2.11 calls it broadcast_buffers; 2.13, which warns of that name, forward_sync_buffers.
    """
    known = signature(nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def static_quantization() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None:
    """PyTorch's own: get_default_qconfig_mapping, prepare_fx, convert_fx. None in a release that has given it up.

    PyTorch 2.11 to 2.14 have it and announce that it goes; its successor lives in torchao.
    """
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError:
        return None
    return get_default_qconfig_mapping, prepare_fx, convert_fx


def returned(y: Tensor) -> Tensor:
    """y (any shape), which the forward of an autograd Function has written in place and now returns.

    PyTorch 2.11 compiles such a Function to one whose gradient is zero, and does not say so; 2.13 does not.
    """
    return y.clone() if _BEFORE_2_13 and torch.compiler.is_compiling() else y


class _Awaited(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like)


def awaited(x: Tensor, parameter: Tensor) -> Tensor:
    """x (any shape) itself; its backward pass gives zeros to a `parameter` (any shape) that plays no part in it.

    Several processes wait for a gradient of every parameter; a single one does the same, so that momentum goes on.
    """
    return _Awaited.apply(x, parameter)
