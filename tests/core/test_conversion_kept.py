"""What `convert` decides once and keeps: in files, whatever mode it meets, and of weights it must not take apart."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_saving import edited
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import prune
from torchvision.models import SwinTransformer

import emqlib as emq

SPEC = emq.QuantSpec(bits=(2, 4))
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Dropping(nn.Module):
    """Drops whole paths while it trains, as timm's networks do; its auxiliary head is used in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.then = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.relu, self.act, self.last = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.auxiliary, self.head = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        if self.training:
            x = x * x.new_empty((1, 1, 1, 1)).bernoulli_(0.9)
        x = self.act(self.conv(x))
        y = self.head(self.last(self.then(x)).mean((2, 3)))
        return y + self.auxiliary(x.mean((2, 3))) if self.training else y


def modes(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]


@pytest.mark.parametrize("training", [True, False])
def test_decisions_are_those_of_evaluation_mode(training: bool) -> None:
    net = Dropping().train(training)
    net.conv.train(not training)
    model = emq.convert(net, SPEC)
    table = emq.summary(model).set_index("name").signed
    assert [table[name] for name in ("conv", "then", "auxiliary")] == [False, False, True]
    assert modes(model) == modes(net) and model.training == training and model.norm.training == training
    # in training mode others read what the first two give, and negative values would be new to them
    assert [type(m) for m in (model.relu, model.act, model.last)] == [nn.ReLU] * 3
    assert model.emq.decided == emq.convert(Dropping().train(not training), SPEC).emq.decided


@pytest.mark.parametrize("training", [True, False])
def test_a_file_loads_with_the_signs_it_was_saved_with(training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = emq.convert(Dropping().train(training), SPEC)
    model.train()(X)
    emq.save(model.eval(), tmp_path / "net")
    again = emq.load(tmp_path / "net", Dropping().train(not training))
    assert again.emq.decided == model.emq.decided and again.emq.decided.kept == model.emq.decided.kept
    assert torch.equal(again(X), model(X))
    emq.save(emq.pack(model, 4), tmp_path / "packed")
    assert torch.equal(emq.load(tmp_path / "packed", Dropping().train(not training))(X), emq.pack(model, 4)(X))


def test_what_the_file_says_counts_and_no_trace(tmp_path: Path) -> None:
    """Not even a warning about weights that are read outside their layers comes twice."""
    model = emq.convert(Dropping(), SPEC).eval()
    model(X)
    emq.save(model, tmp_path / "net")
    edited(tmp_path / "net", lambda about: about["decided"]["signed"].update(conv=True))
    assert emq.load(tmp_path / "net", Dropping()).conv.input_quantizer.signed
    with pytest.warns(UserWarning, match="outside: encoder"):
        tied = emq.convert(Tied(), SPEC)
    emq.save(tied, tmp_path / "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert emq.load(tmp_path / "tied", Tied()).emq.decided.kept == tied.emq.decided.kept


OTHERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "missing": (lambda net: delattr(net, "conv"), "'conv' is missing"),
    "no layer": (lambda net: setattr(net, "conv", nn.Identity()), "'conv' is Identity"),
    "one more": (lambda net: setattr(net, "more", nn.Linear(2, 2)), "'more' is Linear"),
    "no ReLU": (lambda net: setattr(net, "last", nn.GELU()), "'last' is GELU"),
    "another shape": (lambda net: setattr(net, "conv", nn.Conv2d(4, 5, 1)), "size mismatch for conv.weight"),
    "a Linear": (lambda net: setattr(net, "conv", nn.Linear(4, 4)), "size mismatch for conv.weight"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    emq.save(emq.convert(Dropping(), SPEC), tmp_path / "net")
    edited(tmp_path / "net", lambda about: about["decided"].update(absorbed=["last"]))
    net, (change, message) = Dropping(), OTHERS[name]
    change(net)
    with pytest.raises(ValueError, match=rf"(?s)^net='Dropping': expected the .*network that was saved.*{message}"):
        emq.load(tmp_path / "net", net)


HOSTILE: dict[str, tuple[Any, str]] = {
    "none": (None, r"Decisions \("),
    "a field less": ({"signed": {}}, r"Decisions \("),
    "a list": ({"signed": [1]}, "the plain network that was saved"),
    "a text": ({"absorbed": "act"}, "the plain network .* 'a' is missing"),
    "lists": ({"absorbed": [["act"]]}, "the plain network that was saved"),
    "other layers": ({"signed": {"layer9": True}}, "the plain network that was saved"),
    "no ReLU": ({"absorbed": ["layer1.0.conv1"]}, "the plain network .* 'layer1.0.conv1' is Conv2d"),
    "nothing": ({"signed": {}, "kept": {}}, "the plain network that was saved"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_edited_decisions_are_refused(name: str, tmp_path: Path) -> None:
    emq.save(emq.convert(emq.models.resnet8(width=4), SPEC), tmp_path / "net")
    told, message = HOSTILE[name]

    def change(about: dict[str, Any]) -> None:
        whole = isinstance(told, dict) and name != "a field less"
        about["decided"] = about["decided"] | told if whole else told

    with pytest.raises(ValueError, match=rf"^path='.*net': expected {message}"):
        emq.load(edited(tmp_path / "net", change))


# Weights that the network reads past their layers


class Tied(nn.Module):
    """An autoencoder that decodes by its encoder's own weight."""

    def __init__(self, traced: bool = True, alias: bool = False) -> None:
        super().__init__()
        if alias:  # under a name that comes before the layer's
            self.before = nn.Module()
        self.stem, self.encoder, self.inner, self.head = (nn.Linear(8, 8) for _ in range(4))
        if alias:
            self.before.weight = self.encoder.weight
        self.traced = traced

    def forward(self, x: Tensor) -> Tensor:
        if not self.traced:
            len(x)  # which no proxy has
        x = self.stem(x).to(self.inner.weight.dtype).relu()  # that alone reads nothing of the weight
        weight = self.before.weight if hasattr(self, "before") else self.encoder.weight
        return self.head(F.linear(self.inner(self.encoder(x).relu()).relu(), weight.t()))


class Square(nn.Module):
    """Two layers that hold one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.decoder, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(self.stem(x).relu()).relu()))


def ready(net: nn.Module, x: Tensor) -> nn.Module:
    """`net`, converted, at 4 bits, with ranges and statistics of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = emq.convert(net, SPEC).train()
    model(x)
    return model.eval()


@pytest.mark.parametrize("make", [Square, Tied, lambda: Tied(alias=True)])
def test_a_packed_autoencoder_of_tied_weights_computes_what_the_network_does(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8).double()
    model = ready(make().double(), x)
    assert make is Square or model.emq.decided.kept["encoder"] == "its weight is read outside the layer"
    assert "inner" not in model.emq.decided.kept
    with torch.no_grad():
        torch.testing.assert_close(emq.pack(model, 4)(x), model(x), rtol=1e-8, atol=1e-9)


def test_what_cannot_be_traced_refuses_to_compute_with_a_packed_weight(tmp_path: Path) -> None:
    x = torch.randn(16, 8)
    model = ready(Tied(traced=False), x)
    message = "model='inner': expected no packed weight to be read outside its layer"  # the first that it reads
    packed = emq.pack(model, 2)
    with pytest.raises(ValueError, match=f"^{message}"):
        packed(x)
    with pytest.raises(ValueError, match=message):
        emq.export_onnx(model, tmp_path / "net.onnx", 2, x)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_whose_weight_is_read_outside_stays_in_full_precision() -> None:
    with pytest.warns(UserWarning) as told:
        model = emq.convert(SwinTransformer([4, 4], 8, [2], [2], [7, 7], num_classes=3), emq.QuantSpec(bits=(4,)))
    (warning,) = [w for w in told if "outside" in str(w.message)]
    read = [layer for layer, why in model.emq.decided.kept.items() if why not in ("first", "last")]
    assert read and all(layer.startswith("features.1.") and ".attn." in layer for layer in read)
    assert str(warning.message).endswith(f"outside: {', '.join(read)}") and warning.filename == __file__
    table = emq.summary(model).set_index("name")
    assert set(table.note[read]) == {"full precision: its weight is read outside the layer"}
    assert table[table.note.eq("")].bits.eq(4).all() and table.note.eq("").sum() >= 2
    assert model.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


# Layers whose weight is no plain parameter


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()]
    return nn.Sequential(*convs, nn.Linear(16, 4), nn.Linear(4, 2))


def batch(net: nn.Module) -> None:
    net(X)


DERIVED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "weight_norm": (lambda net: utils.weight_norm(net[2]), lambda net: utils.remove_weight_norm(net[2])),
    "spectral_norm": (lambda net: utils.spectral_norm(net[2]), lambda net: utils.remove_spectral_norm(net[2])),
    "prune": (
        lambda net: prune.l1_unstructured(net[2], "weight", 0.5),
        lambda net: prune.remove(net[2], "weight"),
    ),
    "parametrizations": (
        lambda net: utils.parametrizations.weight_norm(net[2]),
        lambda net: utils.parametrize.remove_parametrizations(net[2], "weight"),
    ),
    "LazyConv2d": (lambda net: net.__setitem__(2, nn.LazyConv2d(4, 3)), batch),
    "LazyBatchNorm2d": (lambda net: net.insert(2, nn.LazyBatchNorm2d()), batch),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DERIVED, *(f"{name} after a batch" for name in DERIVED if "Lazy" not in name)])
def test_a_derived_weight_is_refused_with_its_remedy(name: str) -> None:
    make, remedy = DERIVED[name.removesuffix(" after a batch")]
    net = sequential()
    make(net)
    if name.endswith("after a batch"):
        batch(net)
    told = "run one batch" if "Lazy" in name else "first undo its parametrization"
    with pytest.raises(ValueError, match=rf"^net='2': expected a layer whose weight is a parameter \({told}"):
        emq.convert(net, SPEC)
    remedy(net)
    model = emq.convert(net, emq.QuantSpec(bits=(4,), weight="minmax", correction="none"))
    assert emq.summary(model).bits[1:-1].eq(4).all()
    with emq.at_bits(model.eval(), 32), torch.no_grad():
        torch.testing.assert_close(model(X), net.eval()(X))


def test_attention_whose_weight_is_derived_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    utils.parametrizations.orthogonal(net[1], "in_proj_weight")
    with pytest.raises(ValueError, match=r"^net='1': expected a layer whose weight is a parameter \(first undo"):
        emq.convert(net, SPEC)


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    net = sequential()
    net.kept_from_before = net[0](X)
    with pytest.raises(ValueError, match=r"^net='Sequential': expected a network that copy.deepcopy can copy"):
        emq.convert(net, SPEC)
