"""What is measured in trained networks: weights, pre-activations, tokens, gradients and features.

The first functions measure one converted network at several `bits`, with `samples` augmented training images in batches
of `batch_size`, and leave it as it was. They return a tidy table, and raise a ValueError where an argument is wrong.
The last ones take a notebook's parameters and measure the networks of an experiment, of all seeds. They keep each table
beside the rows of its run.
"""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import combinations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import bit_widths, instance, integer, invalid, tensor
from ..convert import at_bits, converted, quantized_layers, set_bits
from ..correction import CORRECTIONS, correct_weight
from ..norms import MultiBitBatchNorm
from ..train.data import Dataset
from ..train.evaluate import Batches, batches, undisturbed
from . import experiments
from .profiles import Parameters
from .runs import Measure, Run, derived

SPAN, BINS = 6.0, 120  # a histogram's reach, in standard deviations on either side, and its number of bins
CENTERS = ((torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * SPAN / BINS) - SPAN).numpy().round(6)  # of bins
ALL = "all layers"


def weight_shift(model: nn.Module, bits: Iterable[int] = range(1, 9)) -> pd.DataFrame:
    """What quantization does to the mean and standard deviation of each layer's weight w, as the quantizer scales it.

    One row a bit-width, layer and correction: layer, bits, correction; mean_shift, the root mean square over output
    channels o of (mean_o(w_q) - mean_o(w)) / std_o(w); scale, the mean over o of std_o(w_q) / std_o(w).
    """
    rows = []
    for b in bit_widths("bits", bits):
        with at_bits(model, b), torch.no_grad():
            for name, layer in quantized_layers(model).items():
                w_q, w = layer.weight_and_domain()
                changes = {mode: _change(correct_weight(w_q, w, mode), w) for mode in CORRECTIONS}
                rows += [{"layer": name, "bits": b, "correction": m} | change for m, change in changes.items()]
    return pd.DataFrame(rows)


def _change(w_q: Tensor, w: Tensor) -> dict[str, float]:
    w_q, w = w_q.double().flatten(1), w.double().flatten(1)
    std = w.std(1).clamp_min(torch.finfo(torch.float32).tiny)
    shift = ((w_q.mean(1) - w.mean(1)) / std).square().mean().sqrt()
    return {"mean_shift": float(shift), "scale": float((w_q.std(1) / std).mean())}


class Watcher:
    """The input of one norm at one bit-width, standardized: moments of each of C channels, and a histogram.

    The histogram has `BINS` equal bins over [-SPAN, SPAN]; numbers beyond are counted in the outermost bins.
    """

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, 0.0, 0.0  # of each channel, in double precision
        self.size = 0.0  # the sum over a layer norm's tokens of the standard deviation of each
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in a batch norm's x (N, C, ...), or a layer norm's tokens (N, T, C), as a hook before its forward pass.

        A batch norm's input is standardized by the running statistics in force, a token by itself.
        """
        x = inputs[0].detach().float()
        if isinstance(norm, nn.LayerNorm):
            self.size += float(x.std(-1).double().sum())
            self.update(F.layer_norm(x, norm.normalized_shape).reshape(-1, x.shape[-1]))
        else:
            mean, var = (v.view(1, -1, *[1] * (x.dim() - 2)) for v in norm.statistics())
            self.update((x - mean) / (var + norm.eps).sqrt())

    def update(self, z: Tensor) -> None:
        """Take in a standardized batch (N, C, ...)."""
        flat = z.double().transpose(0, 1).flatten(1)
        self.n += flat.shape[1]
        self.total, self.squares = self.total + flat.sum(1), self.squares + flat.square().sum(1)
        self.counts += torch.histc(z.float().clamp(-SPAN, SPAN), BINS, -SPAN, SPAN).double().cpu()

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the biased variance, (C,) each."""
        mean = self.total / self.n
        return mean, self.squares / self.n - mean.square()

    def density(self) -> Tensor:
        """The fraction of all numbers in each of K bins, over its width: (K,)."""
        return self.counts / self.counts.sum() / (2 * SPAN / BINS)

    def wasserstein(self, other: "Watcher") -> float:
        """W1 = integral of |F - G| over the two distribution functions, to the width of a bin."""
        F, G = (w.counts.cumsum(0) / w.counts.sum() for w in (self, other))
        return float((F - G).abs().sum() * (2 * SPAN / BINS))


def _checked(bits: Iterable[int], samples: int, batch_size: int) -> tuple[int, ...]:
    integer("samples", samples, 2)
    integer("batch_size", batch_size, 1)
    return bit_widths("bits", bits)


def _watch(
    model: nn.Module, data: Dataset | Batches, bits: Iterable[int], kind: type[nn.Module], samples: int, batch_size: int
) -> dict[int, dict[str, Watcher]]:
    """At each bit-width, a watcher of each norm of one kind, by name, after the same training images."""
    wanted, seen = _checked(bits, samples, batch_size), {}
    with undisturbed(model, data, batch_size) as device:
        modules = {name: m for name, m in model.named_modules() if type(m) is kind}
        if not modules:
            norm = "layer norm" if kind is nn.LayerNorm else "batch norm"
            raise invalid("model", type(model).__name__, f"a network with {norm}")
        for b in wanted:
            seen[b] = {name: Watcher() for name in modules}
            with at_bits(model, b), ExitStack() as hooks:
                for name, module in modules.items():
                    hooks.enter_context(module.register_forward_pre_hook(seen[b][name]))
                for images, _ in batches(data, "train", device, batch_size, samples):
                    model(images)
            seen[b] = {name: watcher for name, watcher in seen[b].items() if watcher.n}  # not used in training alone
            if not seen[b]:
                raise invalid("data", "no images", "at least one batch of images")
    return seen


def preactivations(
    model: nn.Module, data: Dataset | Batches, bits: Iterable[int], samples: int = 2000, batch_size: int = 250
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far each bit-width's pre-activations are from what its batch norm assumes, in evaluation mode.

    A pre-activation is the input of a batch norm, standardized by the running statistics in force. If they fit, it has
    mean 0 and variance 1 in each channel.

    Returns:
        One row a layer and bit-width: layer, bits, mean_shift (root mean square over channels of the mean), variance
        (mean over channels), wasserstein (W1 to the distribution at the highest of `bits`, all channels together).
        And one row a layer, bit-width and bin of a histogram: layer, bits, z, density.
    """
    seen = _watch(model, data, bits, MultiBitBatchNorm, samples, batch_size)
    mismatch, histograms = [], []
    for b, watchers in seen.items():
        for name, watcher in watchers.items():
            where, (mean, var) = {"layer": name, "bits": b}, watcher.moments()
            row = {"mean_shift": float(mean.square().mean().sqrt()), "variance": float(var.mean())}
            mismatch.append(where | row | {"wasserstein": watcher.wasserstein(seen[max(seen)][name])})
            histograms.append(pd.DataFrame(where | {"z": CENTERS, "density": watcher.density().numpy().round(6)}))
    return pd.DataFrame(mismatch), pd.concat(histograms, ignore_index=True)


def moved_channel(model: nn.Module, data: Dataset | Batches, bits: Iterable[int], samples: int = 250) -> pd.DataFrame:
    """Weights and pre-activations of the output channel that the lowest of `bits` moves furthest.

    The distance is the shift of the channel's mean output between the highest and the lowest of `bits`, in standard
    deviations at the highest. The layer is the convolution with the largest root mean square distance over its
    channels. Of a `Dataset`, `samples` images go through the network at once; of an iterable, its first batch.

    Returns:
        One row a bit-width, 32 included, and weight: layer, channel, part ("weight"), bits, value. And one row a
        bit-width and bin of a histogram: part ("pre-activation"), bits, value (standardized at the highest of `bits`),
        density.
    """
    wanted, weights, outputs = _checked(bits, samples, samples), {}, {}
    if len(wanted) < 2:
        raise invalid("bits", wanted, "two bit-widths at least")
    with undisturbed(model, data, samples) as device:
        layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, nn.Conv2d)}
        if not layers:
            raise invalid("model", type(model).__name__, "a network with a quantized convolution")
        images = next((images for images, _ in batches(data, "train", device, samples, samples)), None)
        if images is None:
            raise invalid("data", "no images", "at least one batch of images")
        for b in wanted:
            with at_bits(model, b), ExitStack() as hooks:
                for name, layer in layers.items():
                    weights[name, b] = layer.weight_and_bias()[0]
                    kept = outputs.setdefault((name, b), [])
                    hooks.enter_context(layer.register_forward_hook(lambda *io, kept=kept: kept.append(io[2].double())))
                model(images)
        moments = {key: torch.std_mean(kept[-1], (0, 2, 3)) for key, kept in outputs.items() if kept}
        shifts = {}
        for name in dict.fromkeys(name for name, _ in moments):
            (_, low), (std, high) = moments[name, min(wanted)], moments[name, max(wanted)]
            shifts[name] = ((low - high) / std).nan_to_num(0, 0, 0)
        name = max(shifts, key=lambda n: float(shifts[n].square().mean()))
        channel = int(shifts[name].abs().argmax())
        std, mean = (found[channel] for found in moments[name, max(wanted)])
        chosen = {32: layers[name].weight_and_domain()[1]} | {b: weights[name, b] for b in wanted}
    tables = [
        pd.DataFrame({"part": "weight", "bits": b, "value": w[channel].flatten().double().cpu().numpy().round(6)})
        for b, w in chosen.items()
    ]
    for b in wanted:
        watcher = Watcher()
        watcher.update(((outputs[name, b][-1][:, channel].flatten() - mean) / std)[:, None])
        density = watcher.density().numpy().round(6)
        tables.append(pd.DataFrame({"part": "pre-activation", "bits": b, "value": CENTERS, "density": density}))
    return pd.concat(tables, ignore_index=True).assign(layer=name, channel=channel)


def layer_norms(
    model: nn.Module, data: Dataset | Batches, bits: Iterable[int], samples: int = 2000, batch_size: int = 250
) -> pd.DataFrame:
    """How far the tokens before each layer norm are from those at the highest bit-width.

    One row a layer and bit-width: layer, bits; size, the mean standard deviation of a token, as a ratio; and of
    normalized tokens mean_shift, the root mean square over features of the shift in standard deviations, and variance,
    the mean over features of the ratio.
    """
    seen = _watch(model, data, bits, nn.LayerNorm, samples, batch_size)
    rows = []
    for b, watchers in seen.items():
        for name, tokens in watchers.items():
            highest = seen[max(seen)][name]
            (mean, var), (mean_there, var_there) = tokens.moments(), highest.moments()
            shift = ((mean - mean_there) / var_there.sqrt()).square().mean().sqrt()
            row = {"layer": name, "bits": b, "size": tokens.size / highest.size}
            rows.append(row | {"mean_shift": float(shift), "variance": float((var / var_there).mean())})
    return pd.DataFrame(rows)


def angle(a: Tensor, b: Tensor) -> float:
    """The angle in degrees between two tensors of equal, any shape: 2 atan2(|u - v|, |u + v|) of their directions.

    Unlike the arc cosine it is exact for small angles. NaN where a tensor is zero. Source: Kahan 2006.
    """
    if tensor("a", a, "a tensor").shape != tensor("b", b, "a tensor").shape:
        raise invalid("b", tuple(b.shape), f"the shape of a, {tuple(a.shape)}")
    u, v = (x.double().flatten() / x.double().norm() for x in (a, b))
    return float(torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())))


def gradient_angles(
    model: nn.Module, data: Dataset, bits: Iterable[int], samples: int = 1000, batch_size: int = 250
) -> pd.DataFrame:
    """Angles between the gradients that the child models give to the weights they share, of the same cross entropy.

    The gradient is to the full-precision weight of each convolution and linear layer, with batch norm as in training.
    One row a layer and pair of bit-widths: layer (or `ALL`, all of them as one vector), depth (from 0; -1 for `ALL`),
    bits, other_bits, other_images, angle (degrees). Where bits and other_bits are equal, the second gradient is of as
    many other images: the angle that sampling alone makes.
    """
    wanted = _checked(bits, samples, integer("batch_size", batch_size, 2))
    converted(model)
    instance("data", data, Dataset, "a Dataset, for example load_dataset('cifar10')")
    if len(data.train.labels) < 2 * samples:
        raise invalid("samples", samples, f"at most half of the {len(data.train.labels)} training images")
    pairs = batches(data, "train", next(model.parameters()).device, batch_size, 2 * samples)
    images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if len(labels) == len(data.train.labels):  # all images come in their own order, which may be class by class
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
        images, labels = images[order], labels[order]
    parts = -(-samples // batch_size)  # of near-equal size: batch norm cannot take a last one of one image
    halves = zip(images.split(samples), labels.split(samples), strict=True)
    here, there = (list(zip(*(half.tensor_split(parts) for half in pair), strict=True)) for pair in halves)
    first = {b: _gradients(model, here, b) for b in wanted}
    rows = []
    for a, b in combinations(wanted, 2):
        rows += _angle_rows(first[a], first[b], {"bits": a, "other_bits": b, "other_images": False})
    for b in wanted:  # one at a time: each is as large as the network
        rows += _angle_rows(first[b], _gradients(model, there, b), {"bits": b, "other_bits": b, "other_images": True})
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


def _angle_rows(a: dict[str, Tensor], b: dict[str, Tensor], pair: dict[str, int | bool]) -> list[dict]:
    rows = [{"layer": name, "depth": i} | pair | {"angle": angle(a[name], b[name])} for i, name in enumerate(a)]
    whole = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (a, b))
    return [*rows, {"layer": ALL, "depth": -1} | pair | {"angle": angle(*whole)}]


def linear_probes(
    model: nn.Module, data: Dataset, bits: Iterable[int], samples: int = 2000, batch_size: int = 500
) -> pd.DataFrame:
    """How much of the classes a linear classifier reads from each child model's features. Needs scikit-learn.

    Features are the input of the network's last linear layer, (N, D), standardized. The classifier is ridge regression
    on one-hot classes. One row a pair of bit-widths: probe_bits, on whose features the classifier was fitted; bits,
    whose features of the test images it reads; top1 (%).
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    wanted, seen = _checked(bits, samples, batch_size), {}
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


def _each(runs: Iterable[Run], name: str, p: Parameters, measure: Measure, each_epoch: bool = False) -> pd.DataFrame:
    tables = [derived(run, name, p.results_dir, measure, each_epoch) for run in runs]
    found = pd.concat(tables, ignore_index=True)
    if found.data_sha256.nunique() > 1:
        raise invalid("results_dir", str(p.results_dir), f"tables {name!r} of the same images; delete the others")
    return found


def token_shifts(p: Parameters) -> pd.DataFrame:
    """`layer_norms` of ViTs trained on CIFAR-10 without and with weight bias correction, at the trained bit-widths."""
    starts = (experiments.vit_base(p, seed, "cifar10") for seed in p.seeds)
    runs = [experiments.ours(start, correction=name) for start in starts for name in ("none", "mean_var")]
    return _each(runs, "norms", p, lambda *net: layer_norms(*net, p.bits))


def distributions(p: Parameters) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Figure 3: `weight_shift` of networks trained without correction, and `preactivations` of those with it too."""
    runs = experiments.corrected_or_not(p)
    weights = _each(runs[::2], "weights", p, lambda net, _: weight_shift(net))
    mismatch = _each(runs, "mismatch", p, lambda *net: preactivations(*net, p.bits)[0])
    return weights, mismatch, _each(runs, "histograms", p, lambda *net: preactivations(*net, p.bits)[1])


def idea(p: Parameters) -> pd.DataFrame:
    """`moved_channel` of the quickstart's two networks, trained without and with weight bias correction."""
    return _each(experiments.quickstart(p), "channel", p, lambda *net: moved_channel(*net, p.bits))


def alignment(p: Parameters) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figure 4: `gradient_angles` before training and after each epoch, and `linear_probes` at the end.

    The networks are those of `experiments.transfer` that train all child models.
    """
    runs = [run for run in experiments.transfer(p) if run.spec.bits == p.bits]
    images = runs[0].subset[0]
    count = min(1000, images // 4) if images else 1000
    angles = _each(runs, "angles", p, lambda *net: gradient_angles(*net, p.bits, count), each_epoch=True)
    return angles, _each(runs, "probes", p, lambda *net: linear_probes(*net, p.bits))
