"""A converted network among what training code does with networks: copies, averages, compilers, several devices.

The table of docs/recipes.md says the same; each of its cells is a test here.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import emqlib as emq

SPECS: dict[str, dict[str, Any]] = {
    "DoReFa": {},
    "tracked DoReFa": {"activation_range": "tracked"},
    "PACT, switchable": {"activation": "pact", "norm": "switchable"},
    "LSQ, own statistics": {"weight": "lsq", "activation": "lsq", "norm": "shared_affine", "output_correction": True},
}
BITS = (2, 4, 8)
of_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def converted(spec: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    convolutions = [
        nn.Sequential(nn.Conv2d(i, o, 3, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in ((3, 8), (8, 8), (8, 16))
    ]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return emq.convert(net, emq.QuantSpec(bits=BITS, **spec))


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, network: nn.Module | None = None, steps: int = 3) -> nn.Module:
    """`network`, by default `model` itself, after steps of SGD by the forward pass of `model`."""
    network = model if network is None else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    network.train()
    for i in range(steps):
        emq.set_bits(network, BITS[i % 3])
        optimizer.zero_grad()
        model(images(i)).square().mean().backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def answers(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for bits in BITS:
        with emq.at_bits(model, bits):
            found.append(model(images()))
    return found


def equal(first: nn.Module, second: nn.Module, **tolerance: float) -> bool:
    pairs = zip(answers(first), answers(second), strict=True)
    return all(torch.allclose(a, b, **({"rtol": 0, "atol": 0} | tolerance)) for a, b in pairs)


@of_specs
def test_a_state_dict_and_a_deep_copy_answer_alike_and_live_on_their_own(spec: dict[str, Any]) -> None:
    model, loaded = trained(converted(spec)), converted(spec).eval()
    assert not equal(loaded, model)
    loaded.load_state_dict(model.state_dict(), strict=True)
    for other in (loaded, copy.deepcopy(model)):
        assert equal(other, model)
    trained(model)
    assert not equal(other, model) and equal(other, loaded)


def averaged(model: nn.Module, library: str) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    """A moving average of weights and buffers, and what updates it."""
    if library == "torch":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        return average, average.update_parameters
    average = ModelEmaV3(model, decay=0.5, min_decay=0.5)
    return average, average.update


@of_specs
@pytest.mark.parametrize("library", ["torch", "timm"])
def test_an_average_from_before_the_first_batch_keeps_its_ranges(library: str, spec: dict[str, Any]) -> None:
    """What it has averaged is its range. It was never called, and its first batch, of other images, must not start one.

    Each bit-width is set anew, as the average of what says which statistics are in force says nothing.
    """
    model = converted(spec)
    average, update = averaged(model, library)
    for _ in range(4):
        trained(model)
        update(model)
    before = {name: value.clone() for name, value in average.named_parameters()}
    ranges = {name: value.clone() for name, value in average.named_buffers() if name.endswith((".low", ".high"))}
    emq.set_bits(average, 8)
    with torch.no_grad():
        first = average.eval()(100 * images(9))
        emq.set_bits(average, 2)
        emq.set_bits(average, 8)
        assert torch.equal(average(100 * images(9)), first)
    assert all(torch.equal(value, before[name]) for name, value in average.named_parameters())
    assert all(torch.equal(average.get_buffer(name), value) for name, value in ranges.items())


@of_specs
def test_a_look_before_training_changes_nothing(spec: dict[str, Any]) -> None:
    """A batch in evaluation mode, for example one that asks for shapes, answers but starts no range for good."""
    plain, looked = converted(spec), converted(spec)
    with torch.no_grad():
        first = looked.eval()(torch.zeros(1, 3, 16, 16))
        assert torch.equal(looked(torch.zeros(1, 3, 16, 16)), first) and first.isfinite().all()
    saved = copy.deepcopy(looked.state_dict())
    assert equal(trained(looked), trained(plain))
    again = converted(spec)
    again.load_state_dict(saved)
    assert equal(trained(again), plain)


@pytest.mark.parametrize("activation", ["pact", "lsq"])
def test_ranges_that_were_learned_in_evaluation_mode_are_kept(activation: str) -> None:
    """As where batch norms are frozen; also those of an average that was called once before training."""
    model, average = (converted({"activation": activation}).eval() for _ in range(2))
    average(images())
    average, update = averaged(average, "torch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(3):
        optimizer.zero_grad()
        model(images(i)).square().mean().backward()
        optimizer.step()
    update(model)
    update(trained(copy.deepcopy(model)))
    for learned in (model, average.module):
        loaded = converted({"activation": activation})
        loaded.load_state_dict(learned.state_dict())
        loaded.train()(100 * images(7))
        for (name, p), q in zip(loaded.named_parameters(), learned.parameters(), strict=True):
            assert torch.equal(p, q), name


@of_specs
def test_bits_set_in_inference_mode_can_be_set_again(spec: dict[str, Any]) -> None:
    model = trained(converted(spec))
    expected = answers(model)
    with torch.inference_mode(), emq.at_bits(model, {"1.0": 2, "*": 4}):
        model(images())
    assert all(torch.equal(a, b) for a, b in zip(answers(model), expected, strict=True))


def test_statistics_are_in_force_again_where_they_were_made_on_no_device() -> None:
    """`to_empty` leaves whatever lies in memory."""
    spec = SPECS["PACT, switchable"]
    model, made = trained(converted(spec)), converted(spec).to("meta").to_empty(device="cpu").eval()
    for buffer in made.buffers():
        buffer.data.fill_(7)
    made.load_state_dict(model.state_dict())
    with torch.no_grad(), emq.at_bits(model, 8):
        assert torch.equal(made(images()), model(images()))


@of_specs
@pytest.mark.parametrize("library", ["torch", "timm"])
def test_averages_of_weights_run_at_every_bit_width(library: str, spec: dict[str, Any]) -> None:
    """An average over equal networks is that network, and one over different networks lies between them."""
    model = trained(converted(spec))
    average, update = averaged(model, library)
    update(model)
    assert equal(average.eval(), model, rtol=1e-6, atol=1e-7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(model)
    update(model)
    for name, p in average.module.named_parameters():
        between = (before[name] + model.get_parameter(name)) / 2
        assert torch.allclose(p, between, atol=1e-6), name
    assert all(torch.isfinite(a).all() for a in answers(average))


@of_specs
@pytest.mark.parametrize("bits", BITS)
def test_an_exported_program_answers_like_the_network(bits: int, spec: dict[str, Any]) -> None:
    model = trained(converted(spec))
    emq.set_bits(model, bits)
    program = torch.export.export(model, (images(),)).module()
    with torch.no_grad():
        assert torch.equal(program(images()), model(images()))


@of_specs
def test_a_compiled_network_trains_like_an_eager_one(spec: dict[str, Any]) -> None:
    """By the tracer of torch.compile, without the code that it would generate: that is tested in test_speed."""
    model, eager = converted(spec), trained(converted(spec))
    torch.compiler.reset()
    trained(torch.compile(model, backend="aot_eager"), model)
    assert equal(model, eager, rtol=1e-4, atol=1e-5)


@of_specs
def test_ddp_trains_the_same_network(spec: dict[str, Any], process_group: None) -> None:
    model = converted(spec)
    trained(nn.parallel.DistributedDataParallel(model), model)
    assert equal(model, trained(converted(spec)))


@of_specs
def test_fsdp2_trains_the_same_network_once_its_ranges_have_started(spec: dict[str, Any], process_group: None) -> None:
    model = trained(converted(spec), steps=1)
    alone = trained(copy.deepcopy(model))
    fully_shard(model[1])
    trained(fully_shard(model))
    whole = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in model.state_dict().items()}
    other = converted(spec)
    other.load_state_dict(whole)
    assert equal(other.eval(), alone)


@pytest.mark.parametrize("spec", [{"activation": "pact"}, {"activation": "lsq"}], ids=["PACT", "LSQ"])
def test_fsdp2_refuses_ranges_that_start_with_the_first_batch(spec: dict[str, Any], process_group: None) -> None:
    """Written to a gathered parameter, the first range would be lost when it is sharded again."""
    model = fully_shard(converted(spec))
    with pytest.raises(ValueError, match="seen one batch in training mode before fully_shard"):
        emq.set_bits(model, 2)
