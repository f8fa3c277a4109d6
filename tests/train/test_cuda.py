"""On a GPU, where there is one: the CPU's numbers, training and what follows it, resuming, and too little memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SPECS
from torch import nn

import emqlib as emq
from emqlib import TrainConfig, models
from emqlib.paper import experiments, measure, profiles
from emqlib.train import distributed
from emqlib.train.checkpoint import OutOfTime
from emqlib.train.config import SCORES
from emqlib.train.coresets import recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def digits() -> emq.Dataset:
    return emq.load_dataset("digits", image_size=32).subset(640, 320)


def network(name: str = "resnet8", **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"width": 8} if name == "resnet8" else {"width": 32, "depth": 2, "heads": 2, "patch_size": 8}
    return emq.convert(models.build(name, 10, **arguments), emq.QuantSpec(bits=BITS, **spec))


def trained(data: emq.Dataset, net: nn.Module | None = None, **config: Any) -> nn.Module:
    net = network() if net is None else net
    config = {"epochs": 6, "batch_size": 32, "lr": 0.05} | config
    history = emq.train(net, data, TrainConfig(**config), progress=False)
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    return net


def gradients(net: nn.Module, images: torch.Tensor, bits: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    emq.set_bits(net, bits)
    logits = net(images)
    logits.square().mean().backward()
    return logits.detach().cpu(), {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_logits_and_gradients_are_the_cpus(name: str, spec: dict[str, Any]) -> None:
    """In float64, where rounding tips no value over the edge between two levels."""
    here = network(name, **spec).double()
    here(torch.rand(8, 3, 32, 32, dtype=torch.float64))  # ranges start from a first batch
    there = copy.deepcopy(here).cuda()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    for bits in BITS:
        (expected, slopes), (found, theirs) = gradients(here, images, bits), gradients(there, images.cuda(), bits)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
        assert slopes.keys() == theirs.keys() and len(slopes) > 10
        for key, slope in slopes.items():
            torch.testing.assert_close(theirs[key], slope, rtol=1e-6, atol=1e-8, msg=key)


def assert_same_gradients(net: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)


CONFIGS = {
    "eager": {},
    "bfloat16": {"autocast": "bfloat16"},
    "float16": {"autocast": "float16"},
    "joint": {"scheme": "joint", "distillation": True},
    "accumulated": {"accumulate": 2},
    "clipped": {"clip_grad_norm": 1.0},
    "graphs": {"compile": "graphs"},
    "graphs, joint": {"compile": "graphs", "scheme": "joint", "distillation": True, "autocast": "bfloat16"},
    "graphs, coresets": {
        "compile": "graphs",
        "coreset": emq.CoresetConfig(score="tdds", pruning_rate=0.5),
        "epochs": 8,
    },
}
CONFIGS |= {score: {"coreset": emq.CoresetConfig(score=score, pruning_rate=0.5), "epochs": 8} for score in SCORES}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_way_to_train_learns(config: dict[str, Any], digits: emq.Dataset) -> None:
    net = trained(digits, **config)
    assert {p.device.type for p in net.parameters()} == {"cuda"}
    top1 = emq.evaluate(net, digits, bits=BITS, adapt_norm=True).top1
    assert (top1 > 25).all(), top1.tolist()  # chance is 10


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_compiled_graph_serves_every_bit_width(spec: dict[str, Any]) -> None:
    """In float64, as above: the gradients are the network's own."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    net = network(**spec).double().cuda().to(memory_format=torch.channels_last)
    images = torch.rand(16, 3, 32, 32, dtype=torch.float64).cuda().contiguous(memory_format=torch.channels_last)
    net(images)
    compiled, plain = torch.compile(net), copy.deepcopy(net)
    for bits in BITS:
        emq.set_bits(net, bits)
        emq.set_bits(plain, bits)
        net.zero_grad()
        plain.zero_grad()
        for forward in (compiled, plain):
            forward(images).square().mean().backward()
        assert_same_gradients(net, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_captured_graph_is_the_network_at_every_bit_width(spec: dict[str, Any]) -> None:
    """Outputs, gradients and what the network keeps of a batch, over and over, in any order of bit-widths."""
    net = network(**spec).double().cuda().to(memory_format=torch.channels_last)
    images = torch.rand(5, 16, 3, 32, 32, dtype=torch.float64).cuda()
    emq.set_bits(net, 8)
    net(images[0])
    plain = copy.deepcopy(net)
    graphed = distributed.Graphed(net)
    for k, bits in enumerate((2, 4, 32, 8, 2, 4, 32, 4, 2, 32, 8)):
        x, found = images[k % 5].contiguous(memory_format=torch.channels_last), []
        for model, forward in ((net, graphed), (plain, plain)):
            emq.set_bits(model, bits)
            model.zero_grad()
            found.append(forward(x))
            found[-1].square().mean().backward()
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
        assert_same_gradients(net, plain)
        for (name, b), c in zip(net.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-8, atol=1e-9, msg=f"{name}, {bits} bits")
    assert [graph is not None for graph in graphed.known.values()] == [True, True]  # with rounding, and at 32 bits


@pytest.mark.parametrize("autocast", ["none", "float16"])
def test_what_is_stopped_goes_on_to_the_same_weights(autocast: str, digits: emq.Dataset, tmp_path: Path) -> None:
    """With deterministic convolutions; the others may add in any order."""
    torch.backends.cudnn.deterministic = True
    try:
        config = TrainConfig(epochs=3, batch_size=32, lr=0.05, autocast=autocast)
        whole, stopped = network(), network()
        emq.train(whole, digits, config, progress=False)
        for _ in range(2):
            with pytest.raises(OutOfTime):
                emq.train(network(), digits, config, tmp_path / "checkpoint", progress=False, budget=1e-9)
        emq.train(stopped, digits, config, tmp_path / "checkpoint", progress=False, budget=1e-9)
    finally:
        torch.backends.cudnn.deterministic = False
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(stopped.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("score", SCORES[1:])
def test_recorded_scores_are_the_cpus(score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = emq.CoresetConfig(score=score)
    here, there = (recorder(config, 200, 10, 16, torch.device(device)) for device in ("cpu", "cuda"))
    labels = torch.randint(10, (200,), generator=generator)
    for epoch in range(4):
        for indices in torch.randperm(200, generator=generator).split(50):
            p = torch.randn(50, 10, generator=generator).softmax(1)
            seen = [indices, p, labels[indices], torch.randn(50, 16, generator=generator)]
            here.observe(epoch, *seen)
            there.observe(epoch, *(x.cuda() for x in seen))
    torch.testing.assert_close(there.scores().cpu(), here.scores(), rtol=1e-3, atol=1e-3)


def test_a_network_of_the_gpu_is_saved_packed_exported_and_analysed(
    digits: emq.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding tips values over an edge
    net = trained(digits, network(norm="shared_affine"))
    emq.adapt_norm(net, digits, bits=(3,))
    expected = emq.evaluate(net, digits, bits=(2, 3, 4, 8)).top1.tolist()
    emq.save(net, tmp_path / "net.safetensors")
    again = emq.load(tmp_path / "net.safetensors", models.build("resnet8", 10, width=8))
    assert emq.evaluate(again, digits, bits=(2, 3, 4, 8)).top1.tolist() == pytest.approx(expected, abs=1)
    packed = emq.pack(net, bits=4)
    assert emq.evaluate(net, digits, bits=[4]).top1.item() > 50 and packed is not net
    emq.export_onnx(net, tmp_path / "net.onnx", bits=4, example_inputs=torch.rand(2, 3, 32, 32))
    assert (tmp_path / "net.onnx").stat().st_size > 1000
    for table in (
        measure.weight_shift(net),
        measure.preactivations(net, digits, BITS)[0],
        measure.gradient_angles(net, digits, BITS, 100),
        measure.linear_probes(net, digits, BITS),
    ):
        assert len(table) > 0 and table.notna().all(axis=None)


def test_too_little_memory_says_what_to_try(digits: emq.Dataset) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 50e6) / total)
    try:
        with pytest.raises(MemoryError, match=r"^batch_size=640: .*try batch_size=320"):
            wide = emq.convert(models.resnet8(10, width=64), emq.QuantSpec(bits=BITS))
            trained(digits, wide, batch_size=640)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_loss_that_is_not_finite_stops_the_run_some_steps_late(digits: emq.Dataset) -> None:
    with pytest.raises(FloatingPointError, match="at epoch"):
        emq.train(network(), digits, TrainConfig(epochs=4, batch_size=32, lr=1e20), progress=False)


@pytest.mark.parametrize("table", [f.__name__ for f in experiments.RUNS])
def test_every_experiment_runs(table: str, tmp_path: Path) -> None:
    p = profiles.parameters(profile="smoke", results_dir=tmp_path)
    rows = experiments.run_all(getattr(experiments, table)(p), tmp_path, progress=False)
    assert rows.top1.notna().all() and set(rows.device) == {torch.cuda.get_device_name()}


@pytest.mark.parametrize("study", ["token_shifts", "distributions", "alignment"])
def test_every_study_runs(study: str, tmp_path: Path) -> None:
    tables: Any = getattr(measure, study)(profiles.parameters(profile="smoke", results_dir=tmp_path))
    assert all(len(table) > 0 for table in (tables if isinstance(tables, tuple) else (tables,)))
