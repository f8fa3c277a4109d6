"""What keeps a step fast, without a clock: one graph for all bit-widths, and nothing that waits for a device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import emqlib as emq
from emqlib import models
from emqlib.train import loop as training
from emqlib.train.config import SCORES

NETWORKS: dict[str, dict[str, int]] = {
    "resnet8": {"width": 4},
    "preact_resnet20": {"width_factor": 1},
    "vit_tiny": {"patch_size": 8, "width": 16, "depth": 2, "heads": 2},
}
SPECS: dict[str, dict[str, Any]] = {
    "resnet8": {"norm": "shared_affine", "output_correction": True, "activation_range": "tracked"},
    "vit_tiny": {"norm": "switchable", "weight": "lsq", "activation": "lsq"},
}
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal"}


@pytest.fixture
def compiler() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def build(name: str, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    net = models.build(name, 10, **NETWORKS[name])
    return emq.convert(net, emq.QuantSpec(**{"bits": range(1, 9), "activation_range": "unit"} | spec))


HALF = {"norm": "switchable", "activation": "none", "weight": "minmax"}


@pytest.mark.parametrize(
    ("name", "spec", "half"), [*((name, spec, False) for name, spec in SPECS.items()), ("resnet8", HALF, True)]
)
def test_one_graph_without_a_break_serves_eight_bit_widths(
    name: str, spec: dict[str, Any], half: bool, compiler: CompileCounterWithBackend
) -> None:
    """half: in bfloat16, channels-last."""
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last if half else torch.contiguous_format)
    model = build(name, **spec)
    model(x)  # learned and tracked ranges start in Python
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for bits in (2, 4, 8) if half else range(1, 9):
        for network, forward in ((model, compiled), (twin, twin)):
            emq.set_bits(network, bits)
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = forward(x).float().square().mean()
            loss.backward()
    assert compiler.frame_count == 1 and len(compiler.graphs) == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:  # rounding differs where a value lies within an ulp of a tie
            assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm() + 1e-6


def test_mixed_precision_adds_one_graph_for_all_mixtures(compiler: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    spec = emq.QuantSpec(bits=range(1, 9), activation_range="unit")
    model, x = emq.convert(Branches(False), spec), torch.randn(4, 3, 8, 8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for bits in (2, {"c1": 2, "*": 4}, 3, {"c2": 8, "*": 1}, {"*": 6}, {"c1": 4, "*": 2}):
        for network in (model, twin):
            emq.set_bits(network, bits)
        torch.testing.assert_close(compiled(x), twin(x))
    assert compiler.frame_count == 2


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_of_cuda_tensors_touches_no_other_device(
    name: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake ones; a value that had to be read back would raise. Backward: `test_a_step_mixes_no_devices`."""
    monkeypatch.setattr(copy, "deepcopy", lambda net: net)  # fake tensors cannot be copied
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = build(name)
        emq.set_bits(model, 4)
        graph = make_fx(model.train())(torch.randn(4, 3, 32, 32)).graph
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert len(values) > 100 and {value.device.type for value in values} == {"cuda"}
    assert not any(str(node.target).rsplit(".", 1)[0] in WAITING for node in graph.nodes)


class _Waits(TorchDispatchMode):
    """Counts, inside `step`, what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        by_mask = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.calls += 1
        self.found += [name] if name in WAITING or by_mask else []
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Waits]:
    waits, step = _Waits(), training._step

    def inside(*args: Any) -> None:
        with waits:
            step(*args)

    monkeypatch.setattr(training, "_step", inside)
    # as on CUDA, where losses are looked at some steps later
    see = lambda self, loss, *more: self.pending.append((loss.detach(), *more))  # noqa: E731
    monkeypatch.setattr(training.LossWatch, "see", see)
    yield waits


CONFIGS: dict[str, dict[str, Any]] = {
    "joint": {"scheme": "joint", "distillation": True},
    "bitwise": {},
    "clipped, in parts": {"clip_grad_norm": 1.0, "accumulate": 2},
    "bfloat16": {"autocast": "bfloat16"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_step_waits_for_the_device(
    config: dict[str, Any], digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("resnet8", bits=(2, 4))
    with watched(monkeypatch) as waits:
        emq.train(model, digits, emq.TrainConfig(epochs=1, batch_size=20, **config), progress=False)
    assert waits.calls > 1000 and waits.found == []


@pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
def test_no_step_that_records_scores_or_weighs_losses_waits(
    score: str, digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"how": "sample", "unbiased": True, "candidates": 1.0}
    coreset = emq.CoresetConfig(score=score, pruning_rate=0.5, scoring_epochs=3, **drawn)
    with watched(monkeypatch) as waits:
        config = emq.TrainConfig(epochs=5, batch_size=20, coreset=coreset)
        emq.train(build("resnet8", bits=(2, 4)), digits, config, progress=False)
    assert waits.calls > 1000 and waits.found == []


def test_the_watch_sees_what_waits(digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with _Waits() as waits:
        x = torch.arange(4.0)
        x.sum().item()
        x[x > 1].sum()
    assert waits.found == ["aten._local_scalar_dense", "aten.index"]


def relus(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.ReLU)}


def test_a_relu_that_feeds_quantizers_alone_is_left_to_them() -> None:
    """What stays in ResNet-8: the stem's, which feeds an identity shortcut too, and the last, which feeds the mean."""
    assert relus(build("resnet8")) == {"relu1", "layer3.0.relu2"}
    assert relus(build("preact_resnet20")) == set()
    assert relus(build("resnet8", activation="none")) == relus(models.resnet8())


class Branches(nn.Module):
    """Convolutions c0 to c3 and two ReLUs in between; `besides`: who else reads the second one's input."""

    def __init__(self, inplace: bool, besides: str = "") -> None:
        super().__init__()
        self.c0, self.c1, self.c2, self.c3 = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.first, self.second = nn.ReLU(inplace), nn.ReLU(inplace)
        self.besides = besides

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(self.first(self.c0(x)))
        z = self.c2(self.second(y))
        return self.c3(z + y if self.besides == "input" else z)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_in_place_is_left_to_a_quantizer_if_nothing_else_reads_what_it_overwrites(inplace: bool) -> None:
    spec = emq.QuantSpec(bits=(2, 8), correction="none", activation_range="unit")
    for besides, staying in (("", set()), ("input", {"second"} if inplace else set())):
        torch.manual_seed(0)
        net = Branches(inplace, besides)
        model, x = emq.convert(net, spec), torch.randn(2, 3, 4, 4)
        assert relus(model) == staying
        reference = copy.deepcopy(model)
        for name in {"first", "second"} - staying:
            reference.set_submodule(name, nn.ReLU(inplace))
        for bits in (2, 8, 32):
            emq.set_bits(model, bits)
            emq.set_bits(reference, bits)
            torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


def test_a_relu_stays_before_a_layer_in_full_precision_and_for_another_reader() -> None:
    relu = nn.ReLU()
    layers = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    assert relus(emq.convert(net, emq.QuantSpec(bits=(2,)))) == {"3"}
    assert relus(emq.convert(net, emq.QuantSpec(bits=(2,), full_precision=()))) == set()
    net = nn.Sequential(layers[0], relu, layers[1], relu)
    assert relus(emq.convert(net, emq.QuantSpec(bits=(2,), full_precision=()))) == {"1"}  # 3 is the same, and the end


@pytest.mark.parametrize("activation", ["dorefa", "pact", "lsq"])
def test_ranges_start_as_if_the_relu_were_there(activation: str) -> None:
    spec = emq.QuantSpec(bits=(2, 8), weight="minmax", activation=activation, activation_range="tracked")
    torch.manual_seed(0)
    model, x = emq.convert(Branches(False), spec), torch.randn(8, 3, 4, 4)
    with_relus = copy.deepcopy(model)
    for name in ("first", "second"):
        with_relus.set_submodule(name, nn.ReLU())
    for _ in range(3):
        torch.testing.assert_close(model(x), with_relus(x), rtol=0, atol=0)
    found, expected = model.state_dict(), with_relus.state_dict()
    for name in found:  # `low` is not used where inputs are never negative
        assert name.endswith(".low") or torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))


def test_switching_under_a_shared_norm_touches_no_norm() -> None:
    """A GPU is told one number for all layers, and nothing else."""
    model = build("resnet8", bits=(2, 4, 8))
    with _Waits() as switched:
        emq.set_bits(model, 2)
    assert switched.calls == 1
