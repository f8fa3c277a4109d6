"""Conversion of many kinds of network, and switching of bit-widths."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, assert_same_state, bits_of, build, images_for, quantized, spec, state, uneven
from torch import Tensor, nn

import emqlib as emq
from emqlib.convert import step_weights
from emqlib.layers import QuantConv2d, QuantLinear
from emqlib.norms import MultiBitBatchNorm

ACTIVATIONS = ("dorefa", "lsq", "pact", "none")


# What conversion replaces


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_between_the_ends_is_replaced(name: str, rng: torch.Generator) -> None:
    net = build(name)
    model = emq.convert(net, spec())
    plain = {n: m for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    assert set(plain) == set(model.emq.decided.kept) and set(model.emq.decided.kept.values()) == {"first", "last"}
    assert len(quantized(model)) + 2 == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert set(bits_of(model).values()) == {8}
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    images = images_for(name, rng)
    model(images).square().sum().backward()
    for bits in (1, 3, 32):
        emq.set_bits(model, bits)
        assert model(images).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_network_stays_as_it_is(name: str, rng: torch.Generator) -> None:
    net = build(name).train()
    before, structure, attributes = state(net), repr(net), set(vars(net))
    modules = dict(net.named_modules())
    model = emq.convert(net, spec())
    images = images_for(name, rng)
    model(images).sum().backward()
    assert_same_state(state(net), before)
    assert repr(net) == structure and set(vars(net)) == attributes and dict(net.named_modules()) == modules
    assert all(p.grad is None for p in net.parameters())
    assert model.training and net.training and not emq.convert(net.eval(), spec()).training
    if name == "remembers":
        assert net.features is None and net.calls == 0 and model.calls == 1


def test_kept_layers() -> None:
    net = build("resnet8")
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def kept(*entries: str) -> dict[str, str]:
        model = emq.convert(net, spec(full_precision=entries))
        assert set(quantized(model)) == set(names) - set(model.emq.decided.kept)
        return model.emq.decided.kept

    assert kept() == {}
    assert kept("first") == {"conv1": "first"} and kept("last") == {"fc": "last"}
    assert kept("*.shortcut.*") == dict.fromkeys(["layer2.0.shortcut.0", "layer3.0.shortcut.0"], "*.shortcut.*")
    assert kept("first", "conv1", "fc") == {"conv1": "first", "fc": "fc"}


def test_first_and_last_are_those_called_first_and_last() -> None:
    class Reversed(NETWORKS["functional"]):
        def __init__(self) -> None:
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    extended = build("functional")
    extended.auxiliary = nn.Linear(8, 10)  # never called
    for net in (Reversed(), extended):
        assert emq.convert(net, spec()).emq.decided.kept == {"stem": "first", "head": "last"}
    as_registered = {"head": "first", "conv": "last"}
    assert emq.convert(build("untraceable"), spec()).emq.decided.kept == as_registered


def test_a_layer_used_twice_becomes_one_twin(rng: torch.Generator) -> None:
    model = emq.convert(build("twice"), spec())
    assert isinstance(model.conv, QuantConv2d) and model.conv is model.again and model.norm is model.norm_again
    assert model.conv.input_quantizer.signed  # at one of its two places
    conv = nn.Conv2d(3, 3, 3, padding=1)
    chain = emq.convert(nn.Sequential(conv, conv, nn.ReLU(), conv), spec(full_precision=()))
    assert isinstance(chain[0], QuantConv2d) and chain[0] is chain[1] is chain[3]


class Listed(nn.Module):
    """Calls its layers from places beside its children."""

    def __init__(self, lose: bool = False) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)]
        self.children_ = nn.ModuleList(layers)
        self._some, self.pair, self.named = layers[:2], (layers[2], [layers[3]]), OrderedDict(last=layers[4])
        self.named["itself"] = self.named
        self.lost = {layers[2]} if lose else {}

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self._some, self.pair[0], self.pair[1][0], *self.lost):
            x = layer(x).relu()
        return self.named["last"](x)


def test_layers_are_replaced_wherever_the_network_holds_them(rng: torch.Generator) -> None:
    net = Listed()
    model = emq.convert(net, spec()).eval()  # in training, ranges of inputs follow each batch
    called = {id(m) for m in (*model._some, model.pair[0], *model.pair[1], model.named["last"])}
    assert called == {id(m) for m in model.children_} and isinstance(model.pair[0], QuantConv2d)
    assert all(type(m) is nn.Conv2d for m in (*net._some, net.pair[0], *net.pair[1]))
    x = torch.rand(2, 3, 8, 8, generator=rng)
    for bits in (2, 8):
        emq.set_bits(model, bits)
        expected = x
        for layer in model.children_[:4]:
            expected = layer(expected).relu()
        assert torch.equal(model(x), model.children_[4](expected)) and not torch.equal(model(x), net(x))


def test_a_layer_that_is_called_though_it_was_replaced_says_so(rng: torch.Generator) -> None:
    model = emq.convert(Listed(lose=True), spec())
    with pytest.raises(RuntimeError, match="calls a layer that was converted"):
        model(torch.rand(2, 3, 8, 8, generator=rng))


def test_hooks_stay_with_their_layers(rng: torch.Generator) -> None:
    net = build("resnet8")
    seen: list[str] = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.append(name))
    net.layer1[0].conv1.register_forward_pre_hook(lambda m, inputs: (0 * inputs[0],))
    net.eval()(images_for("resnet8", rng))
    called, model = list(seen), emq.convert(net, spec())
    seen.clear()
    conv = model.layer1[0].conv1
    conv.register_forward_hook(lambda m, inputs, output: seen.append(f"zeros: {not inputs[0].any()}"))
    model(images_for("resnet8", rng))
    assert seen.count("zeros: True") == 1
    assert [name for name in seen if not name.startswith("zeros")] == called


class Optional(nn.Module):
    """Without its optional arguments, the body's input is negative and the stem is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.stem, self.last = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor, features: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = (self.stem(x) if features is None else features).relu()
        h = h - 0.5 if shift is None else h * shift.abs()
        return self.last(self.body(h).mean((2, 3)))


def test_signs_and_ends_are_those_of_a_call_without_optional_arguments(rng: torch.Generator) -> None:
    net, x = Optional(), torch.randn(2, 3, 8, 8, generator=rng)
    model = emq.convert(net, spec(weight="minmax", correction="none"))
    emq.set_bits(model, 32)
    torch.testing.assert_close(model(x), net(x))
    assert emq.summary(model).set_index("name").note["stem"] == "full precision: first"


class Flags(Optional):
    """Moves the body's input where it is asked to."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift, self.aux = shift, nn.Linear(4, 5)

    def forward(self, x: Tensor, auxiliary: bool = False, shifted: bool = False) -> Any:
        h = self.stem(x).relu()
        h = h + self.shift if shifted else h
        h = self.body(h).mean((2, 3))
        return (self.last(h), self.aux(h)) if auxiliary else self.last(h)


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_signs_are_those_of_every_choice_of_flags(shift: float) -> None:
    """The last layer is that of a call without them, and no auxiliary head."""
    assert emq.convert(Flags(shift), spec()).emq.decided.signed == {"body": shift < 0, "aux": True}


def test_a_layer_with_a_forward_of_its_own_keeps_it(rng: torch.Generator) -> None:
    net, x = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))), torch.randn(2, 3, 6, 6, generator=rng)

    def circular(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    net[1]._conv_forward = MethodType(circular, net[1])
    net[2].forward = MethodType(lambda layer, x: circular(layer, x, layer.weight, layer.bias), net[2])
    with pytest.raises(ValueError, match="a Conv2d or Linear besides those kept"):
        emq.convert(net, spec())
    model = emq.convert(net, spec(full_precision=(), weight="minmax", correction="none"))
    emq.set_bits(model, 32)
    torch.testing.assert_close(model(x), net(x))
    notes = emq.summary(model).set_index("name").note
    assert notes[["1", "2"]].tolist() == ["full precision: its forward is not that of its class"] * 2
    norm = nn.BatchNorm2d(3)
    norm.forward = MethodType(lambda norm, x: x, norm)
    with pytest.raises(ValueError, match=r"^net='4': expected a layer whose forward is that of its class"):
        emq.convert(nn.Sequential(*net, norm), spec())


def test_a_hook_sees_what_it_saw(rng: torch.Generator) -> None:
    """An input that a hook makes negative, the output of a ReLU before it, gradients, and calls of an attention."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.MultiheadAttention(64, 2))
    net[2].register_forward_pre_hook(lambda m, inputs: (inputs[0] - 0.5,))
    seen: list[Tensor] = []
    net[2].register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    net[2].register_full_backward_hook(lambda m, into, out: seen.append(out[0]))
    net[4].register_forward_pre_hook(lambda m, inputs: (inputs[0], inputs[0], inputs[0]))
    model = emq.convert(net, spec(weight="minmax"))
    emq.set_bits(model, 32)
    x = torch.rand(2, 3, 8, 8, generator=rng)
    for each in (net, model):
        each(x)[0].sum().backward()
    for plain, ours in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_network_that_is_one_layer(rng: torch.Generator) -> None:
    linear = nn.Linear(4, 3)
    model = emq.convert(linear, spec(full_precision=(), weight="minmax", correction="none"))
    assert isinstance(model, QuantLinear) and model.input_quantizer.signed
    with emq.at_bits(model, 32):
        x = torch.randn(2, 4, generator=rng)
        assert torch.equal(model(x), linear(x))
    emq.set_bits(model, {"*": 4})
    assert bits_of(model) == {"": 4} and list(emq.summary(model).bits) == [4]


def test_subclasses_and_unused_layers_are_left_alone() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Scaled(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model = emq.convert(net, spec())
    assert type(model[1]) is Scaled and isinstance(model[2], QuantConv2d)
    assert emq.summary(model).set_index("name").note["1"] == "not a plain Conv2d or Linear"


def test_summary() -> None:
    model = emq.convert(build("functional"), spec(activation="pact", full_precision=("first", "head")))
    emq.set_bits(model, {"conv1": 2, "*": 4})
    table = emq.summary(model).set_index("name")
    assert list(table.index) == ["stem", "conv1", "conv2", "hidden", "head"]
    assert list(table.bits) == [32, 2, 4, 4, 32]
    assert table.note["stem"] == "full precision: first" and table.note["head"] == "full precision: head"
    assert list(table.loc["conv1"])[:3] == ["QuantConv2d", 2, "dorefa"]
    assert list(table.loc["hidden"])[3:7] == ["pact", False, "learned", "mean_var"]


def test_a_convolution_kept_in_full_precision_goes_by_its_own_name() -> None:
    """Though `convert` makes it of another class, which oneDNN computes well; in a part of a network too."""
    body = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 1), body=body, head=nn.Conv2d(8, 2, 1)))
    model = emq.convert(net, spec(full_precision=("first", "last", "body.0")))
    for part, name in ((model, "body.0"), (model.body, "0")):
        row = emq.summary(part).set_index("name").loc[name]
        assert row.type == "Conv2d" and row.note.startswith("full precision")


# Which inputs can be negative


class Block(nn.Module):
    """Puts `inside` before a convolution, to see whether the convolution counts as signed."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.inside = inside  # a module becomes part of the network, a function does not

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.inside(self.stem(x))))


def subtracted_in_place(x: Tensor) -> Tensor:
    x = x.relu()
    x.sub_(1)
    return x


def negated_through_a_view(x: Tensor) -> Tensor:
    x = x.relu()
    x.view(-1).neg_()
    return x


def subtracted_by_assignment(x: Tensor) -> Tensor:
    x = x.relu()
    y = x
    y -= 1
    return x


UNSIGNED = {
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "softmax": nn.Softmax(1),
    "hardtanh": nn.Hardtanh(0, 3),
    "functional": F.relu,
    "method": lambda x: x.relu(),
    "in_place": lambda x: x.relu_(),
    "absolute": abs,
    "exponential": torch.exp,
    "average_pool": nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Dropout(), nn.Identity()),
    "functional_pool": lambda x: F.adaptive_avg_pool2d(F.max_pool2d(F.avg_pool2d(x.relu(), 2), 2), 2),
    "sum": lambda x: x.relu() + x.sigmoid(),
    "plus_one": lambda x: x.relu() + 1,
    "concat": lambda x: torch.cat([x.relu()[:, :2], x.abs()[:, 2:]], 1),
    "chunk": lambda x: torch.cat(x.relu().chunk(2, 1), 1),
    "gate": lambda x: x.relu() * x.sigmoid(),
    "view": lambda x: x.relu().view(x.size(0), x.shape[1], -1).unsqueeze(-1).reshape(x.shape),
    "mean": lambda x: x.relu().mean((2, 3), keepdim=True),
}
SIGNED = {
    "nothing": nn.Identity(),
    "hardswish": nn.Hardswish(),
    "leaky": nn.LeakyReLU(),
    "hardtanh": nn.Hardtanh(),
    "norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "pool": nn.AvgPool2d(2),
    "residual": lambda x: x.relu() + x,
    "plus_minus_one": lambda x: x.relu() + (-1),
    "alpha": lambda x: torch.add(x.relu(), x.abs(), alpha=-1),
    "negated": lambda x: -x.relu(),
    "assigned": subtracted_by_assignment,
    "times_minus_two": lambda x: x.relu() * -2,
    "concat": lambda x: torch.cat([x[:, :2].relu(), x[:, 2:]], 1),
    "logarithm": lambda x: x.sigmoid().log(),
    "subtracted_in_place": subtracted_in_place,
    "negated_through_a_view": negated_through_a_view,
}


def that_see_negatives(net: nn.Module, batches: list[Tensor]) -> set[str]:
    """Names of the layers of a plain network that get a negative input from any of the batches."""
    seen: set[str] = set()

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: seen.add(name) if (args[0] < 0).any() else None

    layers = {name: m for name, m in net.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for images in batches:
            net(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("case", UNSIGNED)
def test_unsigned_inputs(case: str, rng: torch.Generator) -> None:
    torch.manual_seed(0)
    net = Block(UNSIGNED[case])
    assert not emq.convert(net, spec()).conv.input_quantizer.signed
    assert "conv" not in that_see_negatives(net, [torch.randn(4, 3, 8, 8, generator=rng)])


@pytest.mark.parametrize("case", SIGNED)
def test_signed_inputs(case: str, rng: torch.Generator) -> None:
    torch.manual_seed(0)
    net = Block(SIGNED[case])
    model = emq.convert(net, spec())
    assert model.conv.input_quantizer.signed and model.conv.input_quantizer.range == "tracked"
    assert "conv" in that_see_negatives(net, [torch.randn(4, 3, 8, 8, generator=rng)])
    assert (model.conv.input_quantizer(torch.tensor([-1.0, 1.0]), torch.tensor(1.0)) < 0).any()  # at 1 bit too


def test_a_trained_network_is_warned_of_another_scale(rng: torch.Generator) -> None:
    net = Block(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emq.convert(net, spec())
        net.train()(torch.randn(4, 3, 8, 8, generator=rng))
        emq.convert(net, spec(weight="minmax"))
    with pytest.warns(UserWarning, match='^DoReFa changes the scale of weights.*weight="minmax"$') as told:
        model = emq.convert(net, spec())
    assert told[0].filename == __file__
    images = torch.randn(8, 3, 8, 8, generator=rng)
    net.eval(), emq.set_bits(model.eval(), 32)
    assert not torch.allclose(model(images), net(images), rtol=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_unsigned_layer_ever_sees_a_negative_input(name: str, rng: torch.Generator) -> None:
    net = build(name)
    unsigned = {n for n, layer in quantized(emq.convert(net, spec())).items() if not layer.input_quantizer.signed}
    batches = [images_for(name, rng) for _ in range(2)]
    for mode in (True, False):
        assert not unsigned & that_see_negatives(net.train(mode), batches)


def test_signs_of_known_networks() -> None:
    for name in ("resnet8", "resnet18", "preact_resnet20", "torchvision.resnet18", "functional"):
        assert not any(m.input_quantizer.signed for m in quantized(emq.convert(build(name), spec())).values()), name
    signed = {n for n, m in quantized(emq.convert(build("norms1d"), spec())).items() if m.input_quantizer.signed}
    assert signed == set()
    assert all(m.input_quantizer.signed for m in quantized(emq.convert(build("untraceable"), spec())).values())
    mobile = quantized(emq.convert(build("torchvision.mobilenet_v3_small"), spec()))
    assert mobile["features.1.block.0.0"].input_quantizer.signed  # after the stem's hardswish
    assert not mobile["features.1.block.1.fc1"].input_quantizer.signed  # the mean of a ReLU's output
    assert not mobile["features.1.block.1.fc2"].input_quantizer.signed  # after its ReLU
    assert mobile["features.2.block.0.0"].input_quantizer.signed  # after a projection
    assert mobile["features.5.block.1.0"].input_quantizer.signed  # depthwise, after hardswish


# Ranges, and closeness to the plain network


def ranges(model: nn.Module) -> set[str]:
    return set(emq.summary(model).range.dropna())


def test_the_unit_range_is_for_networks_still_to_be_trained(rng: torch.Generator) -> None:
    assert ranges(emq.convert(build("resnet8"), spec())) == {"unit"}
    assert ranges(emq.convert(build("resnet8"), spec(activation_range="tracked"))) == {"tracked"}
    assert ranges(emq.convert(build("remembers"), spec())) == {"tracked"}  # no batch norm that would tell
    net = build("resnet8")
    net.train()(torch.randn(4, 3, 16, 16, generator=rng))
    assert ranges(emq.convert(net, spec())) == {"tracked"}
    assert ranges(emq.convert(net, spec(activation_range="unit"))) == {"unit"}
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as in weights published before the counter existed
            norm.num_batches_tracked.zero_()
    assert ranges(emq.convert(net, spec())) == {"tracked"}


@pytest.mark.parametrize(
    "name", ["resnet8", "preact_resnet20", "torchvision.resnet18", "torchvision.mobilenet_v3_small"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_trained_network_stays_close_at_8_bits(name: str, activation: str, rng: torch.Generator) -> None:
    net = uneven(build(name), rng)
    images = torch.randn(16, 3, 16, 16, generator=rng)
    largest = []
    for relu in net.modules():
        if isinstance(relu, (nn.ReLU, nn.Hardswish)):
            relu.register_forward_hook(lambda _, args, y: largest.append(float(y.max())))
    with torch.no_grad():
        expected = net(images)
        assert max(largest) > 5  # [0, 1] would clip most of it
        model = emq.convert(net, spec(weight="minmax", activation=activation))
        actual = model(images)
        coarse = activation == "lsq"  # it starts with steps of an eighth of the mean, to be learned from there
        assert (actual - expected).norm() < (0.3 if coarse else 0.15) * expected.norm()
        if activation == "dorefa" and name == "resnet8":
            clipped = emq.convert(net, spec(weight="minmax", activation_range="unit"))(images)
            assert (clipped - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("weight", ["minmax", "lsq"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_32_bits_compute_what_the_plain_network_computes(
    name: str, activation: str, weight: str, rng: torch.Generator
) -> None:
    net = build(name).eval()
    model = emq.convert(net, spec(weight=weight, activation=activation, correction="none"))
    images = images_for(name, rng, count=8)
    emq.set_bits(model, 32)
    with torch.no_grad():
        assert torch.equal(model(images), net(images))
        assert torch.equal(model(3 * images), net(3 * images))


def test_32_bits_train_as_the_plain_network_does(rng: torch.Generator) -> None:
    """Two steps of SGD, signed and unsigned inputs: the very same weights afterwards."""
    for name in ("resnet8", "twice", "functional"):
        net = build(name)
        model = emq.convert(net, spec(bits=(2, 32), weight="minmax", correction="none", activation_range="tracked"))
        emq.set_bits(model, 32)
        for network in (net, model):
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            for seed in range(2):
                optimizer.zero_grad()
                network(images_for(name, torch.Generator().manual_seed(seed))).square().mean().backward()
                optimizer.step()
        for (key, one), other in zip(net.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other.view_as(one), one, rtol=1e-5, atol=1e-6, msg=key)


# Bit-widths


def test_set_bits_by_pattern() -> None:
    model = emq.convert(build("resnet8"), spec())
    emq.set_bits(model, 3)
    assert set(bits_of(model).values()) == {3}
    emq.set_bits(model, {"layer3.*": 2, "*2": 5, "*": 4})  # the first match counts: layer3.0.conv2 has 2
    for name, bits in bits_of(model).items():
        assert bits == (2 if name.startswith("layer3.") else 5 if name.endswith("2") else 4), name
    for layer in quantized(model).values():
        assert layer.levels == 2**layer.bits - 1


def test_a_norm_follows_the_layer_before_it() -> None:
    """Where each bit-width has statistics of its own, those of a layer's bit-width fit its output."""
    model = emq.convert(build("resnet8"), spec(norm="shared_affine"))
    emq.set_bits(model, {"layer2.0.conv1": 2, "layer3.0.bn1": 3, "*": 8})
    other = {"layer2.0.conv1": 2, "layer2.0.bn1": 2, "layer3.0.bn1": 3}
    assert bits_of(model) == dict.fromkeys(bits_of(model), 8) | other


WRONG_BITS: list[tuple[object, str]] = [
    *((bits, r"a bit-width: 1 to 8, or 32") for bits in (0, 9, True, "4", 4.0, None, (2, 4), {"*": 0}, {"*": "4"})),
    ({"layer9.*": 2, "*": 4}, r"patterns that match a layer, unlike 'layer9\.\*', for example"),
    ({"layer1.*": 2}, "a pattern for bn1, for example"),
    ({}, "a pattern for"),
    ({4: 4, "*": 4}, "name patterns as keys"),
]


@pytest.mark.parametrize(("bits", "message"), WRONG_BITS)
def test_set_bits_is_all_or_nothing_and_says_what_is_wrong(bits: object, message: str) -> None:
    model = emq.convert(build("resnet8"), spec())
    emq.set_bits(model, {"layer3.*": 2, "*": 4})
    before = bits_of(model)
    for call in (emq.set_bits, lambda m, b: emq.at_bits(m, b).__enter__()):
        with pytest.raises(ValueError, match=rf"^bits(\['\*'\])?=.*: expected {message}"):
            call(model, bits)
        assert bits_of(model) == before


def test_a_switchable_norm_refuses_what_it_was_not_built_for() -> None:
    model = emq.convert(build("resnet8"), spec(norm="switchable"))
    for bits in (3, {"layer3.0.bn1": 3, "*": 4}, 32):
        with pytest.raises(ValueError, match=r"^bits=(3|32): expected one of \[2, 4, 8\], which the switchable norm"):
            emq.set_bits(model, bits)
        assert set(bits_of(model).values()) == {8}
    emq.set_bits(model, {"layer3.0.conv1": 3, "*": 4})  # a layer may, its norm stays at 4


class Twice(nn.Module):
    """A layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.middle(torch.relu(self.first(x)))))
        return self.last(torch.relu(x))


@pytest.mark.parametrize("correct_output", [False, True])
def test_a_training_step_quantizes_each_weight_once_and_all_at_its_start(
    correct_output: bool, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    model = emq.convert(Twice(), spec(full_precision=(), output_correction=correct_output)).train()
    twin, x, seen = copy.deepcopy(model), torch.randn(5, 4, generator=rng), []
    quantize = QuantLinear.weight_and_domain
    monkeypatch.setattr(QuantLinear, "weight_and_domain", lambda self: (seen.append("weight"), quantize(self))[1])
    model.register_forward_pre_hook(lambda *_: seen.append("first"))
    with step_weights(model):
        losses = [forward(x).square().sum() for forward in (model, twin)]  # outside of a step each use quantizes
        losses[0].backward()
    assert seen == ["weight"] * 3 + ["first"] + ["weight"] * 4
    assert torch.equal(*losses)
    losses[1].backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_at_bits_restores() -> None:
    model = emq.convert(build("resnet8"), spec())
    emq.set_bits(model, {"layer3.*": 2, "*": 4})
    before = bits_of(model)
    with emq.at_bits(model, 8) as same:
        assert same is model and set(bits_of(model).values()) == {8}
        with emq.at_bits(model, {"layer1.*": 1, "*": 32}):
            assert bits_of(model)["layer1.0.conv1"] == 1
        assert set(bits_of(model).values()) == {8}
    assert bits_of(model) == before
    with pytest.raises(KeyError), emq.at_bits(model, 8):
        raise KeyError
    assert bits_of(model) == before
    with pytest.raises(ValueError, match=r"^bits=9"), emq.at_bits(model, 9):
        pytest.fail("the block must not run")
    assert bits_of(model) == before


# Batch norms of other libraries and kinds


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnetx_002"])
def test_activations_inside_timms_batch_norms_stay(name: str, rng: torch.Generator) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64, generator=rng)
    model = emq.convert(net, spec(weight="minmax", correction="none", activation_range="tracked"))
    with emq.at_bits(model, 32), torch.no_grad():
        torch.testing.assert_close(model(x), net(x))


def test_batch_norms_of_other_kinds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    assert isinstance(emq.convert(net, spec())[1], MultiBitBatchNorm)
