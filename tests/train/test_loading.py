"""Streamed class folders: real files, decoded by real worker processes, against Pillow and torchvision by hand."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import emqlib as emq
from emqlib import Dataset, QuantSpec, TrainConfig
from emqlib.train import checkpoint
from emqlib.train.data import Streamed, StreamLoader, loader, normalize
from emqlib.train.distributed import Place
from emqlib.train.evaluate import batches

CPU = torch.device("cpu")


def write(folder: Path, train: int, test: int, size: int = 24) -> Path:
    """Handwritten digits as class folders, 10 classes; the images of a class are of two sizes and two types."""
    digits = emq.load_dataset("digits", image_size=size)
    for name, split, count in (("train", digits.train, train), ("val", digits.test, test)):
        for i in range(count):
            image, label = split.images[i], int(split.labels[i])
            place = folder / name / f"class{label}" / f"{i:04d}.{('png', 'jpg')[i % 2]}"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.pad(image.permute(1, 2, 0).numpy(), ((0, 4 * (i % 3)), (0, 0), (0, 0)))).save(place)
    return folder


def streamed(folder: Path, workers: int = 0, size: int = 16) -> Dataset:
    return emq.load_dataset(f"imagefolder:{folder}", image_size=size, stream=True, workers=workers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("few"), 60, 30)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many files that one damaged one is no reason to stop."""
    return write(tmp_path_factory.mktemp("many"), 1030, 20, size=8)


@pytest.fixture
def damage(many: Path) -> Iterator[list[Path]]:
    """Two files of class 3, emptied; whole again afterwards."""
    files = sorted((many / "train" / "class3").iterdir())[:2]
    whole = [file.read_bytes() for file in files]
    yield files
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)


def chunks(n: int, size: int = 8) -> list[Tensor]:
    return list(torch.randperm(n, generator=torch.Generator().manual_seed(3)).split(size))


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_is_streamed_is_listed_and_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    data = streamed(folder)
    assert isinstance(data.train, Streamed) and (len(data.train), len(data.test)) == (60, 30)
    assert data.num_classes == 10 and data.mean == (0.485, 0.456, 0.406)
    paths = [data.train.path(i) for i in range(60)]
    assert paths == sorted(p for p in (folder / "train").rglob("*.*"))
    assert [f"class{label}" for label in data.train.labels] == [p.parent.name for p in paths]
    assert data.to("meta").train is data.train
    train, test = ([type(part) for part in split.items.transform.transforms] for split in (data.train, data.test))
    assert train == [v2.RandomResizedCrop, v2.RandomHorizontalFlip] and test == [v2.Resize, v2.CenterCrop]
    usual = emq.load_dataset(f"imagefolder:{folder}", stream=True)
    assert usual.test.items.transform.transforms[1].size == (224, 224)


def test_plain_images_are_resized_and_cut_out_of_the_centre(folder: Path) -> None:
    data = streamed(folder)
    (images, labels, indices), *_ = loader(data, "test", CPU).epoch(chunks(30))
    assert images.shape == (8, 3, 16, 16) and torch.equal(indices, chunks(30)[0])
    assert torch.equal(labels, data.test.labels[indices])
    cut = v2.Compose([v2.Resize(round(16 * 256 / 224), antialias=True), v2.CenterCrop(16)])
    for image, index in zip(images, indices.tolist(), strict=True):
        pixels = torch.from_numpy(np.array(Image.open(data.test.path(index)).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image, normalize(cut(pixels)[None], data)[0])


def test_held_out_images_are_seen_as_test_images_are(folder: Path) -> None:
    """Neither cropped nor mirrored at random, so the same each time."""
    data = streamed(folder)
    held = data.validation(20)
    assert (len(held.train), len(held.test)) == (40, 20) and held.train.items is data.train.items
    assert held.test.items.transform is data.test.items.transform
    assert held.test.path(0).parent.parent.name == "train"


def test_another_size_of_images_is_another_run(folder: Path) -> None:
    model, config = emq.convert(emq.models.resnet8(width=4), emq.QuantSpec(bits=(2, 8))), emq.TrainConfig()
    own, other = (checkpoint.identity(model, streamed(folder, size=size), config) for size in (16, 24))
    assert [name for name in own if own[name] != other[name]] == ["data.transform"]


def test_an_image_depends_on_epoch_chunk_and_sample_and_not_on_workers_or_processes(folder: Path) -> None:
    data, parts = streamed(folder), chunks(60)
    state = torch.random.get_rng_state()
    first = list(loader(data, "train", CPU).epoch(parts, seeded()))
    assert torch.equal(torch.random.get_rng_state(), state)  # the transforms draw from the global generator
    assert torch.equal(torch.cat([i for *_, i in first]), torch.cat(parts))
    by_workers = list(loader(streamed(folder, workers=2), "train", CPU).epoch(parts, seeded()))
    ranks = [list(loader(data, "train", CPU, Place(r, 2)).epoch(parts, seeded())) for r in (0, 1)]
    for whole, other, here, there in zip(first, by_workers, *ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
        assert all(torch.equal(a, torch.cat(b)) for a, *b in zip(whole, here, there, strict=True))
    again = list(loader(data, "train", CPU).epoch(parts, seeded(6)))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    twice = list(loader(data, "train", CPU).epoch([parts[0], parts[0]], seeded()))
    assert not torch.equal(twice[0][0], twice[1][0])  # a child's sample is not another child's, augmented alike


def test_workers_live_as_long_as_their_loader(folder: Path) -> None:
    live = loader(streamed(folder, workers=1), "train", CPU)
    assert isinstance(live, StreamLoader)
    pids = []
    for seed in (1, 2):
        assert len(list(live.epoch(chunks(60), seeded(seed)))) == 8
        pids.append([worker.pid for worker in live.batches._iterator._workers])
    assert pids[0] == pids[1] and len(pids[0]) == 1
    assert len(list(live.epoch(chunks(60)[:3]))) == 3  # an epoch of another length


def test_a_damaged_image_is_named_skipped_and_counted(many: Path, damage: list[Path]) -> None:
    data = streamed(many)
    damage[0].write_bytes(damage[0].read_bytes()[:40])
    bad = next(i for i in range(len(data.train)) if data.train.path(i) == damage[0])
    live = loader(data, "train", CPU)
    with pytest.warns(UserWarning, match=rf"{damage[0]}: not a readable image.*; skipped, 1 so far"):
        seen = torch.cat([indices for *_, indices in live.epoch(chunks(1030, 64), seeded())])
    assert sorted(seen.tolist()) == [i for i in range(1030) if i != bad]
    assert list(live.damaged) == [bad]
    assert sum(len(indices) for *_, indices in live.epoch(chunks(1030, 64), seeded())) == 1029  # one warning is enough
    with pytest.warns(UserWarning, match="not a readable image"):
        history = emq.train(network(), data, TrainConfig(epochs=1, batch_size=256), progress=False)
    assert history.attrs["damaged"] == [str(damage[0])] and history.damaged.tolist() == [1]


@pytest.mark.filterwarnings("ignore:.*not a readable image")
def test_more_than_one_in_a_thousand_is_an_error(many: Path, damage: list[Path]) -> None:
    for file in damage:
        file.write_bytes(b"")
    message = rf"(?s)^data='2 damaged files': expected at most 0.1% of the 1030 files damaged; .*{damage[0].parent}"
    with pytest.raises(ValueError, match=message):
        emq.train(network(), streamed(many, size=8), TrainConfig(epochs=1, batch_size=64), progress=False)


@pytest.mark.filterwarnings("ignore:.*not a readable image")
def test_damaged_files_of_all_processes_count_together(many: Path, damage: list[Path]) -> None:
    for file in damage:
        file.write_bytes(b"")
    data = streamed(many)
    bad = [i for i in range(len(data.train)) if data.train.path(i) in damage]

    class Both(Place):
        def collect(self, value: dict) -> list[dict]:
            return [value, {bad[1]: "the other process's"}]

    live = loader(data, "train", CPU, Both())
    assert len(list(live.epoch([torch.tensor([bad[0], 0])], seeded()))) == 1 and live.damaged.keys() == {bad[0]}
    with pytest.raises(ValueError, match=r"^data='2 damaged files'"):
        live.all_damaged()
    with pytest.raises(ValueError, match=rf"^{damage[0]}: not a readable image .*, and so is every image of its batch"):
        list(loader(data, "train", CPU).epoch([torch.tensor(bad[:1])], seeded()))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return emq.convert(emq.models.resnet8(10, width=4), QuantSpec(bits=(2, 8)))


def test_training_evaluation_and_adaptation_take_streamed_data(folder: Path, tmp_path: Path) -> None:
    data = streamed(folder, workers=1)
    coreset = emq.CoresetConfig(score="el2n", pruning_rate=0.5)
    config = TrainConfig(epochs=3, batch_size=16, lr=0.05, coreset=coreset)
    histories, models = [], []
    for path in (None, tmp_path / "run.pt"):
        models.append(network())
        if path is not None:
            with pytest.raises(KeyboardInterrupt):
                emq.train(models[-1], data, config, path, progress=False, observe=interrupt_second(path))
        models[-1] = network()
        histories.append(emq.train(models[-1], data, config, path, progress=False))
    assert histories[0].loss.tolist() == histories[1].loss.tolist() and histories[0].attrs["damaged"] == []
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    table = emq.evaluate(models[0], data, bits=(2, 3, 8))
    assert table.n.tolist() == [30] * 3 and emq.evaluate(models[0], data, bits=(2, 3, 8)).equals(table)
    adapted = emq.evaluate(models[0], data, bits=(2, 8), adapt_norm=True)
    assert not adapted.loss.equals(table[table.bits != 3].loss)
    before = models[0].get_submodule("bn1").running_mean.clone()
    emq.adapt_norm(models[0], data, bits=(3,))
    assert not torch.equal(models[0].get_submodule("bn1").running_mean, before)


def interrupt_second(path: Path):
    def observe(_: torch.nn.Module) -> None:
        if path.exists():
            raise KeyboardInterrupt

    return observe


def test_an_unlabelled_test_folder_is_no_test_set(tmp_path: Path) -> None:
    """As ImageNet's own: files without classes."""
    folder = write(tmp_path / "data", 20, 10)
    (folder / "test").mkdir()
    (folder / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(b"")
    assert len(streamed(folder).test) == 10


def test_a_part_of_streamed_data(folder: Path) -> None:
    data = streamed(folder)
    part = data.subset(20, 10)
    assert part.train.labels.bincount().tolist() == [2] * 10 and len(part.test) == 10
    assert part.sha256 != data.sha256 and part.train.path(0) == data.train.path(0)
    images = torch.cat([x for x, _ in batches(part, "test", CPU, 4)])
    assert images.shape == (10, 3, 16, 16)
    some = [y for _, y in batches(data, "train", CPU, 8, limit=24)]
    assert len(torch.cat(some)) == 24 and len(torch.cat(some).unique()) > 5  # not class by class


def test_the_checksum_tells_names_sizes_and_labels(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 20, 10)
    first = streamed(folder).sha256
    assert streamed(folder).sha256 == first
    file = next((folder / "train" / "class0").iterdir())
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert streamed(folder).sha256 != first
    file.write_bytes(content)
    assert streamed(folder).sha256 == first
    file.rename(file.with_name("other.png"))
    assert streamed(folder).sha256 != first


def imagenet(root: Path, flat: bool) -> dict[str, int]:
    """1,000 classes of one training image each, as ImageNet is laid out: official folders, or as Kaggle packs it."""
    top = root / "ILSVRC/Data/CLS-LOC" if flat else root / "imagenet"
    names = [f"n{i:08d}" for i in range(1000)]
    image = Image.fromarray(np.full((4, 4, 3), 7, np.uint8))
    for name in names:
        (top / "train" / name).mkdir(parents=True)
        image.save(top / "train" / name / f"{name}_1.JPEG")
    answers = {"ILSVRC2012_val_00000001": 998, "ILSVRC2012_val_00000002": 3}
    for file, label in answers.items():
        place = top / "val" / ("" if flat else names[label])
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{file}.JPEG")
    if flat:
        rows = [f"{file},{names[label]} 1 2 3 4 {names[0]} 5 6 7 8" for file, label in reversed(answers.items())]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return answers


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet_is_streamed_from_either_layout(flat: bool, tmp_path: Path) -> None:
    answers = imagenet(tmp_path, flat)
    data = emq.load_dataset("imagenet", root=tmp_path)
    assert isinstance(data.train, Streamed) and data.num_classes == 1000 and len(data.train) == 1000
    found = {data.test.path(i).stem: int(label) for i, label in enumerate(data.test.labels)}
    assert found == answers
