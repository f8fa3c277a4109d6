"""What children have in common: angles between their gradients, and what a probe of one reads in another's features."""

import copy
from collections.abc import Iterable
from itertools import combinations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import bit_widths, instance, integer, invalid, tensor
from .data import Dataset
from .evaluation import batches, undisturbed
from .multibit import at_bits, converted, set_bits

ALL = "all layers"


def angle(a: Tensor, b: Tensor) -> float:
    """The angle in degrees between the directions u and v of a and b: 2 atan2(|u - v|, |u + v|), |u| = |v| = 1.

    a, b: tensors (N,) or any other equal shape. NaN where one of them is zero. Source: Kahan 2006; unlike the arc
    cosine it is exact for small angles. ValueError: unequal shapes.
    """
    if tensor("a", a, "a tensor").shape != tensor("b", b, "a tensor").shape:
        raise invalid("b", tuple(b.shape), f"the shape of a, {tuple(a.shape)}")
    u, v = (x.double().flatten() / x.double().norm() for x in (a, b))
    return float(torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())))


def gradient_angles(
    model: nn.Module, data: Dataset, bits: Iterable[int], samples: int = 1000, batch_size: int = 250
) -> pd.DataFrame:
    """Angles between the children's gradients of the same loss, in degrees: one row a layer and pair of bit-widths.

    Columns: layer (and `ALL`, all of them as one vector), depth (from 0; -1 for `ALL`), bits, other_bits, other_images,
    angle. The gradient is that of the cross entropy, mean over `samples` augmented training images, to the
    full-precision weight of each convolution and linear layer, with batch norm as in training. Where bits and
    other_bits are equal, other_images is True and the second gradient is of as many other images: the angle that
    sampling alone makes. The model is left as it was. ValueError: not a converted network, bad bits, too few images.
    """
    wanted = bit_widths("bits", bits)
    integer("samples", samples, 2)
    integer("batch_size", batch_size, 2)
    converted(model)
    instance("data", data, Dataset, "a Dataset, for example load_dataset('cifar10')")
    if len(data.train.labels) < 2 * samples:
        raise invalid("samples", samples, f"at most half of the {len(data.train.labels)} training images")
    device = next(model.parameters()).device
    pairs = batches(data, "train", device, batch_size, 2 * samples)
    images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if len(labels) == len(data.train.labels):  # all there are come in their own order, which may be class by class
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
        images, labels = images[order], labels[order]
    parts = -(-samples // batch_size)  # of near-equal size: batch norm cannot take a last one of one image
    halves = zip(images.split(samples), labels.split(samples), strict=True)
    here, there = (list(zip(*(half.tensor_split(parts) for half in pair), strict=True)) for pair in halves)
    first = {b: _gradients(model, here, b) for b in wanted}
    rows = []
    for a, b in combinations(wanted, 2):
        rows += _compared(first[a], first[b], {"bits": a, "other_bits": b, "other_images": False})
    for b in wanted:  # one at a time: each is as large as the network
        rows += _compared(first[b], _gradients(model, there, b), {"bits": b, "other_bits": b, "other_images": True})
    return pd.DataFrame(rows)


def _gradients(model: nn.Module, pairs: list[tuple[Tensor, Tensor]], bits: int) -> dict[str, Tensor]:
    """The gradient of the mean loss to each layer's weight, by the layer's name in the order of the network."""
    model = copy.deepcopy(model).train()  # ranges, batch norms and mean inputs follow what they see in training
    model.zero_grad(set_to_none=True)
    set_bits(model, bits)
    total = sum(len(labels) for _, labels in pairs)
    for images, labels in pairs:
        (F.cross_entropy(model(images).float(), labels, reduction="sum") / total).backward()
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return {name: m.weight.grad for name, m in layers if m.weight.grad is not None}


def _compared(a: dict[str, Tensor], b: dict[str, Tensor], pair: dict[str, int | bool]) -> list[dict]:
    rows = [{"layer": name, "depth": i} | pair | {"angle": angle(a[name], b[name])} for i, name in enumerate(a)]
    whole = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (a, b))
    return [*rows, {"layer": ALL, "depth": -1} | pair | {"angle": angle(*whole)}]


def linear_probes(
    model: nn.Module, data: Dataset, bits: Iterable[int], samples: int = 2000, batch_size: int = 500
) -> pd.DataFrame:
    """How much of the classes a linear classifier reads from each child's features: one row a pair of bit-widths.

    Columns: probe_bits, whose features of `samples` training images (augmented as in training) the classifier was
    fitted on; bits, whose features of the test images it reads; top1 (%). Features are the input of the network's last
    linear layer, (N, D), standardized; the classifier is ridge regression on one-hot classes. The model is left as it
    was. Needs scikit-learn. ValueError: not a converted network, bad bits, no linear layer.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    wanted = bit_widths("bits", bits)
    integer("samples", samples, 2)
    integer("batch_size", batch_size, 1)
    seen = {}
    with undisturbed(model, data, batch_size) as device:
        for b in wanted:
            with at_bits(model, b):
                train = _features(model, batches(data, "train", device, batch_size, samples))
                seen[b] = train, _features(model, batches(data, "test", device, batch_size))
    probes = {b: make_pipeline(StandardScaler(), RidgeClassifier()).fit(*train) for b, (train, _) in seen.items()}
    pairs = ((a, b) for a in wanted for b in wanted)
    return pd.DataFrame([{"probe_bits": a, "bits": b, "top1": 100 * probes[a].score(*seen[b][1])} for a, b in pairs])


def _features(model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple:
    """The inputs of the last linear layer (N, D) and the labels (N,), as arrays."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise invalid("model", type(model).__name__, "a network with a linear layer, whose input to read")
    kept, labels = [], []
    with linears[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().flatten(1).cpu())):
        for images, y in pairs:
            model(images)
            labels.append(y.cpu())
    if not labels:
        raise invalid("data", "no images", "at least one batch of images")
    return torch.cat(kept).numpy(), torch.cat(labels).numpy()
