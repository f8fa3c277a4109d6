"""A converted network in its user's hands: in use, in loops of one's own, inside other modules, and interrupted."""

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from networks import assert_same_state, state
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import emqlib as emq
from emqlib.convert import networks, quantized_layers, step_weights
from emqlib.layers import QuantConv2d, QuantLinear, QuantSpec
from emqlib.norms import MultiBitBatchNorm
from emqlib.train import data as loading
from emqlib.train import loop as training
from emqlib.train.data import Dataset, Split

BITS = (1, 2, 8)


class Net(nn.Module):
    """Two quantized layers, of unsigned and of signed input, between two in full precision: (B, 3, 4, 4) to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 1))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.within(self.norm(self.first(x)).relu()).mean((2, 3)))

    def within(self, x: Tensor) -> Tensor:
        return self.body(x)


def build(net: type[nn.Module] = Net, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    return emq.convert(net(), QuantSpec(**{"bits": BITS} | spec))


def used(x: Tensor, **spec: Any) -> nn.Module:
    """A network in use whose input ranges have started from x (B, 3, 4, 4)."""
    model = build(**spec)
    model(x)
    return model.eval()


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.rand(8, 3, 4, 4, generator=rng)


@pytest.fixture(scope="module")
def data() -> Dataset:
    g, mean, std = torch.Generator().manual_seed(0), (0.5,) * 3, (0.2,) * 3
    pixels = [torch.randint(256, (n, 3, 4, 4), generator=g, dtype=torch.uint8) for n in (24, 9)]
    splits = [Split(images, torch.arange(len(images)) % 3) for images in pixels]
    return Dataset("own", *splits, ("a", "b", "c"), mean, std, flip=False, crop_padding=0, sha256="")


def train(model: nn.Module, data: Dataset, **config: Any) -> None:
    own = {"epochs": 1, "batch_size": 12, "lr": 0.05} | config
    emq.train(model, data, emq.TrainConfig(**own), progress=False)


@torch.no_grad()
def anew(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a copy, which keeps nothing from the passes before."""
    return copy.deepcopy(model)(x)


# Modes


@pytest.mark.parametrize("interrupted", [False, True])
def test_training_leaves_a_network_in_evaluation_mode_that_answers_the_same_again(
    interrupted: bool, x: Tensor, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(activation_range="tracked", output_correction=True)
    if interrupted:
        monkeypatch.setattr(training, "check_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        train(model, data)
    assert not any(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    before, answers = state(model), []
    for _ in range(2):
        with emq.at_bits(model, 2):
            answers.append(model(x))
    assert torch.equal(*answers) and torch.allclose(answers[0][:1], answers[1][:1])
    assert_same_state(state(model), before)


# Weights in use


def write(model: nn.Module) -> None:
    model.body[0].weight.mul_(-1)


def test_what_is_written_through_data_is_seen(x: Tensor) -> None:
    """As loops write that average weights: PyTorch counts no such writes."""
    model = build(output_correction=True, weight="lsq").eval()
    with torch.no_grad():
        before = model(x)
        model.body[0].weight.data.mul_(-1)
        assert torch.equal(model(x), anew(model, x)) and not torch.equal(model(x), before)


def test_weights_given_for_one_call_are_used_for_it_alone(x: Tensor) -> None:
    model, other = used(x), used(x)
    with torch.no_grad():
        own = model(x)
        write(other)
        given = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
        assert torch.equal(given, other(x)) and not torch.equal(given, own) and torch.equal(model(x), own)


# Loops of one's own


@pytest.mark.parametrize(
    "spec",
    [
        {"norm": "switchable"},
        {"correction_gradient": False, "activation_range": "tracked", "output_correction": True},
        {"weight": "minmax", "activation": "pact", "correction": "mean"},
        {"weight": "lsq", "activation": "lsq", "norm": "switchable"},
        {"weight": "minmax", "activation": "none", "norm": "shared_affine", "correction": "none"},
    ],
)
def test_children_s_losses_may_be_summed(spec: dict[str, Any], x: Tensor) -> None:
    found, bits = [], (1, 2, 8, 32)
    for summed in (True, False):
        model, losses = build(bits=bits, **spec).double(), []
        for b in bits:
            emq.set_bits(model, b)
            losses.append(model(x.double()).square().sum())
            if not summed:
                losses[-1].backward()
        if summed:
            sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


class Checkpointed(Net):
    """The body is computed again in the backward pass."""

    reentrant = False

    def within(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Twice(Net):
    def within(self, x: Tensor) -> Tensor:
        return super().within(x) + super().within(x.flip(0))


PAIRS = [(Checkpointed, Net), (Reentrant, Net)]
PAIRS += [(type("CheckpointedTwice", (Twice, kind), {}), Twice) for kind in (Checkpointed, Reentrant)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of conversion, which tries the network
@pytest.mark.parametrize(("net", "plain"), PAIRS)
@pytest.mark.parametrize("spec", [{"activation_range": "tracked"}, {"weight": "lsq", "activation": "pact"}])
def test_activation_checkpointing_changes_nothing(
    net: type[nn.Module], plain: type[nn.Module], spec: dict[str, Any], data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and, since the second pass measures nothing, buffers; a range moves between two uses of its layer."""
    if plain is Twice and "activation_range" in spec:
        spec = {"activation": "none"}
    monkeypatch.setattr(loading, "normalize", lambda images, _: images.double() / 255)
    states = []
    for kind in (net, plain):
        model = build(kind, output_correction=plain is Net, **spec).double()
        for config in ({"scheme": "joint", "distillation": True}, {"accumulate": 2}):
            train(model, data, **config)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


# Interrupted


@contextmanager
def interrupted(module: str, line: int) -> Iterator[None]:
    """KeyboardInterrupt before the line of that number, counted as they are run, of the functions in a module."""
    left = [line]

    def local(frame: FrameType, event: str, _: Any) -> Callable:
        left[0] -= event == "line"
        if left[0] == 0 and event == "line":
            raise KeyboardInterrupt
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_globals.get("__name__") == module else None)
    try:
        yield
    finally:
        sys.settrace(before)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_nothing_is_left_wherever_a_step_is_interrupted(x: Tensor) -> None:
    model = build(activation_range="unit").eval().requires_grad_()
    expected, finished, line = gradients(model, x), False, 0
    while not finished:
        line += 1
        try:
            with interrupted("emqlib.convert", line), step_weights(model):
                model(x).square().sum().backward()
            finished = True
        except KeyboardInterrupt:
            model.zero_grad()
            copy.deepcopy(model)
            emq.pack(model, 2)
            assert_same_state(gradients(model, x), expected)
            assert_same_state(gradients(model, x), expected)  # by a graph of its own
    assert line > 10


def test_a_weight_that_a_hook_changes_is_quantized_after_it(x: Tensor) -> None:
    """As pruning and weight clipping do, before each forward pass."""

    def negate(layer: nn.Module, _: Any) -> None:
        layer.weight.data.neg_()

    model = build()
    model.body[0].register_forward_pre_hook(negate)
    twin = copy.deepcopy(model)
    with step_weights(model):
        assert torch.equal(model(x), twin(x))


# Inside other modules


class Holder(nn.Module):
    """As a LightningModule holds a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = [nn.DataParallel, distributed, AveragedModel, Holder, compiled, lambda m: Holder(compiled(m))]


def bits_of(model: nn.Module) -> list[int]:
    return [m.bits for m in model.modules() if isinstance(m, (QuantConv2d, QuantLinear, MultiBitBatchNorm))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["parallel", "distributed", "averaged", "holder", "compiled", "both"])
def test_networks_are_found_inside_whatever_holds_them(
    wrap: Callable[[nn.Module], nn.Module], data: Dataset, process_group: None
) -> None:
    plain = build(norm="shared_affine", activation="lsq")
    wrapped = wrap(copy.deepcopy(plain))
    for model in (plain, wrapped):
        emq.adapt_norm(model, data, bits=(3,), samples=24, batch_size=12)
        emq.set_bits(model, {"body.0": 2, "*": 8})
    (network,) = networks(wrapped)
    assert bits_of(network) == bits_of(plain) == bits_of(wrapped)
    with emq.at_bits(wrapped, 1):
        assert set(emq.summary(wrapped).bits) == {1, 32}
    assert emq.summary(wrapped).equals(emq.summary(plain)) and 2 in set(emq.summary(plain).bits)
    assert_same_state(network.state_dict(), plain.state_dict())
    for adapt in (False, True):
        ours, theirs = (emq.evaluate(model, data, bits=(1, 3, 8), adapt_norm=adapt) for model in (wrapped, plain))
        assert ours[["bits", "top1", "trained", "n"]].equals(theirs[["bits", "top1", "trained", "n"]])
        assert ours.loss.tolist() == pytest.approx(theirs.loss.tolist(), rel=1e-5)
    assert_same_state(network.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("spec", "bits"), [({"activation": "lsq"}, 8), ({"norm": "switchable"}, 8), ({"norm": "shared_affine"}, 3)]
)
@torch.no_grad()
def test_an_average_of_weights_runs_at_the_bits_it_is_set_to(spec: dict[str, Any], bits: int, x: Tensor) -> None:
    model = used(x, **spec)
    for p in model.parameters():
        p.mul_(1 + torch.rand_like(p))  # or the norm has the same affine at each bit-width
    emq.set_bits(model, bits)
    average = AveragedModel(model)
    emq.set_bits(model, 2)
    average.update_parameters(model)  # it copies buffers too
    answer = average(x)
    emq.set_bits(average, bits)
    assert torch.equal(answer, average(x))
    with torch.inference_mode():
        twin = copy.deepcopy(average)  # whose buffers cannot be written to outside
    assert torch.equal(answer, twin(x))


def test_ranges_do_not_start_in_a_replica_of_data_parallel(x: Tensor) -> None:
    quantizer = build(activation="lsq").body[3].input_quantizer
    with pytest.raises(RuntimeError, match=r"^run a batch .* before nn\.DataParallel"):
        quantizer._replicate_for_data_parallel()(x, 3.0)
    quantizer(x, 3.0)
    assert quantizer._replicate_for_data_parallel()(x, 3.0).isfinite().all()


class Two(nn.Module):
    """Two networks, converted for bit-widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = build(), build(bits=(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) + self.teacher(x)


def test_all_networks_of_a_module_are_set(data: Dataset) -> None:
    both = Two()
    both.teacher.to(torch.float32)
    emq.set_bits(both, {"body.0": 2, "*": 4})
    assert both.student.body[0].bits == both.teacher.body[0].bits == 2 and both.teacher.body[3].bits == 4
    with emq.at_bits(both, 8):
        assert both.student.body[0].bits == both.teacher.body[3].bits == 8
    assert both.student.body[0].bits == 2 and both.teacher.body[3].bits == 4
    with pytest.raises(ValueError, match="layer3"):
        emq.set_bits(both, {"layer3.*": 2, "*": 4})
    assert emq.evaluate(both, data, bits=(1, 2, 4)).trained.tolist() == [False, True, False]
    assert emq.summary(both).name.tolist() == 2 * emq.summary(both.student).name.tolist()
    switchable = Two()
    switchable.teacher = build(bits=(2, 4), norm="switchable")
    with pytest.raises(ValueError, match="built for"):
        emq.set_bits(switchable, 8)
    assert switchable.student.body[0].bits == 8 and switchable.teacher.body[0].bits == 4


@pytest.mark.parametrize("layer", ["body", "body.3"])
def test_a_part_of_a_network_is_set_alone(layer: str, x: Tensor) -> None:
    model = build(full_precision=())
    twin = copy.deepcopy(model)
    emq.set_bits(model.get_submodule(layer), 2)
    emq.set_bits(twin, {f"{layer}*": 2, "*": 8})
    for network in (model, twin):
        assert bits_of(network) == bits_of(twin)
        assert {name: float(m.levels) for name, m in quantized_layers(network).items()} == {
            name: 2.0**m.bits - 1 for name, m in quantized_layers(network).items()
        }
    assert torch.equal(model(x), twin(x))
    with emq.at_bits(model.body, {"0": 1, "*": 4}):
        assert [model.body[i].bits for i in (0, 3)] == [1, 4] and model.last.bits == 8
    assert emq.summary(model.body).name.tolist() == ["0", "3"]
    assert model.body[3].bits == 2 and float(model.last.levels) == 255


# Outputs


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "attribute": lambda y: SimpleNamespace(logits=y, loss=None),  # which cannot be traced for signs
    "entry": lambda y: {"logits": y},
    "tuple": lambda y: (y, "hidden states"),
}


class Other(Net):
    shape: Callable[[Tensor], Any]

    def forward(self, x: Tensor) -> Any:
        return type(self).shape(super().forward(x))


@pytest.mark.parametrize("shape", OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found_in_what_other_libraries_give(shape: Callable[[Tensor], Any], data: Dataset) -> None:
    net = type("Net", (Other,), {"shape": staticmethod(shape)})
    tables = []
    for kind in (net, Net):
        model = build(kind, activation="none")
        train(model, data)
        emq.adapt_norm(model, data, bits=(3,), samples=24, batch_size=12)
        tables.append(emq.evaluate(model, data, bits=(2, 3)))
    assert tables[0].equals(tables[1])


def test_other_outputs_need_a_function_and_are_refused_without(data: Dataset) -> None:
    net = type("Net", (Other,), {"shape": staticmethod(lambda y: {"scores": y, "n": 3})})
    model = build(net)
    found = emq.evaluate(model, data, bits=(2,), logits=lambda output: output["scores"])
    assert found.equals(emq.evaluate(build(), data, bits=(2,)))
    with pytest.raises(ValueError, match=r"^logits=.*'scores'.*expected .*\.logits.*function"):
        emq.evaluate(model, data, bits=(2,))
    with pytest.raises(ValueError, match=r"^logits=3: expected a function"):
        emq.evaluate(model, data, bits=(2,), logits=3)
    with pytest.raises(ValueError, match=r"^logits=.*expected"):
        emq.evaluate(model, data, bits=(2,), logits=lambda output: output["n"])
    emq.adapt_norm(model, data, bits=(3,), samples=24, batch_size=12)


# Threads


def in_thread(network: nn.Module) -> set[int]:
    """The bit-widths that another thread sees while it has set the network to 1 bit."""

    def work() -> set[int]:
        with emq.at_bits(network, 1):
            return set(bits_of(network))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_another_thread_is_refused_while_one_is_inside() -> None:
    model = build().eval()
    with emq.at_bits(model, 2), emq.at_bits(model, 8), emq.at_bits(model.body, 2):
        for network in (model, model.body, Holder(model)):
            with pytest.raises(RuntimeError, match=r"(?s)thread.*deepcopy|deepcopy.*thread"):
                in_thread(network)
        assert in_thread(copy.deepcopy(model)) == {1} and model.body[0].bits == 2
    assert in_thread(model) == {1}
    with pytest.raises(KeyError), emq.at_bits(model, 2):
        raise KeyError
    with pytest.raises(ValueError, match="bits"), emq.at_bits(model, 9):
        pytest.fail("the block must not run")
    assert in_thread(model) == {1}
