"""A trained network in one file, in which nothing can be run: see `container`."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, models
from .. import files as container
from ..convert import Decisions, convert_as, converted, quantized_layers
from ..files import software
from ..layers import QuantSpec
from .pack import pack_as_set

VERSION = 4
_KEYS = {"version", "network", "spec", "decided", "packed", "trained_on", "provenance"}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a converted `model`, or what `pack` made of one, to `path`, atomically: what `load` needs to make it again.

    The file is safetensors; its header holds, as JSON, a version, the network (where `emqlib.models` built it), the
    QuantSpec, what `convert` decided on its layers, the bit-widths of packed layers, name, checksum and statistics of
    the data set `train` saw last, and this software's versions; and a checksum of that and of all tensors.
    ValueError: neither a converted network nor a packed one, or a path that is a folder. OSError: it cannot be written.
    """
    path = checks.file_name("path", path)
    network = model if getattr(getattr(model, "emq", None), "packed", None) else converted(model)
    known = network.emq
    about = {
        "version": VERSION,
        "network": known.network,
        "spec": asdict(known.spec),
        "decided": asdict(known.decided),
        "packed": known.packed,
        "trained_on": known.data,
        "provenance": software(),
    }
    container.write(path, about, network.state_dict())


def load(path: str | Path, net: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote to `path`, in evaluation mode: packed, or at its highest trained bit-width.

    On the CPU, or where `net` lies. net: the plain network that was converted, of which the parameters do not matter,
    where it is not one of `emqlib.models`, in any mode: what `convert` decided on it stands in the file. ValueError
    that names path or net: no such file, not whole, edited, of another version or of another network.
    """
    path, expected = checks.file_name("path", path), "a whole file that emqlib.save wrote"
    about, tensors = container.read(path, VERSION, expected)
    if set(about) != _KEYS:
        raise checks.invalid("path", str(path), f"{expected}, with {', '.join(sorted(_KEYS))}")
    spec, decided = (_made(kind, about[key], path) for kind, key in ((QuantSpec, "spec"), (Decisions, "decided")))
    plain = _network(about["network"], tensors, path) if net is None else net
    place = ("path", str(path)) if net is None else ("net", type(net).__name__)
    try:
        model = convert_as(plain, spec, decided)
    except ValueError as error:
        raise checks.invalid(*place, f"the plain network that was saved ({error})") from error
    if about["packed"] is not None:
        model = _packed(model, about["packed"], path)
    _refuse_another(model, tensors, place)
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:  # of what has a size of its own
        raise checks.invalid("path", str(path), f"a whole state of the network ({error})") from error
    model.emq.data = about["trained_on"]
    return model.eval()


def _made(kind: type, told: Any, path: Path) -> Any:
    """The dataclass `kind` of what the file tells."""
    name = kind.__name__
    if not isinstance(told, dict) or set(told) != {f.name for f in fields(kind)}:
        raise checks.invalid("path", str(path), f"the fields of {name}, not {told!r}")
    try:
        return kind(**told)
    except (TypeError, ValueError) as error:
        raise checks.invalid("path", str(path), f"a {name} ({error})") from error


def _network(recipe: Any, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The network of a recipe, first on no device: one that has more weights than the file has bits is never built."""
    if recipe is None:
        raise checks.invalid("net", None, f"the plain network that {path} is of: it is not one of emqlib.models")
    try:
        arguments = dict(recipe)
        name = arguments.pop("name")
        if name not in models.MODELS:  # another library's builder may read files that an argument names
            raise checks.invalid("name", name, f"one of {', '.join(models.MODELS)}")
        with torch.device("meta"):
            weights = sum(p.numel() for p in models.build(name, **arguments).parameters())
        if weights > 8 * sum(t.numel() * t.element_size() for t in tensors.values()):
            raise checks.invalid("network", recipe, f"a network whose weights are in the file, not {weights} of them")
        return models.build(name, **arguments)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: more weights than can be counted
        raise checks.invalid("path", str(path), f"a network of emqlib.models ({error})") from error


def _packed(model: nn.Module, bits: Any, path: Path) -> nn.Module:
    """A packed network of the shapes of `model`'s, each layer at its own of `bits`."""
    layers = quantized_layers(model)
    if not isinstance(bits, dict) or set(bits) != set(layers):
        raise checks.invalid("path", str(path), f"a bit-width for each of {', '.join(layers)}")
    try:
        for name, layer in layers.items():
            layer.set_bits(checks.bit_width(name, bits[name]))
    except ValueError as error:
        raise checks.invalid("path", str(path), f"bit-widths of packed layers ({error})") from error
    return pack_as_set(model)


def _refuse_another(model: nn.Module, tensors: dict[str, Tensor], place: tuple[str, str]) -> None:
    """ValueError if the tensors are those of another network; what has a size of its own is left to its module."""
    own = {name: list(t.shape) for name, t in model.state_dict().items() if not name.endswith("_extra_state")}
    theirs = {name: list(t.shape) for name, t in tensors.items() if not name.endswith("_extra_state")}
    differing = next((name for name in (*own, *theirs) if own.get(name) != theirs.get(name)), None)
    if differing or set(model.state_dict()) != set(tensors):
        there, here = (shapes.get(differing, "none") for shapes in (theirs, own))
        raise checks.invalid(*place, f"the network that was saved: {differing} is {there} in the file, {here} in it")
