"""What image files and the cache of their pixels may do: nothing but give the pixels that are there, or an error."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor

import emqlib as emq
from emqlib import files as container
from emqlib.train import sources as images


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
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded."""
    paths: list[Path] = []
    original = images.decode
    monkeypatch.setattr(images, "decode", lambda path, size: paths.append(path) or original(path, size))
    return paths


# The cache


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda data: data[:-700] + bytes([data[-700] ^ 1]) + data[-699:],
    "an image": lambda data: data[: -8 * 192] + bytes(8 * 192),
    "cut short": lambda data: data[:-1],
    "a part of the header": lambda data: data[:100],
    "empty": lambda data: b"",
    "384 TiB": lambda data: header([8, 3, 2**44, 1], 24 * 2**44) + bytes(100),
    "no tensor's shape": lambda data: header([2**63, 0], 0),
    "a pickle": lambda data: pickle.dumps(print),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_of_other_pixels_is_made_anew(name: str, folder: Path) -> None:
    first = load(folder)
    whole = cache_of(folder).read_bytes()
    cache_of(folder).write_bytes(CHANGES[name](whole))
    assert torch.equal(load(folder), first) and cache_of(folder).read_bytes() == whole


def header(shape: list[int], size: int) -> bytes:
    """The header of a file that has an image tensor of so many bytes."""
    tensor = {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"emqlib": "0" * 64 + '{"version":1}'}, "images": tensor}).encode()
    return struct.pack("<Q", len(text)) + text


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
def test_a_copy_is_decoded_once(copy: Callable, folder: Path, decoded: list[Path]) -> None:
    first = load(folder)
    assert len(decoded) == 9  # the first tells the size
    shutil.copytree(folder, folder.parent / "copy", copy_function=copy)
    for place, expected in ((folder, 0), (folder.parent / "copy", 9), (folder.parent / "copy", 0)):
        decoded.clear()
        assert torch.equal(load(place), first) and len(decoded) == expected


# Image files


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list:
    """The processes that somebody tried to start; Pillow has not looked for Ghostscript yet."""
    tried: list = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(args)
        raise OSError("no process in this test")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tried


def test_postscript_under_another_name_is_refused_and_not_run(folder: Path, started: list) -> None:
    path = folder / "train" / "a" / "x.png"
    image(0).save(path, format="EPS")
    assert path.read_bytes().startswith(b"%!PS")
    with pytest.raises(ValueError, match=r"a/x\.png: not a readable image \(cannot identify"):
        load(folder)
    assert not started


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"])
def test_every_format_of_pixels_is_read_whatever_its_name(suffix: str, tmp_path: Path) -> None:
    flat = Image.new("RGB", (8, 8), (90, 90, 90))
    flat.save(tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").rename(tmp_path / "x.png")
    assert abs(images.decode(tmp_path / "x.png", None).astype(int) - 90).max() <= 2


def bomb(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that says it is of so many pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 9000), (2**30, 2**30)])
@pytest.mark.parametrize("turned_off", [True, False])
def test_a_decompression_bomb_is_refused_by_name(
    turned_off: bool, width: int, height: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Pillow's limit on, of which Pillow only warns up to twice as much; also where a program has none."""
    if turned_off:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (folder / "train" / "a" / "x.png").write_bytes(bomb(width, height))
    with pytest.raises(ValueError, match=r"a/x\.png: not a readable image \(.*pixels"):
        load(folder)


def test_the_limit_of_pixels_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(0).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert images.decode(tmp_path / "x.png", None).shape == (8, 8, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(ValueError, match=r"x\.png: not a readable image"):
        images.decode(tmp_path / "x.png", None)
