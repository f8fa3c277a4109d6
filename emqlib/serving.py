"""An ONNX file at work, with onnxruntime and NumPy alone: `python serving.py FILE IMAGES.npy` prints what it costs.

No other module of emqlib is imported, so that this file can go where PyTorch is not.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Network = Callable[[np.ndarray], np.ndarray]


def load(path: str | Path, threads: int = 0) -> Network:
    """The network in the ONNX file `path`: images (B, 3, H, W) float32 to logits (B, C).

    threads: how many compute, 0 for as many as there are cores. ImportError: no runtime. ValueError: no ONNX file.
    """
    _check("threads", threads, 0)
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("an ONNX file needs a runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Weights are dequantized at load, else in each call: for integer kernels, which an offset a channel rules out.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (images,) = session.get_inputs()
    except Exception as error:  # onnxruntime has a class for each cause, none of them a ValueError
        raise ValueError(f"path={str(path)!r}: expected an ONNX file of one input ({error})") from error
    return lambda x: session.run(None, {images.name: x})[0]


def _check(name: str, value: Any, low: int) -> None:
    if type(value) is not int or not low <= value < 2**31:
        raise ValueError(f"{name}={value!r}: expected an integer >= {low}")


def _check_images(images: Any) -> None:
    if not isinstance(images, np.ndarray) or images.ndim == 0 or len(images) == 0:
        raise ValueError(f"images={getattr(images, 'shape', images)!r}: expected an array (N, 3, H, W), N > 0")


def logits(network: Network, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """Logits (N, C) of images (N, 3, H, W), so many at a time. ValueError: no images, or no number of them."""
    _check("batch", batch, 1)
    _check_images(images)
    return np.concatenate([network(images[i : i + batch]) for i in range(0, len(images), batch)])


def seconds(network: Network, images: np.ndarray, least: float = 0.5) -> float:
    """Seconds of one call with all of `images`, the median of those that fit in `least` seconds, five at least."""
    if not isinstance(least, (int, float)) or not 0 <= least < float("inf"):
        raise ValueError(f"least={least!r}: expected a number of seconds >= 0")
    _check_images(images)
    network(images)  # allocates
    found: list[float] = []
    while len(found) < 5 or sum(found) < least:
        start = perf_counter()
        network(images)
        found.append(perf_counter() - start)
    return float(np.median(found))


def resident(name: str = "VmRSS") -> float:
    """Mebibytes of this process in memory: "VmRSS" now, "VmHWM" at most so far; not a number except on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), float("nan"))


def cost(load: Callable[[], Network], images: np.ndarray, batch: int = 128) -> dict[str, float]:
    """What a network costs this process, which has not asked before. ValueError: no images, or no number of them.

    load: makes it, in "load" seconds. latency: seconds for one image; images_a_second: with `batch` at a time. peak and
    peak_batch: the most memory so far, MiB beyond what the process held before, after the ones and after the batches.
    """
    _check("batch", batch, 1)
    _check_images(images)
    before, start = resident(), perf_counter()
    network = load()
    found = {"load": perf_counter() - start, "latency": seconds(network, images[:1])}
    found["peak"] = resident("VmHWM") - before
    found["images_a_second"] = len(images[:batch]) / seconds(network, images[:batch])
    return found | {"peak_batch": resident("VmHWM") - before}


def main(path: str, images: str, threads: str = "0", out: str = "") -> None:
    """Print, as JSON, the `cost` of a file with the images of another; out: where to write logits of all as .npy."""
    x = np.load(images)
    found = cost(lambda: load(path, int(threads)), x)
    if out:
        np.save(out, logits(load(path, int(threads)), x))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
