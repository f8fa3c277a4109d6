"""Files of trained networks: an exact round trip, and clear errors for anything else."""

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import emqlib as emq
from emqlib import files as container
from emqlib import models

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[str, dict[str, int]]] = {
    "resnet": ("resnet8", {"width": 4}),
    "vit": ("vit_tiny", {"patch_size": 8, "width": 16, "depth": 2, "heads": 2}),
}
SPECS: dict[str, dict[str, Any]] = {
    "as published": {},
    "switchable, learned": {"norm": "switchable", "weight": "lsq", "activation": "lsq"},
    "uncalibrated": {"norm": "shared_affine", "output_correction": True, "activation_range": "tracked"},
    "patterns": {"weight": "minmax", "zero_level": True, "full_precision": ("first", "*1*"), "activation": "pact"},
}


def trained(network: str = "resnet", spec: str = "as published") -> nn.Module:
    """A network whose every parameter and buffer has moved."""
    torch.manual_seed(0)
    name, arguments = NETWORKS[network]
    model = emq.convert(models.build(name, 5, **arguments), emq.QuantSpec(**{"bits": (2, 4)} | SPECS[spec]))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for bits in (2, 4, 2):
        emq.set_bits(model, bits)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of `trained()`."""
    path = tmp_path_factory.mktemp("saved") / "net"
    emq.save(trained(), path)
    return path.read_bytes()


@pytest.fixture
def saved(whole: bytes, tmp_path: Path) -> Path:
    (tmp_path / "net").write_bytes(whole)
    return tmp_path / "net"


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def edited(path: Path, change: Any) -> Path:
    """The file with another description of the same tensors, and the checksum that belongs to both."""
    data, tensors = path.read_bytes(), load_file(path)
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    about = json.loads(head["__metadata__"]["emqlib"][64:])
    change(about)
    told = json.dumps(about)
    head["__metadata__"] = {"emqlib": container._digest(told, tensors) + told}
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_comes_back_as_it_was_at_every_bit_width(network: str, spec: str, tmp_path: Path) -> None:
    model = trained(network, spec)
    emq.save(model, tmp_path / "net.safetensors")
    again = emq.load(tmp_path / "net.safetensors")
    assert again.emq.spec == model.emq.spec and again.emq.decided.kept == model.emq.decided.kept and not again.training
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for bits in (2, 4, *(() if spec == "switchable, learned" and network == "resnet" else (3, 8, 32))):
        for net in (model, again):
            emq.set_bits(net, bits)
        assert torch.equal(again(X), model(X))


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = emq.load_dataset("digits").subset(20, 10)
    model = emq.convert(models.resnet8(width=4), emq.QuantSpec(bits=(2, 4)))
    emq.train(model, data, emq.TrainConfig(epochs=1, batch_size=10), progress=False)
    path = tmp_path / "net.safetensors"
    emq.save(model, path)
    about = json.loads(header(path)["__metadata__"]["emqlib"][64:])
    assert about["version"] == 4 and about["network"] == {"name": "resnet8", "num_classes": 10, "width": 4}
    assert about["spec"]["bits"] == [2, 4] and about["spec"]["activation_range"] == "unit"
    assert about["trained_on"] == {
        "name": "digits",
        "sha256": data.sha256,
        "num_classes": 10,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    assert about["provenance"]["torch"] == torch.__version__
    assert emq.load(path).emq.data == about["trained_on"]
    emq.save(emq.load(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_compiled_network_is_saved_as_the_one_inside(tmp_path: Path) -> None:
    model = emq.convert(models.resnet8(width=4), emq.QuantSpec(bits=(2, 4)))
    for network in (model, emq.pack(model, 4)):
        emq.save(network, tmp_path / "plain")
        emq.save(torch.compile(network), tmp_path / "compiled")
        assert (tmp_path / "compiled").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_network_of_ones_own_is_given(tmp_path: Path) -> None:
    def net(width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 28))

    model = emq.convert(net(), emq.QuantSpec(bits=(2,)))
    model(X)
    emq.save(model, tmp_path / "own")
    assert torch.equal(emq.load(tmp_path / "own", net())(X), model.eval()(X))
    with pytest.raises(ValueError, match=r"^net=None: expected the plain network that .* is not one of emqlib.models"):
        emq.load(tmp_path / "own")
    with pytest.raises(ValueError, match=r"(?s)^net='Sequential': expected the plain network .*0.weight"):
        emq.load(tmp_path / "own", net(5))
    with pytest.raises(ValueError, match=r"(?s)^net='Sequential': expected the plain network .*2.weight"):
        emq.load(tmp_path / "own", nn.Sequential(*net()[:2], nn.Conv2d(4, 4, 1), *net()[3:]))


class Versioned(nn.Module):
    """Turns the table of states that tell no version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8))
        self.body, self.head = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 10, 28)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, about: dict[str, Any], *rest: Any) -> None:
        if about.get("version") is None:
            state[f"{prefix}table"] = state[f"{prefix}table"].T
        super()._load_from_state_dict(state, prefix, about, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("nchw,cd->ndhw", self.body(self.conv(x)), self.table)).flatten(1)


def test_states_are_of_the_version_that_modules_have_now(tmp_path: Path) -> None:
    model = emq.convert(Versioned(), emq.QuantSpec(bits=(2,)))
    model(X)
    emq.save(model, tmp_path / "net")
    assert torch.equal(emq.load(tmp_path / "net", Versioned()).table, model.table)
    digits, config = emq.load_dataset("digits").subset(20, 10), emq.TrainConfig(epochs=1, batch_size=20)
    emq.train(model, digits, config, tmp_path / "run", progress=False)
    again = copy.deepcopy(model)
    emq.train(again, digits, config, tmp_path / "run", progress=False)
    assert torch.equal(again.table, model.table)


EDITS: dict[str, tuple[Any, str]] = {
    "another version": (lambda a: a.update(version=3), r"a whole file .*, of version 4 of the format, not 3"),
    "no version": (lambda a: a.pop("version"), r"a whole file .*, of version 4 of the format, not None"),
    "a key less": (lambda a: a.pop("spec"), r"a whole file that emqlib.save wrote, with decided"),
    "a key more": (lambda a: a.update(code="import os"), r"a whole file that emqlib.save wrote, with decided"),
    "another spec": (
        lambda a: a["spec"].update(weight="eval"),
        r"a QuantSpec.*\(weight='eval': expected one of dorefa",
    ),
    "a field more": (lambda a: a["spec"].update(run="x"), r"a QuantSpec"),
    "no spec": (lambda a: a.update(spec=[1]), r"a QuantSpec"),
    "no bits": (lambda a: a["spec"].update(bits=None), r"a QuantSpec"),
    "another width": (lambda a: a["network"].update(width=5), r"the plain network .*conv1.weight"),
    "another norm": (
        lambda a: a["spec"].update(norm="switchable"),
        r"the plain network .*size mismatch",
    ),
    "another class": (
        lambda a: a["network"].update(name="os.system"),
        r"a network .* \(name='os.system'",
    ),
    "another library": (
        lambda a: a["network"].update(name="timm.resnet18"),
        r"a network .* \(name='timm",
    ),
    "an argument": (lambda a: a["network"].update(path="/etc"), r"a network of emqlib.models \(path='/etc'"),
    "no network": (lambda a: a.update(network="resnet8"), r"a network of emqlib.models"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_description_is_refused(name: str, saved: Path) -> None:
    change, message = EDITS[name]
    with pytest.raises(ValueError, match=rf"(?s)^path='.*net': expected {message}"):
        emq.load(edited(saved, change))


@pytest.mark.parametrize(
    ("old", "new"), [(b"digits", b"Digits"), (b'\\"bits\\":[2,4]', b'\\"bits\\":[2,8]'), (None, b"")]
)
def test_whatever_is_changed_is_refused(old: bytes | None, new: bytes, tmp_path: Path) -> None:
    """One bit of the last number, or a word of the description."""
    model, path = trained(), tmp_path / "net"
    model.emq.data = {"name": "digits"}
    emq.save(model, path)
    data = path.read_bytes()
    assert old is None or data.count(old) == 1
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if old is None else data.replace(old, new))
    with pytest.raises(ValueError, match=r"^path=.*: expected a whole file .*: it is not what was saved, its checksum"):
        emq.load(path)


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, -1])
def test_a_file_cut_short_is_refused(kept: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"^path=.*: expected a whole file that emqlib.save wrote \("):
        emq.load(saved)


class Hostile:
    """What a pickle runs where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_nothing_in_a_file_is_run(whole: bytes, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    with open(tmp_path / "control", "wb") as file:
        pickle.dump(Hostile(mark), file)
    pickle.loads((tmp_path / "control").read_bytes())
    assert mark.exists()  # it would have worked
    mark.unlink()
    torch.save({"model": Hostile(mark)}, tmp_path / "checkpoint")
    for name in ("control", "checkpoint"):
        with pytest.raises(ValueError, match=r"^path=.*: expected a whole file that emqlib.save wrote"):
            emq.load(tmp_path / name)
    for text in (f"__import__('pathlib').Path({str(mark)!r}).touch()", {"__reduce__": ["os.system", f"touch {mark}"]}):
        for key in ("network", "spec", "trained_on", "provenance"):
            saved.write_bytes(whole)
            edited(saved, lambda about, key=key, text=text: about.update({key: text}))
            try:
                emq.load(saved)
            except ValueError:
                assert key in ("network", "spec")
    assert not mark.exists()


class Told(nn.Identity):
    """A module that keeps more than tensors, as PyTorch allows."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    layers = (nn.Linear(4, 8), nn.ReLU(), Told(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^model='2._extra_state of dict': expected a network whose state is tensors"):
        emq.save(emq.convert(nn.Sequential(*layers), emq.QuantSpec(bits=(2, 8))), tmp_path / "net")
    with pytest.raises(ValueError, match=r"^model='Sequential': expected a network made by emqlib.convert"):
        emq.save(nn.Sequential(), tmp_path / "net")
    for path in (tmp_path, None, "", 3):
        with pytest.raises(ValueError, match=r"^path=.*: expected the name of a file"):
            emq.save(trained(), path)
    with pytest.raises(ValueError, match=r"^path='.*nothing': expected a whole file"):
        emq.load(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
