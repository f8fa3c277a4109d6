"""Quantizers of one's own: a copy of DoReFa gives what DoReFa gives, and what is no quantizer is refused."""

import copy
import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, images_for
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import emqlib as emq
from emqlib.convert import quantized_layers

NAMES = {"weight": f"{__name__}.my_weight", "activation": f"{__name__}.my_activation"}


def nearest(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def my_weight(w: Tensor, n: float) -> tuple[Tensor, Tensor]:
    mean, t = w.detach().abs().mean(), w.tanh() / w.tanh().abs().max()
    return mean * (2 * nearest(n * (t / 2 + 0.5)) / n - 1), mean * t


def my_activation(x: Tensor, n: float) -> Tensor:
    return nearest(n * nn.functional.hardtanh(x, 0.0, 1.0)) / n


def pair(name: str = "resnet8", **spec: Any) -> tuple[nn.Module, nn.Module]:
    """A network by the library's DoReFa, and by the copy."""
    net = build(name)
    own = {"bits": (2, 4), "weight": my_weight, "activation": my_activation} | spec
    return emq.convert(net, emq.QuantSpec(bits=(2, 4))), emq.convert(net, emq.QuantSpec(**own))


def test_a_copy_of_dorefa_computes_and_learns_what_dorefa_does(rng: torch.Generator) -> None:
    theirs, ours = (model.double() for model in pair())
    images, spec = images_for("resnet8", rng).double(), ours.emq.spec
    assert (spec.weight, spec.activation) == (NAMES["weight"], NAMES["activation"])
    assert set(emq.summary(ours).weight.dropna()) == {NAMES["weight"]}
    for bits in (*range(1, 9), 32):
        outputs = []
        for model in (theirs, ours):
            emq.set_bits(model, bits)
            model.zero_grad()
            outputs.append(model(images))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(quantized_layers(ours).values(), quantized_layers(theirs).values(), strict=True):
            torch.testing.assert_close(a.weight_and_bias()[0], b.weight_and_bias()[0], rtol=1e-12, atol=1e-14)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8)


def test_it_trains_and_comes_back_from_a_file(tmp_path: Path) -> None:
    data, (_, model) = emq.load_dataset("digits").subset(20, 10), pair()
    config = emq.TrainConfig(epochs=1, batch_size=20, lr=0.01)
    emq.train(model, data, config, checkpoint=tmp_path / "checkpoint", progress=False)
    emq.save(model, tmp_path / "net")
    again = emq.load(tmp_path / "net", build("resnet8"), quantizers=[my_weight, my_activation])
    assert again.emq.spec == model.emq.spec and again.emq.spec.weight.function is my_weight
    assert emq.evaluate(again, data, bits=(2, 3)).equals(emq.evaluate(model, data, bits=(2, 3)))
    with pytest.raises(
        ValueError, match=rf"quantizers=\[\.\.\.\]\) \(activation='{NAMES['activation']}': expected one"
    ):
        emq.load(tmp_path / "net", build("resnet8"), quantizers=[my_weight])
    for wrong in (emq.pack, lambda *arguments: emq.export_onnx(*arguments)):
        arguments = (model, 2) if wrong is emq.pack else (model, tmp_path / "onnx", 2, torch.zeros(1, 3, 32, 32))
        with pytest.raises(ValueError, match=rf"^model='{NAMES['weight']}': expected a network whose quantizers"):
            wrong(*arguments)


def test_copies_hashes_and_json_know_it_by_its_name() -> None:
    spec = emq.QuantSpec(bits=(2,), weight=my_weight)
    assert json.loads(json.dumps(asdict(spec)))["weight"] == NAMES["weight"]
    assert replace(spec, bits=(4,)).weight.function is copy.deepcopy(spec).weight.function is my_weight
    assert spec == emq.QuantSpec(bits=(2,), weight=my_weight) != emq.QuantSpec(bits=(2,))


def test_one_graph_serves_every_bit_width(rng: torch.Generator) -> None:
    torch._dynamo.reset()
    _, model = pair()
    images, counter = images_for("resnet8", rng), CompileCounter()
    model(images)
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    for bits in (2, 3, 8):
        emq.set_bits(model, bits)
        torch.testing.assert_close(compiled(images), model(images))
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_a_relu_stays_before_an_activation_quantizer_that_may_not_clip() -> None:
    assert not pair()[1].emq.decided.absorbed and pair(activation="dorefa")[1].emq.decided.absorbed


def one_output(w: Tensor, n: float) -> Tensor:
    return w


def no_gradient(w: Tensor, n: float) -> tuple[Tensor, Tensor]:
    return w.detach(), w


def zero_gradient(x: Tensor, n: float) -> Tensor:
    return x.round()


def another_shape(x: Tensor, n: float) -> Tensor:
    return x.flatten()


def integers(w: Tensor, n: float) -> tuple[Tensor, Tensor]:
    return w.round().long(), w


WRONG = {
    "weight": [one_output, no_gradient, integers, lambda w, n: (w, w), "my_weight", nn.Identity()],
    "activation": [zero_gradient, another_shape, my_weight, functools.partial(my_activation, n=3.0), max],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_what_is_no_quantizer_is_refused_when_it_is_passed(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{field}=.*: expected (one of dorefa|a function that is defined)"):
        emq.QuantSpec(bits=(2, 4), **{field: value})
