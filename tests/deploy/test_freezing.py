"""Networks frozen at a bit-width against the networks that they are of, also compiled and in bfloat16."""

import copy

import pytest
import torch
from test_saving import NETWORKS, SPECS, X, trained
from torch import nn

import emqlib as emq
from emqlib.deploy.freeze import FrozenConv2d, FrozenLinear
from emqlib.norms import MultiBitBatchNorm

pytestmark = pytest.mark.processor


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_frozen_network_computes_what_the_trained_one_does(network: str, spec: str) -> None:
    """In double precision, where no rounding of an activation tips over."""
    model = trained(network, spec).double()
    known = (2, 4) if spec == "switchable, learned" and network == "resnet" else (2, 3, 8, 32)
    for bits in known if model.emq.spec.zero_level or len(known) == 2 else (1, *known):
        frozen = emq.freeze(model, bits)
        kinds = {type(m) for m in frozen.modules()}
        assert not frozen.training and MultiBitBatchNorm not in kinds
        assert bool(kinds & {FrozenConv2d, FrozenLinear}) == (bits != 32)
        with emq.at_bits(model, bits), torch.no_grad():
            torch.testing.assert_close(frozen(X.double()), model(X.double()), rtol=1e-8, atol=1e-9)


def test_a_network_of_one_layer() -> None:
    torch.manual_seed(0)
    model = emq.convert(nn.Linear(8, 4), emq.QuantSpec(bits=(2, 4), full_precision=(), activation="none"))
    x = torch.randn(3, 8)
    with emq.at_bits(model, 2), torch.no_grad():
        torch.testing.assert_close(emq.freeze(model, 2)(x), model(x))


def test_it_is_a_plain_network() -> None:
    frozen = emq.freeze(trained("resnet"), 4)
    with torch.no_grad():
        expected = frozen(X)
        assert torch.equal(copy.deepcopy(frozen)(X), expected)
        low = copy.deepcopy(frozen).bfloat16()(X.bfloat16()).float()
        assert (low - expected).abs().median() < 0.1 * expected.abs().max()
        traced = torch.export.export(frozen, (X,)).module()
        torch.testing.assert_close(traced(X), expected)
    with pytest.raises(ValueError, match="convert"):
        emq.save(frozen, "nowhere")


@pytest.mark.thorough
def test_compiled_it_answers_the_same() -> None:
    frozen = emq.freeze(trained("resnet").double(), 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(frozen)(X.double()), frozen(X.double()))


def test_what_cannot_be_frozen() -> None:
    for model in (nn.Linear(2, 2), emq.pack(trained("resnet"), 4), emq.freeze(trained("resnet"), 4)):
        with pytest.raises(ValueError, match="convert"):
            emq.freeze(model, 4)
