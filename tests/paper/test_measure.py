"""Moments and histograms against closed forms on Gaussians, and what is measured of a network against it by hand."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from scipy import stats
from test_measure_gradients import BITS, data, trained
from torch import Tensor, nn

import emqlib as emq
from emqlib import models
from emqlib.norms import MultiBitBatchNorm
from emqlib.paper import measure
from emqlib.paper.measure import BINS, SPAN, Watcher, layer_norms, moved_channel, preactivations, weight_shift
from emqlib.paper.profiles import parameters
from emqlib.train.data import Dataset, augment, normalize

pytestmark = pytest.mark.processor

fixture = data  # for this module too
WIDTH = 2 * SPAN / BINS


def normal(mean: float, std: float, n: int = 20000) -> Tensor:
    """The n mid-quantiles of a normal distribution: a sample without noise."""
    return torch.tensor([NormalDist(mean, std).inv_cdf((i + 0.5) / n) for i in range(n)])


def watched(*parts: Tensor) -> Watcher:
    made = Watcher()
    for part in parts:
        made.update(part if part.dim() > 1 else part[:, None])
    return made


@pytest.fixture(scope="module")
def model(data: Dataset) -> nn.Module:
    return trained(data)


# Streaming


@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 4), (50, 3, 2, 5)])
def test_moments_of_parts_are_those_of_all(shape: tuple[int, ...], rng: torch.Generator) -> None:
    x = 100 + torch.randn(shape, generator=rng) * torch.tensor([0.1, 1, 30]).view(1, 3, *[1] * (len(shape) - 2))
    watcher = watched(*x.split([7, 30, 1, 12]))
    mean, var = watcher.moments()
    columns = x.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(mean.numpy(), columns.mean(1), rtol=1e-6)
    np.testing.assert_allclose(var.numpy(), columns.var(1), rtol=1e-4)
    assert watcher.n == columns.shape[1]


def test_a_histogram_is_the_density() -> None:
    """Of a normal distribution to its formula; what lies beyond the ends is in the last bins."""
    centers = (torch.arange(BINS) + 0.5) * WIDTH - SPAN
    expected = [NormalDist(0.5, 1.5).pdf(float(z)) for z in centers]
    found = watched(*normal(0.5, 1.5).split(777)).density()
    assert found.sum() * WIDTH == pytest.approx(1)
    torch.testing.assert_close(found[1:-1], torch.tensor(expected).double()[1:-1], atol=2e-3, rtol=0.02)
    ends = watched(torch.tensor([-100.0, -SPAN, 0.01, SPAN, 7.0])).counts
    assert ends[0] == 2 and ends[-1] == 2 and ends.sum() == 5


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0.0, 1.0), (0.0, 1.0), 0.0),
        ((0.0, 1.0), (0.7, 1.0), 0.7),
        ((-1.0, 0.5), (0.25, 0.5), 1.25),
        ((0.2, 1.0), (0.2, 1.5), 0.5 * math.sqrt(2 / math.pi)),
    ],
)
def test_wasserstein_of_normal_distributions(one: tuple, other: tuple, expected: float) -> None:
    """|m - m'| at equal standard deviations, |s - s'| sqrt(2 / pi) at equal means."""
    found = watched(normal(*one)).wasserstein(watched(normal(*other)))
    assert found == pytest.approx(expected, abs=0.02 * WIDTH + 1e-3)


def test_mismatch_of_a_normal_input_is_the_closed_form() -> None:
    """Input N(m, s^2) into a norm that assumes N(m', s'^2): mean (m - m') / s', variance (s / s')^2."""
    norm = MultiBitBatchNorm(nn.BatchNorm1d(2, eps=0.0), emq.QuantSpec(bits=BITS)).eval()
    norm.running_mean[:], norm.running_var[:] = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.25])
    watcher = Watcher()
    for part in torch.stack([normal(2.0, 1.0), normal(-1.0, 1.0)], 1).split(999):
        watcher(norm, (part,))
    mean, var = watcher.moments()
    torch.testing.assert_close(mean, torch.tensor([0.5, 0.0]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(var, torch.tensor([0.25, 4.0]).double(), atol=5e-3, rtol=0)


# Weights


def test_weight_shift(model: nn.Module) -> None:
    """Against loops over channels in float64; the correction is what makes mean_shift 0 and scale 1."""
    table = weight_shift(model, BITS)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "weight_and_bias")}
    assert list(table.columns) == ["layer", "bits", "correction", "mean_shift", "scale"]
    assert len(table) == len(layers) * 3 * 3 and list(table.bits) == sorted(table.bits)
    for row in table[table.correction == "none"].itertuples():
        w = layers[row.layer].weight.detach().numpy()
        w_q, domain = (reference.dorefa_weight(w, b)[0] for b in (row.bits, 32))
        shifts, scales = [], []
        for o in range(len(w)):
            std = domain[o].std(ddof=1)
            shifts.append(((w_q[o].mean() - domain[o].mean()) / std) ** 2)
            scales.append(w_q[o].std(ddof=1) / std)
        assert row.mean_shift == pytest.approx(math.sqrt(np.mean(shifts)), rel=1e-3, abs=1e-6)
        assert row.scale == pytest.approx(np.mean(scales), rel=1e-3)
    assert table.mean_shift[table.correction != "none"].max() < 1e-5
    assert (table.scale[(table.correction == "mean_var") & (table.bits > 1)] - 1).abs().max() < 1e-4
    assert emq.summary(model).bits.isin([8, 32]).all()


# Pre-activations


def test_preactivations_are_those_seen_by_hand(model: nn.Module, data: Dataset) -> None:
    mismatch, histograms = preactivations(model, data, BITS, samples=60, batch_size=25)
    name, norm = "layer2.0.bn1", model.get_submodule("layer2.0.bn1")
    images = normalize(augment(data.train.images, data, torch.Generator().manual_seed(0)), data)
    seen: dict[int, Tensor] = {}
    model.eval()
    for b in BITS:
        with emq.at_bits(model, b), torch.no_grad():
            kept: list[Tensor] = []
            hook = norm.register_forward_pre_hook(lambda m, inputs, kept=kept: kept.append(inputs[0]))
            model(images)
            hook.remove()
            mean, var = norm.running_mean[-1], norm.running_var[-1]
            seen[b] = (kept[0].double() - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + norm.eps).sqrt()
    for b, z in seen.items():
        row = mismatch[(mismatch.layer == name) & (mismatch.bits == b)].iloc[0]
        assert row["mean_shift"] == pytest.approx(float(z.mean((0, 2, 3)).square().mean().sqrt()), rel=1e-3, abs=1e-4)
        assert row.variance == pytest.approx(float(z.var((0, 2, 3), correction=0).mean()), rel=1e-3)
        exact = stats.wasserstein_distance(*(x.clamp(-SPAN, SPAN).flatten().numpy() for x in (z, seen[8])))
        assert row.wasserstein == pytest.approx(exact, abs=WIDTH / 2)
        part = histograms[(histograms.layer == name) & (histograms.bits == b)]
        counts = torch.histc(z.float().clamp(-SPAN, SPAN), BINS, -SPAN, SPAN)
        torch.testing.assert_close(
            torch.tensor(part.density.to_numpy()) * z.numel() * WIDTH, counts.double(), rtol=1e-3, atol=2
        )
    assert len(mismatch) == 3 * len([m for m in model.modules() if isinstance(m, MultiBitBatchNorm)])


def test_the_channel_moved_furthest_is_the_one_found_by_hand(model: nn.Module, data: Dataset) -> None:
    rows = moved_channel(model, data, BITS, samples=len(data.train.labels))
    images = normalize(augment(data.train.images, data, torch.Generator().manual_seed(0)), data)
    convolutions = {name: m for name, m in model.named_modules() if type(m).__name__ == "QuantConv2d"}
    moved, outputs = {}, {}
    for name, layer in convolutions.items():
        for b in BITS:
            kept: list[Tensor] = []
            with emq.at_bits(model.eval(), b), torch.no_grad():
                hook = layer.register_forward_hook(lambda m, x, y, kept=kept: kept.append(y.double()))
                model(images)
                hook.remove()
            outputs[name, b] = kept[0].transpose(0, 1).flatten(1)
        high = outputs[name, BITS[-1]]
        moved[name] = (outputs[name, BITS[0]].mean(1) - high.mean(1)).abs() / high.std(1)
    (name,), (channel,) = rows.layer.unique(), rows.channel.unique()
    assert name == max(moved, key=lambda n: moved[n].norm() / len(moved[n]) ** 0.5)
    assert channel == moved[name].argmax()
    low, high = outputs[name, BITS[0]][channel], outputs[name, BITS[-1]][channel]
    curve = rows[rows.part.eq("pre-activation") & rows.bits.eq(BITS[0])]
    assert curve.density.sum() * WIDTH == pytest.approx(1, abs=1e-4)
    expected = float(((low - high.mean()) / high.std()).clamp(-SPAN, SPAN).mean())
    assert (curve.value * curve.density).sum() * WIDTH == pytest.approx(expected, abs=WIDTH)
    weights = rows[rows.part == "weight"].groupby("bits").value
    assert [*weights.groups] == [*BITS, 32]
    full = convolutions[name].weight_and_domain()[1][channel].flatten().detach()
    np.testing.assert_allclose(weights.get_group(32), full, atol=1e-6)
    assert weights.nunique()[2] <= 4 and weights.mean()[2] == pytest.approx(weights.mean()[32], abs=1e-5)


class WithAuxiliaryHead(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.auxiliary, self.body = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (self.auxiliary(x).mean((2, 3)) if self.training else 0)


def test_what_is_used_in_training_alone_is_left_out(model: nn.Module, data: Dataset) -> None:
    spec = emq.QuantSpec(bits=BITS, full_precision=())
    both = emq.convert(WithAuxiliaryHead(models.resnet8(10, width=4)), spec)
    mismatch, _ = preactivations(both, data, BITS, samples=20)
    assert mismatch.layer.str.startswith("body.").all() and len(mismatch)
    assert moved_channel(both, data, BITS, samples=20).layer.str.startswith("body.").all()


def test_statistics_of_the_bit_width_fit_and_shared_ones_do_not(model: nn.Module, data: Dataset) -> None:
    shared, _ = preactivations(model, data, BITS)
    adapted = copy.deepcopy(model)
    emq.adapt_norm(adapted, data, BITS, batch_size=60)
    own, _ = preactivations(adapted, data, BITS)
    for part, near in ((own, 0.05), (shared, 1e9)):
        assert part["mean_shift"].max() < near
    assert own["mean_shift"].max() < 0.2 * shared["mean_shift"].max() and (own.variance - 1).abs().max() < 0.2


def test_nothing_is_left_behind_when_the_data_fail_on_the_way(model: nn.Module) -> None:
    """No hook, no mode, no bit-width. What is left where nothing fails: test_measure_gradients."""

    def failing() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.rand(5, 3, 8, 8), torch.zeros(5)
        raise RuntimeError("no more")

    class Pairs:
        __iter__ = staticmethod(failing)

    model.train()
    emq.set_bits(model, 4)
    with pytest.raises(RuntimeError, match="no more"):
        preactivations(model, Pairs(), BITS)
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert {m.bits for m in model.modules() if isinstance(m, MultiBitBatchNorm)} == {4}


def test_tokens_before_layer_norm_are_those_seen_by_hand(data: Dataset) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.vit_tiny(10, patch_size=16, width=16, depth=2, heads=2)
    transformer = emq.convert(net, emq.QuantSpec(bits=BITS, weight="minmax")).eval()
    transformer(normalize(data.train.images, data))  # input ranges start here
    pairs = [(normalize(data.test.images[i : i + 10], data), data.test.labels[i : i + 10]) for i in (0, 10, 20)]
    table = layer_norms(transformer, pairs, BITS, batch_size=10).set_index(["layer", "bits"])
    assert len(table) == 3 * 5 and (table.xs(8, level="bits")[["size", "variance"]] - 1).abs().max().max() < 1e-6
    kept: dict[int, Tensor] = {}
    last = transformer.get_submodule("encoder.ln")
    for b in (2, 8):
        with torch.no_grad(), emq.at_bits(transformer, b):
            inputs: list[Tensor] = []
            hook = last.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
            for images, _ in pairs:
                transformer(images)
            hook.remove()
            kept[b] = torch.cat(inputs).double().flatten(0, 1)
    z = {
        b: (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for b, x in kept.items()
    }
    row = table.loc["encoder.ln", 2]
    std = z[8].std(0, correction=0)
    assert row["size"] == pytest.approx(float(kept[2].std(1).mean() / kept[8].std(1).mean()), rel=1e-4)
    shift = ((z[2].mean(0) - z[8].mean(0)) / std).square().mean().sqrt()
    assert row.mean_shift == pytest.approx(float(shift), rel=1e-3) and row.mean_shift > 0.01
    assert row.variance == pytest.approx(float((z[2].var(0) / z[8].var(0)).mean()), rel=1e-3)


def test_networks_of_other_images_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = iter([pd.DataFrame({"value": [1.0], "data_sha256": [sha256]}) for sha256 in ("a", "a", "b")])
    monkeypatch.setattr(measure, "derived", lambda *_: next(tables))
    monkeypatch.setattr(measure.experiments, "quickstart", lambda p: range(p.repeats))
    assert len(measure.idea(parameters(results_dir=tmp_path, repeats=1))) == 1
    with pytest.raises(ValueError, match=r"^results_dir=.*expected tables 'channel' of the same images"):
        measure.idea(parameters(results_dir=tmp_path, repeats=2))
