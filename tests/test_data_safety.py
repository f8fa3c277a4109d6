"""What image files and the cache of their pixels may do: nothing but give the pixels that are there, or an error."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import emqlib as emq
from emqlib import container, images


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of eight random images, all files of one size."""
    for i in range(8):
        place = tmp_path / "data" / ("train" if i < 6 else "test") / "ab"[i % 2] / f"{i}.bmp"
        place.parent.mkdir(parents=True, exist_ok=True)
        image(i).save(place)
    return tmp_path / "data"


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def load(folder: Path) -> Tensor:
    data = emq.load_dataset(f"imagefolder:{folder}")
    return torch.cat([data.train.images, data.test.images])


def cache_of(folder: Path) -> Path:
    (cache,) = (folder / ".emqlib").iterdir()
    return cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with files: "decode" and "digest", once for each."""
    calls: list[str] = []

    def counting(name: str) -> None:
        original = getattr(images, name)
        monkeypatch.setattr(images, name, lambda *args: calls.append(name.strip("_")) or original(*args))

    counting("decode")
    counting("_digest")
    return calls


# The cache


def one_byte(data: bytes) -> bytes:
    return data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]


@pytest.mark.parametrize("change", [one_byte, lambda data: data[: -8 * 192] + bytes(8 * 192)])
def test_a_cache_of_other_pixels_is_made_anew(change: Callable[[bytes], bytes], folder: Path) -> None:
    first = load(folder)
    whole = cache_of(folder).read_bytes()
    cache_of(folder).write_bytes(change(whole))
    assert torch.equal(load(folder), first) and cache_of(folder).read_bytes() == whole


def npy(size: int) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (8, 3, {size}, 1)}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def safetensors(size: int) -> bytes:
    tensor = {"dtype": "U8", "shape": [8, 3, size, 1], "data_offsets": [0, 24 * size]}
    header = json.dumps({"__metadata__": {"emqlib": '{"version":1}', "sha256": ""}, "images": tensor}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("header", [npy, safetensors])
def test_a_cache_that_asks_for_more_than_it_has_is_made_anew(header: Callable[[int], bytes], folder: Path) -> None:
    first = load(folder)
    cache_of(folder).write_bytes(header(2**44) + bytes(100))  # 384 TiB
    assert torch.equal(load(folder), first)


@pytest.mark.parametrize("tensors", [{}, {"images": torch.zeros(8, 3, 8)}, {"images": torch.zeros(7, 3, 8, 8).byte()}])
def test_a_whole_file_of_something_else_is_no_cache(tensors: dict[str, Tensor], folder: Path) -> None:
    first = load(folder)
    about, _ = container.read(cache_of(folder), images.VERSION, "a cache")
    container.write(cache_of(folder), about, tensors)
    assert torch.equal(load(folder), first)


def test_what_happens_to_the_cache_later_changes_no_pixel(folder: Path) -> None:
    load(folder)
    found = load(folder)
    before = found.clone()
    cache_of(folder).write_bytes(bytes(cache_of(folder).stat().st_size))
    assert torch.equal(found, before)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_image_replaced_by_one_of_the_same_size_and_time_is_seen(in_place: bool, folder: Path) -> None:
    first, path = load(folder), folder / "train" / "a" / "0.bmp"
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a tick of the clock is some milliseconds
        target = path if in_place else path.with_suffix(".new")
        image(9).save(target, format="BMP")
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        target.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = load(folder)
    assert torch.equal(found[0], torch.from_numpy(np.array(image(9))).permute(2, 0, 1))
    assert torch.equal(found[1:], first[1:])


def test_an_image_replaced_while_it_is_read_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, path = images.decode, folder / "train" / "b" / "1.bmp"

    def decode(file: Path, size: int | None) -> np.ndarray:
        found = original(file, size)
        if file == path:
            image(9).save(path.with_suffix(".new"), format="BMP")
            path.with_suffix(".new").replace(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", decode)
        first = load(folder)
    assert torch.equal(load(folder)[3], torch.from_numpy(np.array(image(9))).permute(2, 0, 1))
    assert torch.equal(first[3], torch.from_numpy(np.array(image(1))).permute(2, 0, 1))


@pytest.mark.parametrize("copy", [shutil.copy2, shutil.copyfile])
def test_a_copy_is_read_once_and_not_decoded(copy: Callable, folder: Path, counted: list[str]) -> None:
    first = load(folder)
    assert counted.count("decode") == 9 and counted.count("digest") == 8  # the first tells the size
    shutil.copytree(folder, folder.parent / "copy", copy_function=copy)
    for expected in (8, 0):
        counted.clear()
        assert torch.equal(load(folder.parent / "copy"), first) and counted == ["digest"] * expected
