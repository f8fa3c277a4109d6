"""Answers of an ONNX file that `emqlib.export_onnx` wrote: `python -m emqlib.deploy FILE IMAGES...`.

This module needs onnxruntime, NumPy and Pillow alone, so that a copy of it beside the file runs where there is no
PyTorch: `python __main__.py FILE IMAGES...`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def opened(file: str | Path) -> tuple[Any, dict[str, Any]]:
    """A session of onnxruntime, and what the file says of itself: network, bits, data and version.

    ValueError: there is no such file, or it does not say which data the network was trained on.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        raise ValueError(f"file={str(file)!r}: expected an ONNX file ({error})") from error
    about = json.loads(session.get_modelmeta().custom_metadata_map.get("emqlib", "{}"))
    if "mean" not in (about.get("data") or {}):
        expected = "one of emqlib.export_onnx, of a network that emqlib.train trained on images that it normalized"
        raise ValueError(f"file={str(file)!r}: expected {expected}")
    return session, about


def pixels(image: Image.Image, shape: Sequence[Any], about: dict[str, Any]) -> np.ndarray:
    """An image as the network takes it, (1, C, H, W) float32: cut and resized to `shape`, and normalized."""
    channels, height, width = shape[1:]
    if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):  # whose range is not known
        raise ValueError("32 bits a pixel; save it with 8 or 16")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if isinstance(height, int) and isinstance(width, int):
        border = (1 - about["data"].get("crop", 1)) / 2  # what is cut off of each side, as of the test images
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, bleed=border)
    values = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / 255
    mean, std = (np.asarray(about["data"][name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1)[None])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, for each image, its class, the probability of it and the milliseconds that the network took."""
    parser = argparse.ArgumentParser(prog="python -m emqlib.deploy", description="Classify images by an ONNX file.")
    parser.add_argument("file", help="a file that emqlib.export_onnx wrote")
    parser.add_argument("images", nargs="+", help="image files")
    given = parser.parse_args(arguments)
    try:
        session, about = opened(given.file)
        (taken,) = session.get_inputs()
        sys.stdout.write(f"{about['network']} at {about['bits']} bits, trained on {about['data']['name']}\n")
        for name in given.images:
            try:
                with Image.open(name) as image:
                    x = pixels(image, taken.shape, about)
            except (ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{name}: {error}") from error
            start = perf_counter()
            (logits,) = session.run(None, {taken.name: x})
            took = 1e3 * (perf_counter() - start)
            odds = np.exp(logits[0] - logits[0].max())
            best = int(odds.argmax())
            sys.stdout.write(f"{name}: class {best}, {odds[best] / odds.sum():.1%}, {took:.2f} ms\n")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
