"""Data of one's own: tensors, torchvision's and HuggingFace's datasets, in training, evaluation and adaptation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

import emqlib as emq
from emqlib import Dataset
from emqlib.train.data import Streamed, loader, normalize

CPU = torch.device("cpu")
SPEC = emq.QuantSpec(bits=(2, 8))
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
TARGETS = np.arange(24) % 3


def head(width: int) -> list[nn.Module]:
    hidden = [nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return [nn.Flatten(), *hidden, nn.Linear(8, 3)]


def network(*layers: nn.Module, width: int) -> nn.Module:
    net = nn.Sequential(*layers, *head(width))
    torch.manual_seed(0)
    net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    return emq.convert(net, SPEC)


def pictures() -> nn.Module:
    """Of grey images (N, 1, 8, 8)."""
    return network(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), width=64)


INPUTS: dict[str, tuple[Tensor, Callable[[], nn.Module]]] = {
    "grey images": (torch.from_numpy(IMAGES), pictures),
    "five channels": (torch.randn(24, 5, 6, 6) * 3 + 7, lambda: network(nn.Conv2d(5, 4, 3), nn.ReLU(), width=64)),
    "signals": (
        torch.randn(24, 2, 16) * 9,
        lambda: network(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), width=56),
    ),
    "vectors": (torch.randn(24, 6).double() - 4, lambda: network(width=6)),
    "volumes": (torch.randn(24, 1, 4, 4, 4), lambda: network(nn.Conv3d(1, 4, 3), nn.ReLU(), width=32)),
}


def fitted(model: nn.Module, data: Any, **config: Any) -> list[Tensor]:
    """The parameters after two epochs on coresets."""
    coreset = emq.CoresetConfig(score="el2n", pruning_rate=0.5)
    config = {"epochs": 2, "batch_size": 6, "lr": 0.05, "coreset": coreset} | config
    emq.train(model, data, emq.TrainConfig(**config), progress=False)
    return [p.detach() for p in model.parameters()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Tensors


@pytest.mark.parametrize("name", INPUTS)
def test_any_input_that_the_network_takes_is_trained_on_and_evaluated(name: str) -> None:
    inputs, make = INPUTS[name]
    data = Dataset.from_tensors(inputs[:18], TARGETS[:18], inputs[18:], TARGETS[18:].tolist())
    first = inputs[:18].double().transpose(0, 1).flatten(1) / (255 if name == "grey images" else 1)
    assert data.mean == pytest.approx(first.mean(1).tolist()) and data.classes == ("0", "1", "2")
    assert data.std == pytest.approx(first.std(1, correction=0).tolist())
    shown = normalize(data.train.images, data).double().transpose(0, 1).flatten(1)
    assert shown.mean(1).abs().max() < 1e-5 and (shown.std(1, correction=0) - 1).abs().max() < 1e-5
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    assert not same(fitted(model, data), before)
    table = emq.evaluate(model, data, bits=(2, 3, 8))
    assert table.n.tolist() == [6] * 3 and table.loss.notna().all()
    emq.adapt_norm(model, data, bits=(3,), batch_size=9)
    assert model.emq.data == data.about()


class View(nn.Flatten):
    """As many networks are written."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def test_a_network_that_calls_view_is_told_of_channels_last() -> None:
    model = emq.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), View(), nn.Linear(64, 3)), SPEC)
    data = Dataset.from_tensors(IMAGES, TARGETS)
    with pytest.raises(ValueError, match=r"^channels_last=True: expected False, as the network calls view"):
        fitted(model, data)
    fitted(model, data, channels_last=False)


def test_digits_as_tensors_of_ones_own_end_with_the_very_weights() -> None:
    digits = emq.load_dataset("digits").subset(120, 30)
    own = Dataset.from_tensors(
        digits.train.images.numpy(),
        digits.train.labels.int(),
        digits.test.images,
        digits.test.labels,
        **{name: getattr(digits, name) for name in ("mean", "std", "crop_padding", "classes", "flip", "name")},
    )
    assert own.sha256 == digits.sha256 and own.about() == digits.about()
    weights = []
    for data in (digits, own):
        torch.manual_seed(0)
        weights.append(fitted(emq.convert(emq.models.resnet8(10, width=4), SPEC), data, batch_size=32))
    assert same(*weights)
    whole = emq.load_dataset("digits")
    found = Dataset.from_tensors(whole.train.images, whole.train.labels)
    assert (found.mean, found.std) == (whole.mean, whole.std)  # of the training images, where they are not given


def test_tensors_are_augmented_only_where_that_is_asked_for() -> None:
    def shown(**asked: Any) -> Tensor:
        data = Dataset.from_tensors(IMAGES, TARGETS, mean=[0], std=[1], **asked)
        ((images, _, _),) = loader(data, "train", CPU).epoch([torch.arange(24)], torch.Generator().manual_seed(0))
        return images

    plain = torch.from_numpy(IMAGES) * (1 / torch.tensor(255.0))
    assert torch.equal(shown(), plain)
    flipped = shown(flip=True)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, plain, strict=True)]
    assert 0 < sum(mirrored) < 24 and not torch.equal(shown(crop_padding=1), plain)


def test_a_constant_channel_and_great_numbers_can_be_normalized() -> None:
    inputs = torch.stack([torch.full((50,), 7.0), 1e6 + torch.randn(50)], 1)
    data = Dataset.from_tensors(inputs, [0, 1] * 25)
    found = normalize(data.train.images, data)
    exact = (inputs[:, 1].double() - data.mean[1]) / data.std[1]
    assert data.std[0] == 1 and not found[:, 0].any() and (found[:, 1] - exact).abs().max() < 0.1
    flat = Dataset.from_tensors(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), [0, 1])
    assert flat.mean == pytest.approx([0.2]) and flat.std == (1,)
    assert normalize(flat.train.images, flat).abs().max() < 1e-6


# Map-style datasets


class Pictures(torch.utils.data.Dataset):
    """Grey images with random transforms: of torchvision, which draws from PyTorch, and of NumPy's own generator."""

    targets = TARGETS.tolist()
    transform = v2.Compose([v2.ToImage(), v2.RandomCrop(8, padding=1), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(IMAGES[index].transpose(1, 2, 0))
        return image + float(np.random.rand()), self.targets[index]


def test_random_transforms_draw_the_same_with_and_without_workers() -> None:
    found = []
    for workers in (0, 2):
        data = Dataset.from_dataset(Pictures(), Pictures(), num_workers=workers)
        model = pictures()
        found.append([*fitted(model, data), torch.tensor(emq.evaluate(model, data, bits=(2, 8)).loss)])
    assert same(*found)
    numpy_state, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    chunks, again = [torch.arange(8)] * 2, torch.Generator().manual_seed(1)
    first, second = (images for images, *_ in loader(data, "train", CPU).epoch(chunks, again))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert not torch.equal(first, second)  # each time that a sample is shown it is drawn anew


def test_a_map_style_dataset_is_given_directly() -> None:
    plain = Subset(Pictures(), range(12))
    model, twin = pictures(), pictures()
    assert same(fitted(model, plain), fitted(twin, Dataset.from_dataset(plain)))
    expected = emq.evaluate(twin, Dataset.from_dataset(plain, plain), bits=(2, 8))
    assert emq.evaluate(model, plain, bits=(2, 8)).equals(expected) and expected.n.tolist() == [12, 12]
    emq.adapt_norm(model, plain, bits=(3,))
    emq.adapt_norm(twin, Dataset.from_dataset(plain), bits=(3,))
    assert same(list(model.buffers()), list(twin.buffers()))
    with pytest.raises(ValueError, match=r"^adapt_norm=True: expected a Dataset as data"):
        emq.evaluate(model, plain, bits=(2,), adapt_norm=True)
    with pytest.raises(ValueError, match=r"^data='no images': expected at least one image in test"):
        emq.evaluate(model, Dataset.from_dataset(plain))


class Unread(Pictures):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise AssertionError("an item was read")


class Counted(Pictures):
    """Labels that only items tell: (input, label), or dicts."""

    targets = None

    def __init__(self, names: tuple[str, str] | None = None) -> None:
        self.names, self.read = names, 0

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        pair = (IMAGES[index], torch.tensor(TARGETS[index]))
        return pair if self.names is None else dict(zip(self.names, pair, strict=True))


def test_labels_are_read_without_items_where_the_dataset_tells_them(tmp_path: Path) -> None:
    assert Streamed.of(Subset(Unread(), [5, 1]), 0).labels.tolist() == [2, 1]
    for i in range(6):
        place = tmp_path / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[i, 0]).save(place)
    folders = ImageFolder(tmp_path, transform=v2.ToImage())
    assert Streamed.of(folders, 0).labels.tolist() == [0, 0, 0, 1, 1, 1]
    other = ImageFolder(tmp_path, transform=v2.ToImage(), target_transform=lambda label: 1 - label)
    assert Streamed.of(other, 0).labels.tolist() == [1, 1, 1, 0, 0, 0]
    for names in (None, ("image", "label"), ("pixel_values", "labels")):
        items = Counted(names)
        split = Streamed.of(items, 0)
        assert split.labels.tolist() == TARGETS.tolist() and items.read == 24
        assert torch.equal(split[None, 0, np.array([5])][1], torch.from_numpy(IMAGES[5:6]))
    assert Streamed.of(TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 1])), 0).labels.tolist() == [0, 1, 1]


def test_what_is_said_of_a_map_style_dataset() -> None:
    data = Dataset.from_dataset(Counted(), name="grey", classes=["a", "b", "c", "d"])
    assert data.about() == {"name": "grey", "sha256": data.sha256, "num_classes": 4}  # its transforms may normalize
    assert Dataset.from_dataset(Counted()).sha256 == data.sha256  # the same labels, first and last input
    halves = TensorDataset(torch.ones(3, 2, dtype=torch.bfloat16), torch.tensor([0, 1, 1]))
    assert len(Dataset.from_dataset(halves).sha256) == 64  # NumPy has no such type
    shorter, relabelled = Subset(Counted(), range(23)), Counted(("image", "other"))
    assert Dataset.from_dataset(shorter).sha256 != data.sha256
    with pytest.raises(ValueError, match=r"^label=None: expected an integer"):
        Dataset.from_dataset(relabelled)
    part = data.subset(6, 0)
    assert len(part.train) == 6 and part.sha256 != data.sha256 and part.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    ((images, labels, _),) = loader(part, "train", CPU).epoch([torch.arange(6)])
    torch.testing.assert_close(images, torch.from_numpy(IMAGES[:6]) / 255)
    assert torch.equal(labels, part.train.labels)


def as_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        key: [v2.ToImage()(x) if isinstance(x, Image.Image) else x for x in values] for key, values in batch.items()
    }


@pytest.mark.parametrize("names", [("pixel_values", "labels"), ("image", "label")])
def test_a_hugging_face_dataset_is_the_same_as_its_arrays(names: tuple[str, str]) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = IMAGES.astype(np.float32) / 255
    plain = datasets.Dataset.from_dict(dict(zip(names, (pixels, TARGETS), strict=True)))
    bytes_ = datasets.Dataset.from_dict({names[0]: [Image.fromarray(i[0]) for i in IMAGES], names[1]: TARGETS})
    shown = bytes_.with_transform(as_tensors)
    for arrays, *theirs in ((pixels, plain.with_format("torch")), (IMAGES, bytes_.with_format("torch"), shown)):
        expected = fitted(pictures(), Dataset.from_tensors(arrays, TARGETS, mean=[0], std=[1]))
        for data in theirs:
            assert same(fitted(pictures(), data), expected)
        assert same(fitted(pictures(), Dataset.from_dataset(theirs[0], num_workers=1)), expected)


def test_what_the_guide_shows_can_be_trained_on() -> None:
    guide = (Path(__file__).resolve().parents[2] / "GUIDE.md").read_text()
    section = guide.partition("\n### Your own data\n")[2].partition("\n##")[0]
    vectors, images = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {"emq": emq, "torch": torch}
    exec(vectors, names)
    fitted(network(width=6), names["own"])
    exec(images, names)
    model = emq.convert(emq.models.resnet8(10, width=2), SPEC)
    fitted(model, names["own"])
    assert emq.evaluate(model, names["own"], bits=(2,)).n.tolist() == [32]


# What is refused


def test_inputs_of_unequal_shapes_in_a_batch_are_named() -> None:
    items = [(torch.ones(1, 8, 8 + (i == 5)), 0) for i in range(8)]
    with pytest.raises(
        ValueError, match=r"(?s)data='torch.float32 \(1, 8, 8\) and torch.float32 \(1, 8, 9\)': expected"
    ):
        fitted(pictures(), Dataset.from_dataset(items))


def test_labels_that_items_contradict_are_refused() -> None:
    items = Pictures()
    items.targets = [0] * 24
    data = Dataset.from_dataset(items)
    data.train.labels[3] = 2
    with pytest.raises(ValueError, match=r"^label=0: expected 2 for item 3, as the dataset's labels say"):
        next(loader(data, "train", CPU).epoch([torch.arange(4)]))


def test_fewer_outputs_than_classes_are_refused() -> None:
    data = Dataset.from_tensors(IMAGES, TARGETS, classes=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"^model='3 outputs': expected 4 or more"):
        fitted(pictures(), data)
    dense = [(torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8).long())]
    with pytest.raises(ValueError, match=r"^model='outputs \(2, 3, 8, 8\) for labels \(2, 8, 8\)': expected one row"):
        emq.evaluate(
            emq.convert(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3))), emq.QuantSpec(bits=(2,))), dense
        )
    items = TensorDataset(torch.from_numpy(IMAGES), torch.arange(24) % 5)
    with pytest.raises(ValueError, match=r"^model='3 outputs': expected 5 or more"):
        emq.evaluate(pictures(), items, bits=(2,))


@pytest.mark.parametrize("labels", [TARGETS[::-1], TARGETS.astype(">i4"), TARGETS.astype(np.uint16)])
def test_arrays_of_any_layout(labels: np.ndarray) -> None:
    """Views that run backwards, the other byte order, and unsigned integers."""
    made = emq.Dataset.from_tensors(IMAGES[..., ::-1], labels)
    assert torch.equal(made.train.images, torch.from_numpy(IMAGES[..., ::-1].copy()))
    assert made.train.labels.tolist() == labels.tolist()


def test_items_in_double_precision_are_taken_in_single() -> None:
    items = [(x / 255.0, int(y)) for x, y in zip(IMAGES.astype(np.float64), TARGETS, strict=True)]
    assert fitted(pictures(), emq.Dataset.from_dataset(items, items))


class Listed(list):
    """A dataset that says by itself what its checksum is made of, and has no transform."""

    def listing(self, rows: Tensor) -> bytes:
        return bytes(rows.tolist())


def test_a_dataset_that_lists_its_items_is_held_out_and_trained_on(tmp_path: Path) -> None:
    items = Listed((torch.from_numpy(x), int(y)) for x, y in zip(IMAGES, TARGETS, strict=True))
    held = emq.Dataset.from_dataset(items).validation(6)
    assert held.test.items is items
    for _ in range(2):  # the second call reads the checkpoint
        emq.train(pictures(), held, emq.TrainConfig(epochs=1), tmp_path / "run", progress=False)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.ones(2, 1, 8, 8), torch.zeros(2).long())])


def test_an_iterable_dataset_is_an_iterable_of_batches() -> None:
    assert emq.evaluate(pictures(), Endless(), bits=(2,)).n.tolist() == [2]
    with pytest.raises(ValueError, match="expected a Dataset"):
        fitted(pictures(), Endless())
    assert len(Streamed.of(FakeData(4, transform=v2.ToImage()), 0)) == 4
