"""Data sets: what is written here in each official format must come back, pixel for pixel, or as a clear error."""

import hashlib
import os
import pickle
import re
import shutil
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, cifar

from emqlib import files
from emqlib.train.data import Dataset, Split, augment, normalize
from emqlib.train.sources import load_dataset

REAL = Path(os.environ.get("EMQ_DATA") or "no data")
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, and nothing found or cached outside of the test's own folder."""

    def no_network(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("EMQ_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)  # no pyproject.toml there: data/ is the working directory's


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_folders(root: Path, classes=("a", "b"), per_class=3, size=(8, 8), held_out="test", seed=0, suffix=".png"):
    """Class folders of random images; returns {split: (N, H, W, 3) in order of class and number}."""
    written = {}
    for split, count in (("train", per_class), (held_out, 1)):
        images = pixels(len(classes) * count, *size, 3, seed=seed + (split == "train"))
        for i, image in enumerate(images):
            save(root / split / classes[i // count] / f"{i % count:04}{suffix}", image, lossless=True)
        written[split] = images
    return written


def write_batch(path: Path, images: np.ndarray, **labels) -> list[str]:
    """One official pickle: rows of 3,072 channel-first bytes; returns the entry of torchvision's list."""
    content = pickle.dumps({"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), **labels})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, hashlib.md5(content).hexdigest()]


def write_meta(path: Path, key: str, names: list[str]) -> dict[str, str]:
    path.write_bytes(content := pickle.dumps({key: names}))
    return {"filename": path.name, "key": key, "md5": hashlib.md5(content).hexdigest()}


def write_cifar10(root: Path, monkeypatch, seed=0) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder = root / "cifar-10-batches-py"
    train, test = (
        (pixels(50, 32, 32, 3, seed=seed), [7 * i % 10 for i in range(50)]),
        pixels(10, 32, 32, 3, seed=seed + 1),
    )
    parts = [slice(10 * i, 10 * i + 10) for i in range(5)]
    entries = [
        write_batch(folder / f"data_batch_{i}", train[0][part], labels=train[1][part])
        for i, part in enumerate(parts, 1)
    ]
    monkeypatch.setattr(CIFAR10, "train_list", entries)
    monkeypatch.setattr(CIFAR10, "test_list", [write_batch(folder / "test_batch", test, labels=list(range(10)))])
    monkeypatch.setattr(CIFAR10, "meta", write_meta(folder / "batches.meta", "label_names", NAMES))
    return {"train": train, "test": (test, list(range(10)))}


def write_tiny_imagenet(root: Path, classes=200) -> tuple[Path, list[str]]:
    folder, wnids = root / "tiny-imagenet-200", [f"n{9 * i:08}" for i in range(classes)]
    for i, wnid in enumerate(wnids):
        image = np.full((8, 8), i, np.uint8) if i % 7 == 0 else np.full((8, 8, 3), i, np.uint8)  # some are grayscale
        save(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", image, quality=100)
    rows = []
    for i in range(5):
        save(folder / "val" / "images" / f"val_{i}.JPEG", np.full((8, 8, 3), 10 * i, np.uint8), quality=100)
        rows.append(f"val_{i}.JPEG\t{wnids[-1 - i]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    save(folder / "test" / "images" / "test_0.JPEG", pixels(8, 8, 3))  # has no label: must not be read
    return folder, wnids


def made_up(batch: int = 6, height: int = 8, width: int = 8, flip: bool = True, crop_padding: int = 2) -> Dataset:
    split = Split(torch.from_numpy(pixels(batch, 3, height, width)), torch.arange(batch) % 3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return Dataset("made up", split, split, ("a", "b", "c"), mean, std, flip, crop_padding, "")


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# Names, places and their order


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cifar10", ["cifar-10-batches-py", "cifar10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]),
        ("cifar100", ["cifar-100-python", "cifar100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"]),
        ("tinyimagenet", ["tiny-imagenet-200", "tinyimagenet", "tiny-imagenet-200.zip", "val/val_annotations.txt"]),
        ("imagenet", ["imagenet", "ILSVRC", "image-net.org", "imagenet/train/<wnid>"]),
        ("imagefolder:empty", ["train", "train/<class>"]),
    ],
)
def test_missing_data_names_every_place_and_the_way_to_get_it(name, places, tmp_path):
    timeout = socket.getdefaulttimeout()
    with pytest.raises(FileNotFoundError, match="no data for") as error:
        load_dataset(name, tmp_path / "empty")
    for place in places:
        assert (place if "/" in place or "." in place else str(tmp_path / "empty" / place)) in str(error.value)
    assert ("EMQ_DATA" in str(error.value)) == (":" not in name) and socket.getdefaulttimeout() == timeout
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_root_comes_before_environment_before_data_folder(tmp_path, monkeypatch):
    written = {
        place: write_folders(tmp_path / place / "cifar10", NAMES, 1, seed=10 * i)["train"]
        for i, place in enumerate(("root", "env", "data"))
    }
    assert torch.equal(load_dataset("cifar10").train.images, as_tensor(written["data"]))
    monkeypatch.setenv("EMQ_DATA", str(tmp_path / "env"))
    assert torch.equal(load_dataset("cifar10").train.images, as_tensor(written["env"]))
    assert torch.equal(load_dataset("cifar10", tmp_path / "root").train.images, as_tensor(written["root"]))
    assert torch.equal(load_dataset("cifar10", "root").train.images, as_tensor(written["root"]))


# Official files


def test_cifar10_official_files(tmp_path, monkeypatch):
    written = write_cifar10(tmp_path, monkeypatch)
    data = load_dataset("cifar10", tmp_path)
    assert data.classes == tuple(NAMES) and data.num_classes == 10 and data.name == "cifar10"
    for split, (images, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64 and len(split) == len(labels)
        assert torch.equal(split.images, as_tensor(images)) and split.images.is_contiguous()
        assert split.labels.tolist() == labels
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert data.flip and data.crop_padding == 4
    small = load_dataset("cifar10", tmp_path, image_size=16).train.images
    expected = as_tensor(written["train"][0]).double().view(50, 3, 16, 2, 16, 2).mean((3, 5))
    # antialiased bilinear weights are 1/8 3/8 3/8 1/8, so noise does not average as it would in 2 x 2 boxes
    assert small.shape == expected.shape and np.corrcoef(small.flatten(), expected.flatten())[0, 1] > 0.85


def test_cifar100_has_its_fine_labels(tmp_path, monkeypatch):
    folder, names = tmp_path / "cifar-100-python", [f"class{i:02}" for i in range(100)]
    images, labels = pixels(6, 32, 32, 3), [3, 99, 0, 50, 7, 7]
    for split in ("train", "test"):
        batch = write_batch(folder / split, images, fine_labels=labels, coarse_labels=[0, 1, 0, 1, 0, 1])
        monkeypatch.setattr(CIFAR100, f"{split}_list", [batch])
    monkeypatch.setattr(CIFAR100, "meta", write_meta(folder / "meta", "fine_label_names", names))
    data = load_dataset("cifar100", tmp_path)
    assert data.train.labels.tolist() == data.test.labels.tolist() == labels and data.classes == tuple(names)
    assert torch.equal(data.train.images, as_tensor(images)) and data.mean == (0.5071, 0.4865, 0.4409)


def test_official_files_come_before_class_folders_unless_they_are_damaged(tmp_path, monkeypatch):
    official = write_cifar10(tmp_path, monkeypatch)["train"][0]
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-100])
    with pytest.raises(FileNotFoundError, match="incomplete or damaged"):
        load_dataset("cifar10", tmp_path)
    folders = write_folders(tmp_path / "cifar10", NAMES, 1)["train"]
    assert torch.equal(load_dataset("cifar10", tmp_path).train.images, as_tensor(folders))
    batch.write_bytes(whole)
    assert torch.equal(load_dataset("cifar10", tmp_path).train.images, as_tensor(official))


def test_download_is_the_last_resort(tmp_path, monkeypatch):
    written = write_cifar10(tmp_path / "server", monkeypatch)
    timeouts = []

    def download(url, root, filename, md5):
        timeouts.append(socket.getdefaulttimeout())
        Path(root).mkdir()
        os.replace(tmp_path / "server" / "cifar-10-batches-py", Path(root) / "cifar-10-batches-py")

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    for _ in range(2):
        data = load_dataset("cifar10", tmp_path / "root")
        assert torch.equal(data.train.images, as_tensor(written["train"][0]))
    assert len(timeouts) == 1 and 0 < timeouts[0] <= 30
    assert socket.getdefaulttimeout() is None


def test_tinyimagenet_official_layout(tmp_path):
    folder, wnids = write_tiny_imagenet(tmp_path)
    data = load_dataset("tinyimagenet", tmp_path)
    assert data.classes == tuple(wnids) and (len(data.train), len(data.test)) == (200, 5)
    assert data.train.labels.tolist() == list(range(200)) and data.test.labels.tolist() == [199, 198, 197, 196, 195]
    assert data.train.images[:, :, 4, 4].tolist() == [[i] * 3 for i in range(200)]
    assert data.test.images[:, 0, 4, 4].tolist() == [0, 10, 20, 30, 40]
    (folder / "val" / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file .*val_annotations\.txt"):
        load_dataset("tinyimagenet", tmp_path)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("../../../secret.png\tn00000001", "'../../../secret.png' on one side alone"),
        ("a\0b.JPEG\tn00000001", "b.JPEG' on one side"),
        ("val_0.JPEG\tn00000001", "an image twice"),
        ("val_5.JPEG", "an image twice, or a line without a class"),
        ("\xff\xfe garbage\ta", "garbage' on one side"),
        (None, "'val_4.JPEG' on one side"),  # the table was cut short
    ],
)
def test_annotations_name_each_image_of_their_folder_once_and_nothing_else(line, found, tmp_path):
    folder, _ = write_tiny_imagenet(tmp_path)
    (tmp_path / "secret.png").write_bytes((folder / "val" / "images" / "val_0.JPEG").read_bytes())
    table = folder / "val" / "val_annotations.txt"
    whole = table.read_bytes()
    table.write_bytes(whole[: whole.index(b"val_4")] if line is None else whole + line.encode("latin-1"))
    told = r"val_annotations\.txt: expected one line, with a class, for each image of .*images, found .*"
    with pytest.raises(ValueError, match=told + re.escape(found)):
        load_dataset("tinyimagenet", tmp_path)


def test_a_named_data_set_has_its_number_of_classes(tmp_path):
    write_tiny_imagenet(tmp_path, classes=6)
    with pytest.raises(ValueError, match=r"tiny-imagenet-200.*expected 200 classes, found 6"):
        load_dataset("tinyimagenet", tmp_path)
    write_folders(tmp_path / "cifar10", NAMES[:9])
    with pytest.raises(ValueError, match=r"cifar10.*expected 10 classes, found 9"):
        load_dataset("cifar10", tmp_path)


# Class folders


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".PNG"])
@pytest.mark.parametrize("held_out", ["test", "val"])
def test_class_folders_of_lossless_files(tmp_path, suffix, held_out):
    written = write_folders(tmp_path, ("cat", "ant"), size=(6, 9), held_out=held_out, suffix=suffix)
    data = load_dataset(f"imagefolder:{tmp_path}")
    order = [3, 4, 5, 0, 1, 2]  # sorted by class
    assert data.classes == ("ant", "cat") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.train.images, as_tensor(written["train"][order])) and data.train.images.is_contiguous()
    assert torch.equal(data.test.images, as_tensor(written[held_out][[1, 0]]))
    assert data.name == f"imagefolder:{tmp_path}" and data.train.images.dtype == torch.uint8
    other = write_folders(tmp_path, ("cat", "ant"), size=(6, 9), held_out="test", seed=5, suffix=suffix)
    assert torch.equal(
        load_dataset(f"imagefolder:{tmp_path}").test.images, as_tensor(other["test"][[1, 0]])
    )  # before val


def test_every_image_mode_becomes_rgb(tmp_path):
    gray, rgb, flags = pixels(8, 8), pixels(8, 8, 3, seed=1), pixels(8, 8, seed=2) > 127
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(folder / "0.png", transparency=bytes([0] * 8 + [255] * 8))
    save(folder / "1.png", gray)
    save(folder / "2.png", gray.astype(np.uint16) * 257)  # 16 bits
    save(folder / "3.png", np.dstack([rgb, gray]))  # RGBA
    save(folder / "4.png", np.dstack([gray, gray.T]))  # gray with alpha
    Image.fromarray(flags).save(folder / "5.png")
    save(folder / "6.jpg", np.full((8, 8), 90, np.uint8), mode="CMYK", quality=100)
    save(tmp_path / "test" / "a" / "0.png", rgb)
    images = load_dataset(f"imagefolder:{tmp_path}").train.images.permute(0, 2, 3, 1).numpy()
    three = np.dstack([gray] * 3)
    expected = [np.asarray(palette.convert("RGB")), three, three, rgb, three, np.dstack([flags * 255] * 3)]
    assert [np.array_equal(a, b) for a, b in zip(images[:6], expected, strict=True)] == [True] * 6
    assert abs(images[6].astype(int) - 90).max() <= 2


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(kind, tmp_path):
    """What is black and white in them is known to nobody."""
    write_folders(tmp_path)
    save(tmp_path / "train" / "a" / "9.tiff", pixels(8, 8).astype(kind))
    with pytest.raises(ValueError, match="32 bits a pixel; save it with 8 or 16"):
        load_dataset(f"imagefolder:{tmp_path}", image_size=8)


def test_what_is_no_image_is_left_out(tmp_path):
    write_folders(tmp_path)
    for junk in ("train/a/notes.txt", "train/a/.hidden.png", "train/README.md", "train/.cache/x.png", "labels.csv"):
        (tmp_path / junk).parent.mkdir(exist_ok=True)
        (tmp_path / junk).write_text("not an image")
    data = load_dataset(f"imagefolder:{tmp_path}")
    assert len(data.train) == 6 and data.classes == ("a", "b")


def test_images_of_different_size_name_both_files_and_the_remedy(tmp_path):
    write_folders(tmp_path)
    odd = save(tmp_path / "train" / "b" / "0001.png", pixels(8, 12, 3))
    with pytest.raises(ValueError, match="image_size=") as error:
        load_dataset(f"imagefolder:{tmp_path}")
    message = str(error.value)
    assert str(odd) in message and "(8, 12)" in message
    assert str(tmp_path / "train" / "a" / "0000.png") in message and "(8, 8)" in message
    assert load_dataset(f"imagefolder:{tmp_path}", image_size=6).train.images.shape == (6, 3, 6, 6)


def test_image_size_scales_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    save(tmp_path / "train" / "a" / "wide.png", wide)
    save(tmp_path / "test" / "a" / "tall.png", wide.transpose(1, 0, 2))
    data = load_dataset(f"imagefolder:{tmp_path}", image_size=8)
    assert data.train.images.shape == data.test.images.shape == (1, 3, 8, 8)
    assert data.train.images.unique().tolist() == data.test.images.unique().tolist() == [200]
    half = load_dataset(f"imagefolder:{tmp_path}", image_size=4).train.images
    assert half[..., 1:3].unique().tolist() == [200]  # at the edges, antialiasing takes in the neighbours
    assert load_dataset(f"imagefolder:{tmp_path}", image_size=16).train.images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("keep", [0, 30, -200])
def test_a_damaged_image_is_named(tmp_path, keep):
    write_folders(tmp_path, size=(16, 16))
    damaged = tmp_path / "train" / "b" / "0002.png"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"0002\.png: not a readable image"):
        load_dataset(f"imagefolder:{tmp_path}")


def test_missing_and_unexpected_classes_are_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"train: expected one folder with images for each class \(.*classes c\."):
        load_dataset(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "c").rmdir()
    save(tmp_path / "test" / "z" / "0.png", pixels(8, 8, 3))
    with pytest.raises(ValueError, match=r"test/z/0\.png.*'z' has no images for training"):
        load_dataset(f"imagefolder:{tmp_path}")
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match=r"/test: no such folder"):
        load_dataset(f"imagefolder:{tmp_path}")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"/train: expected one folder with images for each class"):
        load_dataset(f"imagefolder:{tmp_path}")


def test_statistics_of_an_imagefolder_are_those_of_its_training_images(tmp_path):
    images = write_folders(tmp_path)["train"] / 255.0
    data = load_dataset(f"imagefolder:{tmp_path}")
    assert data.mean == pytest.approx(images.mean((0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(images.std((0, 1, 2)), abs=1e-12)
    assert abs(normalize(data.train.images, data).mean((0, 2, 3))).max() < 1e-5


# The cache of decoded images


def test_a_changed_added_or_removed_file_makes_the_cache_anew(tmp_path):
    write_folders(tmp_path)
    load_dataset(f"imagefolder:{tmp_path}")
    image = np.full((8, 8, 3), 7, np.uint8)
    changed = save(tmp_path / "train" / "a" / "0001.png", image)
    assert torch.equal(load_dataset(f"imagefolder:{tmp_path}").train.images[1], as_tensor(image[None])[0])
    save(tmp_path / "train" / "b" / "9999.png", image)
    assert len(load_dataset(f"imagefolder:{tmp_path}").train) == 7
    changed.unlink()
    assert len(load_dataset(f"imagefolder:{tmp_path}").train) == 6


def test_two_folders_of_equal_names_lengths_and_times_are_not_mixed_up(tmp_path):
    written = {}
    for seed, name in enumerate(("one", "two")):
        written[name] = write_folders(tmp_path / name, suffix=".bmp", seed=10 * seed)["train"]
        (tmp_path / name / ".emqlib").write_text("")  # so that both use the user's cache
        for path in (tmp_path / name).rglob("*.bmp"):
            os.utime(path, ns=(0, 0))
    for name, images in written.items():
        assert torch.equal(load_dataset(f"imagefolder:{name}").train.images, as_tensor(images))


def test_data_that_cannot_be_written_to_is_cached_for_the_user_or_nowhere(tmp_path, monkeypatch):
    written = write_folders(tmp_path / "data")
    (tmp_path / "data" / ".emqlib").write_text("a file where the cache would be")  # holds for root too
    load_dataset("imagefolder:data")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        load_dataset("imagefolder:data")
    assert any((tmp_path / "user-cache" / "emqlib").rglob("*.safetensors"))
    (tmp_path / "user-cache").rename(tmp_path / "gone")
    (tmp_path / "user-cache").write_text("")
    assert torch.equal(load_dataset("imagefolder:data").train.images, as_tensor(written["train"]))


# Digits


def test_digits_are_whole_balanced_and_split_without_overlap():
    data = load_dataset("digits")
    both = torch.cat([data.train.images, data.test.images])
    assert both.shape == (1797, 3, 32, 32) and both.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert torch.equal(both[:, 0], both[:, 1]) and torch.equal(both[:, 0], both[:, 2])
    assert (both.min(), both.max()) == (0, 255)
    train, test = ({image.numpy().tobytes() for image in split.images} for split in (data.train, data.test))
    assert not train & test and len(train) + len(test) == 1797
    for split, low, high in ((data.train, 139, 147), (data.test, 34, 36)):
        assert all(low <= count <= high for count in split.labels.bincount(minlength=10))
    assert data.classes == tuple("0123456789") and not data.flip and data.crop_padding == 2
    assert data.sha256 == load_dataset("digits").sha256


def test_digits_are_those_of_scikit_learn():
    digits = load_digits()
    data = load_dataset("digits", image_size=8)  # the original size: nothing is interpolated
    exact = (digits.images * 255 / 16).round().astype(np.uint8)
    theirs = {(image.tobytes(), int(label)) for image, label in zip(exact, digits.target, strict=True)}
    for split in (data.train, data.test):
        assert {(i[0].numpy().tobytes(), int(n)) for i, n in zip(split.images, split.labels, strict=True)} <= theirs


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "emqlib\[notebook\]"'):
        load_dataset("digits")


# What a Dataset can do


def test_subset_takes_the_first_of_each_class_in_the_original_order():
    labels = torch.tensor([2, 2, 2, 0, 1, 0, 2, 1, 0, 1])
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    data = replace(made_up(), train=Split(images, labels), test=Split(images, labels), sha256="all")
    small = data.subset(6, 4)
    assert small.train.images[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 7]
    assert small.train.labels.tolist() == [2, 2, 0, 1, 0, 1]
    assert small.test.images[:, 0, 0, 0].tolist() == [0, 3, 4, 5]
    assert small.sha256 == data.subset(6, 4).sha256 != data.subset(6, 5).sha256
    assert (small.mean, small.classes, small.name) == (data.mean, data.classes, data.name)
    assert torch.equal(data.subset(10, 10).train.images, images)
    split = Split(images[:6], torch.tensor([0, 0, 0, 0, 0, 1]))  # a class is short
    assert replace(made_up(), train=split, test=split).subset(4, 1).train.labels.tolist() == [0, 0, 0, 1]


def test_validation_images_are_the_last_of_each_class_and_not_trained_on():
    labels = torch.tensor([2, 2, 2, 0, 1, 0, 2, 1, 0, 1])
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    data = replace(made_up(), train=Split(images, labels), test=Split(images[:3], labels[:3]), sha256="all")
    held = data.validation(4)
    assert held.test.images[:, 0, 0, 0].tolist() == [2, 6, 8, 9] and held.test.labels.tolist() == [2, 2, 0, 1]
    assert held.train.images[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 7]
    assert held.sha256 not in ("all", data.validation(3).sha256) and held.sha256 == data.validation(4).sha256
    assert (held.mean, held.flip, held.classes) == (data.mean, data.flip, data.classes)


def test_validation_holds_out_the_same_part_of_each_class():
    sizes = [200, 100, 40, 10, 1]
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))[torch.randperm(351)]
    split = Split(torch.zeros(351, 3, 2, 2, dtype=torch.uint8), labels)
    held = replace(made_up(), train=split, test=split).validation(35)
    assert held.test.labels.bincount(minlength=5).tolist() == [20, 10, 4, 1, 0]
    assert held.train.labels.bincount().tolist() == [180, 90, 36, 9, 1]


def test_checksum_names_pixels_and_labels(tmp_path):
    write_folders(tmp_path / "one", seed=1)
    write_folders(tmp_path / "same", seed=1)
    write_folders(tmp_path / "other", seed=2)
    one, same, other = (load_dataset(f"imagefolder:{tmp_path / name}") for name in ("one", "same", "other"))
    assert one.sha256 == same.sha256 != other.sha256 and len(one.sha256) == 64
    (tmp_path / "same" / "train" / "a" / "0002.png").rename(tmp_path / "same" / "train" / "b" / "-.png")
    relabelled = load_dataset(f"imagefolder:{tmp_path / 'same'}")
    assert torch.equal(relabelled.train.images, one.train.images) and relabelled.sha256 != one.sha256


def test_to_moves_every_tensor_and_nothing_else():
    data = made_up()
    moved = data.to("meta")
    for split in (moved.train, moved.test):
        assert split.images.device.type == split.labels.device.type == "meta"
    assert (moved.sha256, moved.classes, len(moved.train)) == (data.sha256, data.classes, 6)
    assert data.train.images.device.type == "cpu"


# Normalisation and augmentation


def test_normalize_is_the_formula():
    data = made_up(batch=4, height=5, width=7)
    ours = normalize(data.train.images, data)
    exact = (data.train.images.numpy() / 255.0 - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
    assert ours.dtype == torch.float32 and ours.shape == (4, 3, 5, 7)
    assert np.abs(ours.numpy() - exact).max() < 2e-6


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9)])
def test_augment_is_a_flip_and_a_crop_of_the_padded_image(flip, padding, height, width):
    data = made_up(40, height, width, flip, padding)
    ours = augment(data.train.images, data, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)  # makes the same draws
    mirrored = torch.rand(40, generator=generator) < 0.5 if flip else torch.zeros(40, dtype=torch.bool)
    tops, lefts = torch.randint(2 * padding + 1, (2, 40), generator=generator) if padding else torch.zeros(2, 40).int()
    for i, image in enumerate(data.train.images.numpy()):
        image = image[:, :, ::-1] if mirrored[i] else image
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width]
        assert np.array_equal(ours[i], expected)
    assert ours.dtype == torch.uint8 and ours.shape == data.train.images.shape


def test_augment_draws_from_its_generator_only():
    data, state = made_up(64), torch.get_rng_state()
    images = data.train.images.clone()
    one, same, other = (augment(images, data, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, data.train.images)  # never in place
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(augment(images, data, generator), augment(images, data, generator))


# Real files, where the machine has them


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="EMQ_DATA has no cifar10")
def test_real_cifar10():
    data = load_dataset("cifar10", REAL)
    assert data.classes == tuple(NAMES) and data.train.images.shape == (50000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    mean = [channel.double().mean().item() / 255 for channel in data.train.images.unbind(1)]
    assert mean == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-4)
    assert mean == pytest.approx(data.mean, abs=1e-3)
