"""Angles against closed forms, gradients against autograd on the images seen, probes against ridge regression."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import emqlib as emq
from emqlib import models
from emqlib.norms import MultiBitBatchNorm
from emqlib.paper.measure import ALL, angle, gradient_angles, linear_probes, preactivations, weight_shift
from emqlib.train.data import Dataset, Split, augment, normalize

pytestmark = pytest.mark.processor

BITS = (2, 4, 8)
LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0"]
LAYERS += ["layer3.0.conv1", "layer3.0.conv2", "layer3.0.shortcut.0", "fc"]
SPECS = {
    "shared": {},
    "own, output correction": {"norm": "shared_affine", "output_correction": True},
    "tracked": {"activation_range": "tracked"},
}

Seen = dict[int, list[Tensor]]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return emq.load_dataset("digits").subset(60, 30)


def trained(data: Dataset, **fields: object) -> nn.Module:
    """Three bit-widths that took a few steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = emq.convert(models.resnet8(width=4), emq.QuantSpec(**{"bits": BITS} | fields))
    emq.train(made, data, emq.TrainConfig(epochs=2, batch_size=20), progress=False)
    return made


@pytest.fixture(scope="module")
def networks(data: Dataset) -> dict[str, nn.Module]:
    return {name: trained(data, **fields) for name, fields in SPECS.items()}


@pytest.fixture(scope="module")
def model(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["shared"]


def without_batch_norm() -> nn.Module:
    """The same gradient however the images are dealt out to batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = [m for i, o in ((192, 20), (20, 20)) for m in (nn.Linear(i, o), nn.ReLU())]
        net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), *hidden, nn.Linear(20, 10))
    return emq.convert(net, emq.QuantSpec(bits=BITS, activation_range="unit"))


def bits_of(model: nn.Module) -> int:
    (bits,) = {m.bits for m in model.modules() if hasattr(m, "bits")}
    return bits


def watched(model: nn.Module) -> tuple[nn.Module, Seen]:
    """A copy that tells what images went through it at each bit-width; so do the copies made of it."""
    seen: Seen = {}
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda m, inputs: seen.setdefault(bits_of(m), []).append(inputs[0]))
    return model, seen


def places(data: Dataset, images: Tensor) -> list[int]:
    """Which training image each of these normalized ones (N, 3, H, W) is, shifted by up to the padding."""
    pad, (height, width) = data.crop_padding, data.train.images.shape[2:]
    padded = np.pad(data.train.images[:, 0].numpy(), [(0, 0), (pad, pad), (pad, pad)])
    known = {}
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        crops = padded[:, top : top + height, left : left + width]
        known |= {crop.tobytes(): i for i, crop in enumerate(crops)}
    pixels = 255 * (images.double().numpy()[:, 0] * data.std[0] + data.mean[0])
    return [known[image.round().astype(np.uint8).tobytes()] for image in pixels]


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.acos(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))))


def gradients(model: nn.Module, data: Dataset, batches: list[Tensor], bits: int) -> dict[str, np.ndarray]:
    """By autograd, of the mean of -log p(label), in training mode; the last entry is that of all layers."""
    model = copy.deepcopy(model).train()
    emq.set_bits(model, bits)
    loss: Tensor | float = 0.0
    for images in batches:
        logits = model(images)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = loss - sum(p[i, data.train.labels[j]].log() for i, j in enumerate(places(data, images)))
    found = torch.autograd.grad(loss / sum(map(len, batches)), [model.get_submodule(name).weight for name in LAYERS])
    arrays = [g.double().flatten().numpy() for g in found]
    return dict(zip([*LAYERS, ALL], [*arrays, np.concatenate(arrays)], strict=True))


# Angles


@pytest.mark.parametrize("shape", [(), (2,), (3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("wanted", [0.0, 1e-6, 60.0, 90.0, 135.0, 180 - 1e-6, 180.0])
def test_the_angle_of_rotated_vectors_is_the_rotation(wanted: float, shape: tuple[int, ...]) -> None:
    """Of any length and shape; a millionth of a degree has the cosine 1 - 2e-16, from which no arc cosine recovers."""
    turn = math.radians(wanted)
    a, b = torch.zeros(2, *shape, dtype=torch.float64), torch.zeros(2, *shape, dtype=torch.float64)
    a[0], b[0], b[1] = 3.0, 0.2 * math.cos(turn), 0.2 * math.sin(turn)
    assert angle(a, b) == pytest.approx(wanted, rel=1e-7, abs=1e-12)
    assert angle(b, a) == pytest.approx(wanted, rel=1e-7, abs=1e-12)


def test_a_zero_vector_has_no_angle() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert all(math.isnan(angle(*pair)) for pair in ((zero, one), (one, zero), (zero, zero)))
    assert angle(one, one) == 0 and angle(one, -one) == 180


# Gradients


@pytest.mark.parametrize("name", ["shared", "own, output correction"])
def test_gradient_angles_are_those_of_autograd(name: str, networks: dict[str, nn.Module], data: Dataset) -> None:
    model, seen = watched(networks[name])
    table = gradient_angles(model, data, (8, 2, 4), samples=20, batch_size=10)
    assert list(table.columns) == ["layer", "depth", "bits", "other_bits", "other_images", "angle"]
    expected = {}
    for b in BITS:
        first, second = seen[b][:2], seen[b][2:]
        assert [len(batch) for batch in seen[b]] == [10] * 4
        for part, other in ((first, False), (second, True)):
            expected[b, other] = gradients(networks[name], data, part, b)
    assert not table.duplicated(["layer", "bits", "other_bits", "other_images"]).any()
    pairs = [(2, 4, False), (2, 8, False), (4, 8, False), (2, 2, True), (4, 4, True), (8, 8, True)]
    assert len(table) == len(pairs) * (len(LAYERS) + 1)
    for a, b, other in pairs:
        part = table[(table.bits == a) & (table.other_bits == b) & (table.other_images == other)]
        assert dict(zip(part.layer, part.depth, strict=True)) == {n: i for i, n in enumerate(LAYERS)} | {ALL: -1}
        for row in part.itertuples():
            wanted = degrees(expected[a, False][row.layer], expected[b, other][row.layer])
            assert row.angle == pytest.approx(wanted, abs=1e-2)
    assert table.angle[table.layer == ALL].between(1, 179).all()


def test_other_images_are_other_images(model: nn.Module, data: Dataset) -> None:
    """All bit-widths see the same ones, shifted as in training; none is in both halves."""
    network, seen = watched(model)
    gradient_angles(network, data, BITS, samples=20, batch_size=10)
    assert all(torch.equal(torch.cat(seen[b]), torch.cat(seen[8])) for b in BITS)
    images = torch.cat(seen[8])
    found = places(data, images)
    assert len(set(found)) == 40
    plain = normalize(data.train.images, data)[found]
    moved = (images - plain).abs().amax((1, 2, 3)) > 0.1
    assert 20 < int(moved.sum()) < 40


@pytest.mark.parametrize("batch_size", [30, 15, 10, 8, 7])
def test_each_gradient_is_of_as_many_images_however_they_are_dealt_out(batch_size: int, data: Dataset) -> None:
    """The mean over 15 images is the same in batches of 15 and of 7."""
    network = without_batch_norm()
    whole = gradient_angles(network, data, BITS, samples=15, batch_size=15)
    found = gradient_angles(network, data, BITS, samples=15, batch_size=batch_size)
    np.testing.assert_allclose(found.angle, whole.angle, atol=1e-2)


def test_halves_of_all_images_are_of_all_classes(data: Dataset) -> None:
    """Data sets lie class by class; the second gradient is to be of other images, not of other digits."""
    order = data.train.labels.argsort(stable=True)
    lying = replace(data, train=Split(data.train.images[order], data.train.labels[order]))
    network, seen = watched(without_batch_norm())
    gradient_angles(network, lying, (8,), samples=30, batch_size=30)
    for part in seen[8]:
        assert len({int(lying.train.labels[i]) for i in places(lying, part)}) >= 8


@pytest.mark.parametrize("name", SPECS)
def test_an_angle_does_not_depend_on_what_else_is_asked(
    name: str, networks: dict[str, nn.Module], data: Dataset
) -> None:
    """What follows the data in training mode must not carry over from one bit-width to the next."""
    few = gradient_angles(networks[name], data, (4, 8), samples=20)
    many = gradient_angles(networks[name], data, (1, 2, 4, 8), samples=20)
    many = many[(many.bits >= 4) & (many.other_bits >= 4)]
    np.testing.assert_allclose(many.angle, few.angle, atol=1e-2)


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    """How many hooks each module has."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def left_as_it_was(model: nn.Module, call: Callable[[nn.Module], object]) -> None:
    """At 4 bits, with a layer in evaluation mode, one weight's gradient and no other's."""
    model = copy.deepcopy(model).train()
    emq.set_bits(model, 4)
    model.layer2.eval()
    model.fc.weight.grad = torch.full_like(model.fc.weight, 3.0)
    state, training, own = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], hooks(model)
    norms = [m for m in model.modules() if isinstance(m, MultiBitBatchNorm)]
    before = [torch.stack(m.statistics()) for m in norms]
    call(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == training and bits_of(model) == 4
    assert all(torch.equal(torch.stack(m.statistics()), kept) for m, kept in zip(norms, before, strict=True))
    assert bool((model.fc.weight.grad == 3).all())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert all(p.requires_grad for p in model.parameters())
    assert hooks(model) == own


def few_preactivations(model: nn.Module, data: Dataset, bits: tuple[int, ...], samples: int) -> None:
    weight_shift(model, bits)
    preactivations(model, data, bits, samples=samples)


@pytest.mark.parametrize("measure", [few_preactivations, gradient_angles, linear_probes])
@pytest.mark.parametrize("name", SPECS)
def test_the_network_is_left_as_it_was(
    name: str, measure: Callable[..., object], networks: dict[str, nn.Module], data: Dataset
) -> None:
    left_as_it_was(networks[name], lambda net: measure(net, data, (2, 8), samples=10))


# Probes


def ridge(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class of each of `test` (M, D): least squares to -1 and +1 plus |w|^2, the intercept without penalty."""
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1
    x, classes = (train - mean) / std, np.unique(labels)
    y = np.where(labels[:, None] == classes, 1.0, -1.0)
    ones = np.ones((len(x), 1))
    penalty = np.diag([*np.ones(x.shape[1]), 0.0])
    design = np.hstack([x, ones])
    w = np.linalg.solve(design.T @ design + penalty, design.T @ y)
    return classes[(np.hstack([(test - mean) / std, np.ones((len(test), 1))]) @ w).argmax(1)]


def features(model: nn.Sequential, images: Tensor, bits: int) -> np.ndarray:
    """What comes out of all layers but the last, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    emq.set_bits(model, bits)
    with torch.no_grad():
        return model[:-1](images).double().numpy()


@pytest.mark.parametrize("name", [*SPECS, "three linear layers"])
def test_probes_are_ridge_regressions(name: str, networks: dict[str, nn.Module], data: Dataset) -> None:
    network = networks[name] if name in networks else without_batch_norm()
    table = linear_probes(network, data, (8, 2, 3), samples=60, batch_size=25)
    assert list(table.columns) == ["probe_bits", "bits", "top1"]
    train = normalize(augment(data.train.images, data, torch.Generator().manual_seed(0)), data)
    test = normalize(data.test.images, data)
    expected = {}
    for a, b in itertools.product((2, 3, 8), repeat=2):
        found = ridge(features(network, train, a), data.train.labels.numpy(), features(network, test, b))
        expected[a, b] = 100 * (found == data.test.labels.numpy()).mean()
    found = {(row.probe_bits, row.bits): row.top1 for row in table.itertuples()}
    assert len(table) == 9 and found == pytest.approx(expected)
    assert len(set(expected.values())) > 2 and max(expected.values()) >= 20  # twice what chance gives


def test_a_probe_is_fitted_on_so_many_images(model: nn.Module, data: Dataset) -> None:
    """The same random ones at each bit-width, with their own labels; the test images are all there, as they are."""
    network, seen = watched(model)
    table = linear_probes(network, data, (2, 8), samples=40, batch_size=20)
    assert [len(images) for images in seen[8]] == [20, 20, 15, 15]
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[8], strict=True))
    train, test = torch.cat(seen[8][:2]), torch.cat(seen[8][2:])
    torch.testing.assert_close(test, normalize(data.test.images, data))
    found = places(data, train)
    assert len(set(found)) == 40
    guesses = ridge(features(model, train, 2), data.train.labels[found].numpy(), features(model, test, 8))
    wanted = 100 * (guesses == data.test.labels.numpy()).mean()
    assert table.top1[(table.probe_bits == 2) & (table.bits == 8)].item() == pytest.approx(wanted)
