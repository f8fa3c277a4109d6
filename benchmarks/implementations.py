"""A training and an inference step at 8 bits by each implementation, alternating in one process.

`python benchmarks/implementations.py` runs the pre-activation ResNet-20 of width 16 and writes a row an
implementation and repeat to results/benchmarks/implementations.csv: plain PyTorch, ours, brevitas and torchao's
quantization-aware training (both of the extra `bench`), and, where EMQ_ANY_PRECISION names a checkout of
SHI-Labs/Any-Precision-DNNs, the published code. torchao is measured in training, and in float32, alone: what it infers
with is another network. Claim: ours is ahead of all that quantize.
"""

import copy
import warnings
from collections.abc import Callable
from itertools import product

import any_precision
import pandas as pd
import steps
import torch
from common import over_repeats, ranges, write
from matplotlib.axes import Axes
from torch import nn

import emqlib as emq
from emqlib import models
from emqlib.paper import runs
from emqlib.train import distributed

BITS = 8
PHASES = ("training", "inference")
COMPILED = ("plain", "ours", "published code")


def ours(net: nn.Module) -> nn.Module:
    """Converted, with weight bias correction."""
    return emq.convert(net, emq.QuantSpec(bits=(2, 4, BITS)))


def with_brevitas(net: nn.Module) -> nn.Module:
    """Every ReLU, and every convolution but the first, replaced by brevitas' quantized twin."""
    from brevitas import nn as qnn

    net = copy.deepcopy(net)
    named = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.ReLU))]
    for name, module in named[1:]:
        if isinstance(module, nn.ReLU):
            net.set_submodule(name, qnn.QuantReLU(bit_width=BITS))
            continue
        shape = (module.in_channels, module.out_channels, module.kernel_size)
        twin = qnn.QuantConv2d(*shape, stride=module.stride, padding=module.padding, bias=False, weight_bit_width=BITS)
        twin.weight.data.copy_(module.weight)
        net.set_submodule(name, twin)
    return net


def with_torchao(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """torchao's quantization-aware training by graph, in the 8 bits of its CPU quantizer."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(torch.export.export(copy.deepcopy(net).train(), (x,)).module(), quantizer)


def implementations(data: emq.Dataset, x: torch.Tensor, only: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """By name, the network as each library quantizes it; `only`: of these names. What is not installed is left out."""
    net = models.preact_resnet20(data.num_classes, width_factor=1)
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: copy.deepcopy(net),
        "ours": lambda: ours(net),
        "published code": lambda: any_precision.published_network(any_precision.published(), (2, 4, BITS)),
        "brevitas": lambda: with_brevitas(net),
        "torchao": lambda: with_torchao(net, x),
    }
    made = {}
    for name, maker in makers.items():
        if only and name not in only:
            continue
        try:
            made[name] = maker()
        except (ImportError, ValueError) as error:
            warnings.warn(f"{name}: not run ({error})", stacklevel=2)
    return made


def measure(
    data: emq.Dataset,
    precisions: tuple[str, ...] = ("none", "bfloat16"),
    modes: tuple[str, ...] = ("eager", "compiled"),
    only: tuple[str, ...] = (),
    repeats: int = 7,
    batch: int = 128,
) -> pd.DataFrame:
    """Rows: phase, implementation, precision, mode, repeat, seconds of a step.

    All are channels-last, the published code also as it is. Compiled are plain, ours and the published code.
    """
    device = distributed.device_named("auto")
    x = data.train.images[:batch].float().div(255).to(device)
    y = data.train.labels[:batch].to(device)
    cases: dict[tuple[str, str, str, str], Callable[[], None]] = {}
    for name, net in implementations(data, x, only).items():
        phases, kinds = (PHASES[:1], precisions[:1]) if name == "torchao" else (PHASES, precisions)
        for case in product(phases, kinds, modes if name in COMPILED else modes[:1]):
            phase, precision, mode = case
            cases[phase, name, precision, mode] = steps.step(copy.deepcopy(net), x, y, phase, precision, mode)
        if name == "published code":
            case = ("training", "none", "eager")
            cases["training", "published code, contiguous", "none", "eager"] = steps.step(
                net, x, y, *case, channels_last=False
            )
    rows = []
    for repeat in range(-1, repeats):  # the first compiles
        for (phase, name, precision, mode), step in cases.items():
            row = {"phase": phase, "implementation": name, "precision": precision, "mode": mode, "repeat": repeat}
            row["seconds"] = steps.timed(step)
            rows += [row] if repeat >= 0 else []
    table = pd.DataFrame(rows).assign(bits=BITS, batch=batch, **runs.provenance(data, device))
    return table.assign(autocast=[distributed.autocast_used(precision, device) for precision in table.precision])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row an implementation and setting: images a second, and how many times as fast ours is.

    Ours at its faster setting in the same phase.
    """
    case = [rows.phase, rows.implementation, rows.precision.replace("none", "float32"), rows["mode"]]
    speed = over_repeats(rows.batch / rows.seconds, case, "images a second", 0)
    table = speed.sort_index(level="phase", ascending=False, sort_remaining=False).reset_index()
    rate = table.filter(like="images a second").iloc[:, 0]
    fastest = rate[table.implementation == "ours"].groupby(table.phase).max()
    return table.assign(**{"ours: times as fast": (table.phase.map(fastest) / rate).round(2)})


def figure(rows: pd.DataFrame) -> Axes:
    """Images a second of each repeat of training, a line an implementation and setting."""
    rows = rows[rows.phase == "training"]
    named = rows.implementation + ", " + rows.precision.replace("none", "float32") + ", " + rows["mode"]
    speed = rows.assign(case=named, speed=rows.batch / rows.seconds)
    best = speed.groupby(["implementation", "case"]).speed.median().groupby("implementation").max()
    share = f"{100 * best['ours'] / best['plain']:.0f} % of the plain network's speed"
    title = f"At its fastest, our training step of ResNet-20 at 8 bits has {share}"
    return ranges(speed, "case", "speed", title, "images a second")


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(1280, 10))
    write("implementations", rows, summary(rows), figure(rows))
