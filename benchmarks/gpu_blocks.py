"""The kernels of a residual block compiled for a GPU, as `TrainConfig(compile="blocks")` does, found without one.

`python benchmarks/gpu_blocks.py` traces a block of the paper's network forward and backward, lets PyTorch's compiler
generate its code for an H100, and writes each kernel it launches. Claim: a batch norm's application, clipping and
rounding are one kernel forward, and what goes back through them takes three on images, so that there is little to gain
by kernels of our own. The two that only copy images into another memory format are not there in a network on a GPU.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import seaborn as sns
import torch
import triton
from common import write
from gpu_step import network
from matplotlib.axes import Axes
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import async_compile, debug, decomposition, graph, virtualized
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import emqlib as emq
from emqlib.paper import plots
from emqlib.train.distributed import blocks

CUDA = torch.device("cuda:0")
H100 = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32, "total_memory": 80 << 30}
H100 |= {"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "regs_per_multiprocessor": 65536}
CALL = re.compile(
    r"^\s+(?:buf\d+ = )?(triton_\w+|extern_kernels\.\w+|torch\.ops\.aten\.\w+)(?:\.run|\.default)?\((.*)\)"
)


@contextmanager
def pretended() -> Iterator[None]:
    """Within the block the compiler believes that there is an H100, and compiles no kernel that it has generated."""

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    told = {"get_device_properties": SimpleNamespace(**H100), "current_device": 0}
    more = {"get_compute_capability": 90, "is_available": True}
    found = {"get_device_capability": (9, 0), "is_available": True, "device_count": 1, "current_stream": None}
    with ExitStack() as held:
        for place, answers in ((CudaInterface, told | more), (CudaInterface.Worker, told), (torch.cuda, told | found)):
            of_class = staticmethod if place is not torch.cuda else lambda f: f
            for name, value in answers.items():
                held.enter_context(mock.patch.object(place, name, of_class(answer(value))))
        for name in ("torch.utils._triton.triton_hash_with_backend", "torch.utils._triton.triton_backend"):
            held.enter_context(mock.patch(name, answer("")))
        # its answer is kept for the life of a process, which may have asked before
        held.enter_context(mock.patch("torch._inductor.scheduler.has_triton", answer(True)))
        held.enter_context(mock.patch.object(type(triton.runtime.driver), "active", mock.Mock()))
        held.enter_context(mock.patch.object(async_compile.AsyncCompile, "triton", answer(None)))
        yield


def generated(traced: fx.GraphModule, inputs: list[Any], backward: bool) -> str:
    """The compiler's program for `traced`, a graph of tensors without numbers on the CPU, moved to a GPU."""
    mode = next(x.fake_mode for x in inputs if isinstance(x, Tensor))
    for node in traced.graph.nodes:
        node.kwargs = node.kwargs | ({"device": CUDA} if "device" in node.kwargs else {})
        node.args = tuple(CUDA if isinstance(x, torch.device) else x for x in node.args)
    traced.recompile()
    with mode:
        there = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) for x in inputs]
    FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*there)
    with pretended(), virtualized.V.set_fake_mode(mode), debug.DebugContext():
        post_grad_passes(traced, is_inference=False)
        lowering = graph.GraphLowering(traced, example_inputs=there, is_backward=backward, shape_env=mode.shape_env)
        with virtualized.V.set_graph_handler(lowering):
            lowering.run(*there)
            return lowering.codegen()[0].value


def called(code: str) -> Iterator[dict[str, Any]]:
    """Rows: kernel, its name, and size, how many numbers it goes over, if it is one of the compiler's own."""
    for line in code.splitlines():
        if found := CALL.match(line):
            sizes = [int(word) for word in found[2].split(", ") if word.isdigit()]
            own = found[1].startswith("triton_")
            yield {"kernel": found[1], "size": torch.Size(sizes).numel() if own else None}


def measure(width_factor: int = 5, batch: int = 128, bits: int = 4, size: int = 32) -> pd.DataFrame:
    """Rows: direction, kernel, size and kind, of the network's second block on images (batch, channels, size, size)."""
    rows: list[dict[str, Any]] = []
    model = network(width_factor).train()
    emq.set_bits(model, bits)
    block = blocks(model)[1]
    channels = block.conv1.in_channels

    def compiler(direction: str) -> Callable[..., Any]:
        def lower(traced: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            plain = fx.GraphModule(traced, copy.deepcopy(traced.graph))
            rows.extend(
                {"direction": direction} | row for row in called(generated(traced, inputs, direction != "forward"))
            )
            return make_boxed_func(plain)

        return lower

    # a GPU's branch of our own backward pass is not the one that a compiled CPU takes
    compiling = mock.patch.object(torch.compiler, "is_compiling", lambda: sys._getframe(1).f_code.co_name != "backward")
    split = {"partition_fn": min_cut_rematerialization_partition, "keep_inference_input_mutations": True}
    with compiling, FakeTensorMode(allow_non_fake_inputs=True):
        state = {k: torch.empty_like(v) for k, v in (*block.named_parameters(), *block.named_buffers())}
        state |= {k: nn.Parameter(state[k]) for k, _ in block.named_parameters()}
        x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16).requires_grad_()

        def forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                return functional_call(block, state, (x,))

        by = {"fw_compiler": compiler("forward"), "bw_compiler": compiler("backward")}
        y = aot_function(forward, **by, **split, decompositions=decomposition.select_decomp_table())(state, x)
        y.backward(torch.empty_like(y))
    return pd.DataFrame(rows).assign(images=lambda rows: rows["size"] >= x.numel(), batch=batch, bits=bits)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a kernel: direction, name, over how many numbers it goes (millions), and how often it is launched."""
    sizes = rows["size"].map(lambda size: "" if pd.isna(size) else f"{size / 1e6:.2f}").rename("numbers (millions)")
    return rows.groupby(["direction", "kernel", sizes], sort=False).size().rename("launches").reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """Launches of the block by direction: of the compiler's kernels on images, of its others, and of convolutions."""
    title = f"A compiled residual block launches {rows.images.sum()} kernels on images, of {len(rows)} in all"
    kind = rows.images.map({True: "on images", False: "on weights and sums"}).where(rows["size"].notna(), "products")
    counts = rows.assign(kind=kind).groupby(["kind", "direction"], sort=False).size().rename("kernels").reset_index()
    ax = plots.axes(None, title)
    sns.barplot(counts, x="kernels", y="kind", hue="direction", palette="colorblind", ax=ax)
    return plots.finish(ax, "launches of kernels", "")


if __name__ == "__main__":
    rows = measure()
    write("gpu_blocks", rows, summary(rows), figure(rows))
