"""An ONNX file at work, with onnxruntime and NumPy alone: `python serving.py FILE IMAGES.npy` prints what it costs.

No other module of emqlib is imported, so that this file can go where PyTorch is not.
"""

import copy
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import checks
from .. import kernels as versions
from ..convert import at_bits, converted, set_bits
from ..deploy import io as saving
from ..deploy.onnx import export_onnx, native
from ..deploy.pack import pack, packed_bytes
from ..train.data import Dataset
from ..train.evaluate import batches

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


CALIBRATION = 500  # training images that PyTorch's own int8 takes its ranges from


def served(
    model: nn.Module, data: Dataset, full: nn.Module, bits: Iterable[int] = range(1, 9), repeats: int = 5
) -> pd.DataFrame:
    """What each child of a converted `model` costs as an ONNX file, beside another network in full precision and int8.

    full: a converted network trained at 32 bits, of which PyTorch's own static quantization makes the int8 one; both on
    the CPU. One row a runtime, bit-width and repeat, each measured in a process of its own by `cost`, the
    runtimes taking turns. Columns: runtime, weights (their type in the file), bits, repeat, those of `cost`,
    top1 (%), agreement (% of the test images on which the file answers as the network in training), difference (of
    logits, the largest), file and packed (bytes of that file and of what `saving.save` writes of a packed network), and
    arithmetic (bytes that the numbers of the packed network take). ValueError: networks not converted, no Dataset, bad
    bits, no number of repeats.
    """
    bits = _checked(model, data, bits, repeats)
    converted(full, "full")
    pairs = list(batches(data, "test", torch.device("cpu"), 500))
    images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images.numpy())
        cases = [_onnx(network, b, images, folder) for network, b in (*((model, b) for b in bits), (full, 32))]
        cases += _torchs_own(full, data, images, folder)
        rows = []
        for repeat, case in itertools.product(range(repeats), cases):
            found = _costs(case["path"], folder, answers=repeat == 0)
            logits = np.load(case["path"].with_suffix(".npy"))
            rows.append({"repeat": repeat} | case | found | _quality(logits, case["expected"], labels.numpy()))
    return pd.DataFrame(rows).drop(columns=["path", "expected"])


def _checked(model: nn.Module, data: Dataset, bits: Iterable[int], repeats: int) -> tuple[int, ...]:
    converted(model)
    checks.instance("data", data, Dataset, "a Dataset, for example load_dataset('cifar10')")
    checks.integer("repeats", repeats, 1)
    return checks.bit_widths("bits", bits)


def _logits(network: nn.Module, images: Tensor) -> np.ndarray:
    """Logits (N, C) of images (N, 3, H, W), in evaluation mode."""
    with torch.no_grad():
        return torch.cat([network.eval()(part) for part in images.split(500)]).numpy()


def _onnx(model: nn.Module, bits: int, images: Tensor, folder: Path) -> dict[str, Any]:
    """The child as an ONNX file, what the network itself answers, and what both kinds of file take."""
    path, child = folder / f"{bits}.onnx", pack(model, bits)
    export_onnx(model, path, bits, images[:2])
    saving.save(child, path.with_suffix(".safetensors"))
    with at_bits(model, bits):
        expected = _logits(model, images)
    case = {"runtime": "onnxruntime", "weights": "float32" if bits == 32 else f"int{native(bits)}", "bits": bits}
    case |= {"file": path.stat().st_size, "packed": path.with_suffix(".safetensors").stat().st_size}
    return case | {"arithmetic": packed_bytes(child), "path": path, "expected": expected}


def _torchs_own(full: nn.Module, data: Dataset, images: Tensor, folder: Path) -> list[dict[str, Any]]:
    """The network in full precision, and what PyTorch's own static quantization to int8 makes of it, as TorchScript."""
    plain, cases = pack(full, 32), []
    some = torch.cat([x for x, _ in batches(data, "train", torch.device("cpu"), 100, CALIBRATION)])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that its successor lives in a library of its own
        for weights, network in {"float32": plain, **_int8(plain, some)}.items():
            path = folder / f"{weights}.pt"
            torch.jit.save(torch.jit.freeze(torch.jit.trace(network, images[:2]).eval()), path)
            case = {"runtime": "PyTorch", "weights": weights, "bits": 8 if weights == "int8" else 32}
            cases.append(case | {"file": path.stat().st_size, "path": path, "expected": _logits(plain, images)})
    return cases


def _int8(plain: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """{"int8": what PyTorch's own static quantization makes of `plain`}, or nothing in a PyTorch that has none."""
    found = versions.static_quantization()
    if found is None:
        return {}
    mapping, prepare, convert = found
    prepared = prepare(copy.deepcopy(plain), mapping("x86"), (images[:1],))
    prepared(images)
    return {"int8": convert(prepared)}


def _costs(path: Path, folder: Path, answers: bool) -> dict[str, float]:
    """`cost` in a process that holds no more than the runtime; answers: logits of all go beside `path`."""
    threads, out = torch.get_num_threads(), str(path.with_suffix(".npy")) if answers else ""
    if path.suffix == ".pt":
        with get_context("spawn").Pool(1) as fresh:
            return fresh.apply(_torch_cost, (path, folder / "images.npy", threads, out))
    arguments = [sys.executable, __file__, path, folder / "images.npy", str(threads), out]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def _torch_cost(path: Path, images: Path, threads: int, out: str) -> dict[str, float]:
    torch.set_num_threads(threads)

    def load() -> Network:
        network = torch.jit.load(path)
        return lambda x: network(torch.from_numpy(x)).numpy()

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        x = np.load(images)
        found = cost(load, x)
        if out:
            np.save(out, logits(load(), x))
    return found


def _quality(found: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    answers = found.argmax(1)
    agreement = 100 * float((answers == expected.argmax(1)).mean())
    difference = float(np.abs(found - expected).max())
    return {"top1": 100 * float((answers == labels).mean()), "agreement": agreement, "difference": difference}


def switching(model: nn.Module, data: Dataset, bits: Iterable[int] = range(1, 9), repeats: int = 20) -> pd.DataFrame:
    """Milliseconds until a converted `model`, one of `emqlib.models` on the CPU, answers at another bit-width.

    One row a way, bit-width and repeat. "set_bits": of the trained network in memory. "packed file": `saving.load` of a
    packed network. "ONNX file": a new session of onnxruntime. model is left at another bit-width. ValueError: another
    network, bad bits.
    """
    bits = _checked(model, data, bits, repeats)
    if converted(model).emq.network is None:
        raise checks.invalid("model", type(model).__name__, "a converted network of emqlib.models")
    example, rows = data.test.images[:2].float(), []
    with tempfile.TemporaryDirectory() as folder:
        for b in bits:
            export_onnx(model, Path(folder, f"{b}.onnx"), b, example)
            saving.save(pack(model, b), Path(folder, f"{b}.safetensors"))
        ways = {
            "set_bits": lambda b: set_bits(model, b),
            "packed file": lambda b: saving.load(Path(folder, f"{b}.safetensors")),
            "ONNX file": lambda b: load(Path(folder, f"{b}.onnx"), torch.get_num_threads()),
        }
        for repeat, b, way in itertools.product(range(-1, repeats), bits, ways):
            start = perf_counter()
            ways[way](b)
            row = {"way": way, "bits": b, "repeat": repeat, "milliseconds": 1e3 * (perf_counter() - start)}
            rows += [row] if repeat >= 0 else []  # the first ones import and allocate
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
