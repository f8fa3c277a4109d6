"""A trained network in one safetensors file, in which nothing can be run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import isfunction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, files, models
from ..convert import Decisions, convert_as, converted, quantized_layers
from ..layers import QuantSpec
from .pack import pack_as_set

VERSION = 4
_KEYS = {"version", "network", "spec", "decided", "packed", "trained_on", "provenance"}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a network to a file, atomically, with all that `load` needs to make it again.

    The header holds, as JSON, the network's name and arguments if it is one of `emqlib.models`, its QuantSpec, what
    `convert` decided on its layers, the bit-widths of packed layers, the data set that `train` saw last, the versions
    of this software, and a checksum of all that and of the tensors.

    Args:
        model: what `convert` or `pack` made.
        path: the file.

    Raises:
        ValueError: the network is neither converted nor packed, or the path is a folder.
        OSError: the file cannot be written.
    """
    path = checks.file_name("path", path)
    network = getattr(model, "_orig_mod", model)  # of a compiled one
    network = network if getattr(getattr(network, "emq", None), "packed", None) else converted(network)
    known = network.emq
    about = {
        "version": VERSION,
        "network": known.network,
        "spec": asdict(known.spec),
        "decided": asdict(known.decided),
        "packed": known.packed,
        "trained_on": known.data,
        "provenance": files.software(),
    }
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise checks.invalid("model", f"{name} of {type(value).__name__}", "a network whose state is tensors")
    files.write(path, about, state)


def load(path: str | Path, net: nn.Module | None = None, quantizers: Sequence[Callable[..., Any]] = ()) -> nn.Module:
    """Read what `save` wrote.

    Args:
        path: the file.
        net: the plain network that was converted, if it is not one of `emqlib.models`. Its parameters and its mode do
            not matter.
        quantizers: the functions of your own that quantized it, if there are any. A file holds only their names, since
            what a file says is never run.

    Returns:
        The network in evaluation mode, on the CPU or where `net` lies: packed, or at its highest trained bit-width.

    Raises:
        ValueError: names the path or net: there is no such file, it is damaged, edited, of another version or of
            another network. Networks that differ in their activations alone are not told apart.
    """
    path, expected = checks.file_name("path", path), "a whole file that emqlib.save wrote"
    if not isinstance(quantizers, (list, tuple)) or not all(map(isfunction, quantizers)):
        raise checks.invalid("quantizers", quantizers, "a list of functions, those that quantized the network")
    about, tensors = files.read(path, VERSION, expected)
    if set(about) != _KEYS:
        raise checks.invalid("path", str(path), f"{expected}, with {', '.join(sorted(_KEYS))}")
    file = ("path", str(path))
    functions = {checks.Own.of(function): function for function in quantizers}
    with checks.expecting(*file, "a QuantSpec, whose own quantizers go into load(..., quantizers=[...])"):
        given = about["spec"]
        own = {field: functions.get(given[field], given[field]) for field in ("weight", "activation")}
        spec = QuantSpec(**given | own)
    with checks.expecting(*file, "Decisions"):
        decided = Decisions(**about["decided"] | {"absorbed": tuple(about["decided"]["absorbed"])})
    if net is None and about["network"] is None:
        raise checks.invalid("net", None, f"the plain network that {path} is of: it is not one of emqlib.models")
    with checks.expecting(*file, "a network of emqlib.models"):
        plain = _network(about["network"], tensors) if net is None else net
    with checks.expecting(*(file if net is None else ("net", type(net).__name__)), "the plain network that was saved"):
        model = convert_as(plain, spec, decided)
        if about["packed"] is not None:
            for name, layer in quantized_layers(model).items():
                layer.set_bits(checks.bit_width(name, about["packed"][name]))
            model = pack_as_set(model)
        files.load_state(model, tensors)
    model.emq.data = about["trained_on"]
    return model.eval()


def _network(recipe: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The network of a recipe. It is made without memory first: a file must not ask for more weights than it holds."""
    arguments = dict(recipe)
    name = arguments.pop("name")
    if name not in models.MODELS:  # builders of other libraries may read files that an argument names
        raise checks.invalid("name", name, f"one of {', '.join(models.MODELS)}")
    with torch.device("meta"):
        weights = sum(p.numel() for p in models.build(name, **arguments).parameters())
    if weights > 8 * sum(t.numel() * t.element_size() for t in tensors.values()):
        raise checks.invalid("network", recipe, f"a network whose weights are in the file, not {weights} of them")
    return models.build(name, **arguments)
