"""One checkpoint as files at every bit-width: size, accuracy, memory and time, and how long a switch takes.

`python benchmarks/serving.py` takes the networks of `experiments.deployed` of three seeds, trained by the profile
`small` (stored runs are read), and writes results/benchmarks/serving.csv. Each file is measured in a process of its
own (Linux), and the files take turns. Beside our ONNX files stand a network trained alike in full precision and
PyTorch's own static quantization of it to int8.

Claim: at every bit-width onnxruntime answers as the network in training does, on 99.9 % of the test images. The files
shrink with the bit-width, but fewer bits are not faster, since onnxruntime's CPU kernels compute in float32.
"""

import copy
import itertools
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, resident, write
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn

import emqlib as emq
from emqlib.deploy.onnx import native
from emqlib.paper import experiments, runs
from emqlib.paper.profiles import parameters
from emqlib.train.evaluate import batches

CPU = torch.device("cpu")
CALIBRATION = 500  # training images from which PyTorch's own int8 takes its ranges
MIB = 1.048576  # MB
ALL_BITS = tuple(range(1, 9))
CASE = ["runtime", "weights", "bits"]
UNITS = {"file": 1e3, "packed": 1e3, "arithmetic": 1e3, "load": 1e-3, "latency": 1e-3}  # KB and milliseconds
DIGITS = {"top1": 2, "agreement": 2, "difference": 5, "file": 1, "packed": 1, "arithmetic": 1, "load": 1}
DIGITS |= {"latency": 3, "images_a_second": 0, "peak": 0, "peak_batch": 0}
SIZES = (20, 30, 50, 100, 200, 300)  # KB, the ticks of the figure


def measure(
    model: nn.Module, full: nn.Module, data: emq.Dataset, bits: tuple[int, ...] = ALL_BITS, repeats: int = 5
) -> pd.DataFrame:
    """Measure the files of a converted network and of one in full precision.

    Args:
        model: the converted network, whose child models are exported.
        full: a converted network trained at 32 bits, of which PyTorch makes its own int8.

    Returns:
        A row a file and repeat: repeat, runtime, weights (their type in the file), bits; file, packed and arithmetic
        (bytes of the file, of the packed network's file and of its numbers alone); load, latency (seconds),
        images_a_second, peak and peak_batch (MiB); top1 (%), agreement (% of the test images on which the file answers
        as the network does) and difference (of logits, the largest).
    """
    images, labels = map(torch.cat, zip(*batches(data, "test", CPU, 500), strict=True))
    some = torch.cat([x for x, _ in batches(data, "train", CPU, 100, CALIBRATION)])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images.numpy())
        files = [onnx_file(network, b, images, folder) for network, b in (*((model, b) for b in bits), (full, 32))]
        files += torchscript_files(emq.pack(full, 32), some, images, folder)
        for repeat, (path, about, expected) in itertools.product(range(repeats), files):
            with get_context("spawn").Pool(1) as fresh:
                found, logits = fresh.apply(cost, (path, torch.get_num_threads()))
            rows.append({"repeat": repeat} | about | found | quality(logits, expected, labels.numpy()))
    return pd.DataFrame(rows)


File = tuple[Path, dict[str, object], np.ndarray]  # a file, what its rows say of it, and the logits it should give


def onnx_file(model: nn.Module, bits: int, images: Tensor, folder: Path) -> File:
    """Write a child model as an ONNX file."""
    path, child = folder / f"{bits}.onnx", emq.pack(model, bits)
    packed = path.with_suffix(".safetensors")
    emq.export_onnx(model, path, bits, images[:2])
    emq.save(child, packed)
    about = {"runtime": "onnxruntime", "weights": "float32" if bits == 32 else f"int{native(bits)}", "bits": bits}
    arithmetic = sum(t.numel() * t.element_size() for t in child.state_dict().values())
    about |= {"file": path.stat().st_size, "packed": packed.stat().st_size, "arithmetic": arithmetic}
    with emq.at_bits(model, bits):
        return path, about, answers(model, images)


def torchscript_files(plain: nn.Module, some: Tensor, images: Tensor, folder: Path) -> list[File]:
    """Write the plain network, and what PyTorch's own static quantization makes of it, as TorchScript."""
    files = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch announces that its quantization goes to a library of its own
        for weights, network in {"float32": plain, **torchs_own_int8(plain, some)}.items():
            path = folder / f"{weights}.pt"
            torch.jit.save(torch.jit.freeze(torch.jit.trace(network, images[:2]).eval()), path)
            about = {"runtime": "PyTorch", "weights": weights, "bits": 8 if weights == "int8" else 32}
            files.append((path, about | {"file": path.stat().st_size}, answers(plain, images)))
    return files


def torchs_own_int8(plain: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    """PyTorch's own static quantization of `plain`, with ranges from `images`; nothing in a PyTorch that has none."""
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError:
        return {}
    prepared = prepare_fx(copy.deepcopy(plain), get_default_qconfig_mapping("x86"), (images[:1],))
    prepared(images)
    return {"int8": convert_fx(prepared)}


def answers(network: nn.Module, images: Tensor) -> np.ndarray:
    """Logits (N, C) of images (N, 3, H, W), in evaluation mode."""
    with torch.no_grad():
        return torch.cat([network.eval()(part) for part in images.split(500)]).numpy()


def cost(path: Path, threads: int, batch: int = 128) -> tuple[dict[str, float], np.ndarray]:
    """What a file costs this process, which has loaded none before, and the logits of all images beside the file."""
    images = np.load(path.with_name("images.npy"))
    before, start = resident("VmRSS"), perf_counter()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = loaded(path, threads)
        found = {"load": perf_counter() - start, "latency": seconds(lambda: network(images[:1]))}
        found["peak"] = (resident("VmHWM") - before) / MIB
        found["images_a_second"] = len(images[:batch]) / seconds(lambda: network(images[:batch]))
        found["peak_batch"] = (resident("VmHWM") - before) / MIB
        return found, np.concatenate([network(images[i : i + 500]) for i in range(0, len(images), 500)])


def loaded(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The network of an ONNX file or of TorchScript: images (B, 3, H, W) to logits (B, C)."""
    if path.suffix == ".pt":
        torch.set_num_threads(threads)
        network = torch.jit.load(path)
        return lambda x: network(torch.from_numpy(x)).numpy()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # dequantize weights once, not in each call
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x})[0]


def seconds(call: Callable[[], object], least: float = 0.5) -> float:
    """Seconds of a call: the median of those that fit in `least` seconds, but of five or more."""
    call()  # allocates
    found: list[float] = []
    while len(found) < 5 or sum(found) < least:
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return float(np.median(found))


def quality(found: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and agreement (%) of logits (N, C) that were `found`, and how far off those `expected` they are."""
    right, same = found.argmax(1) == labels, found.argmax(1) == expected.argmax(1)
    difference = float(np.abs(found - expected).max())
    return {"top1": 100 * right.mean(), "agreement": 100 * same.mean(), "difference": difference}


def switches(model: nn.Module, data: emq.Dataset, bits: tuple[int, ...] = ALL_BITS, repeats: int = 20) -> pd.DataFrame:
    """Milliseconds until a network of `emqlib.models` answers at another bit-width.

    Returns:
        A row a way, bit-width and repeat: runtime (the way: `set_bits` of the network in memory, `emq.load` of a packed
        file, or a new session for an ONNX file), bits, repeat and switch (milliseconds).
    """
    rows, example = [], data.test.images[:2].float()
    with tempfile.TemporaryDirectory() as name:
        folder, threads = Path(name), torch.get_num_threads()
        for b in bits:
            emq.export_onnx(model, folder / f"{b}.onnx", b, example)
            emq.save(emq.pack(model, b), folder / f"{b}.safetensors")
        ways = {
            "set_bits": lambda b: emq.set_bits(model, b),
            "packed file": lambda b: emq.load(folder / f"{b}.safetensors"),
            "ONNX file": lambda b: loaded(folder / f"{b}.onnx", threads),
        }
        for repeat, b, way in itertools.product(range(-1, repeats), bits, ways):
            start = perf_counter()
            ways[way](b)
            row = {"runtime": way, "bits": b, "repeat": repeat, "switch": 1e3 * (perf_counter() - start)}
            rows += [row] if repeat >= 0 else []  # the first ones import and allocate
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians over repeats and seeds, a row a runtime and bit-width, then a row a way to switch.

    top1 and agreement in %, sizes in KB, memory in MiB, load, latency and switch in milliseconds.
    """
    files = rows[rows.switch.isna()].groupby(CASE, sort=False)[list(DIGITS)].median()
    table = files.assign(**{name: files[name] / unit for name, unit in UNITS.items()}).round(DIGITS).reset_index()
    ways = rows[rows.switch.notna()].groupby("runtime", sort=False).switch.median().round(2).reset_index()
    return pd.concat([table, ways], ignore_index=True).astype({"bits": "Int64"})


def figure(rows: pd.DataFrame) -> Axes:
    """Accuracy against the size of a file, a point a file, and milliseconds for one image, a dot a repeat."""
    rows = rows[rows.switch.isna()]
    sizes = {"packed": ("onnxruntime", "packed"), "ONNX": ("onnxruntime", "file"), "TorchScript": ("PyTorch", "file")}
    kinds = [rows[rows.runtime == of].assign(kind=kind, KB=rows[size] / 1e3) for kind, (of, size) in sizes.items()]
    points = pd.concat(kinds).groupby(["kind", "weights", "bits"], sort=False)[["KB", "top1"]].mean().reset_index()
    with sns.axes_style("whitegrid"):
        canvas, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=100, layout="constrained")
    sns.scatterplot(points, x="KB", y="top1", hue="kind", style="kind", palette="colorblind", s=40, ax=left)
    for point in points[points.kind == "packed"].itertuples():
        name = "float32" if point.bits == 32 else f"{point.bits:.0f}"
        left.annotate(name, (point.KB, point.top1), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    left.set(xscale="log", xlabel="size of the file (KB, logarithmic; above the points: bits)")
    left.set(ylabel="top-1 accuracy (%)", title="Accuracy by size")
    left.minorticks_off()
    left.set_xticks(SIZES, SIZES)
    left.legend(title=None, fontsize=8, loc="lower right")
    case = rows.runtime + ", " + rows.weights + rows.bits.map(lambda b: "" if b == 32 else f", {b} bits")
    sns.stripplot(rows.assign(case=case, ms=1e3 * rows.latency), x="ms", y="case", jitter=False, alpha=0.5, ax=right)
    right.set(xlim=(0, None), xlabel="milliseconds", ylabel="", title="One image at a time")
    right.tick_params(axis="y", labelsize=7)
    canvas.suptitle("One ResNet-8 on CIFAR-10, served at each bit-width", fontsize=10)
    return left


def described(run: runs.Run, data: emq.Dataset) -> dict[str, object]:
    """Which network a row is of, and where it was measured."""
    about = {"method": run.method, "dataset": run.dataset, "model": run.model, "trained_with": run.spec.correction}
    about |= {"trained_bits": " ".join(map(str, run.spec.bits)), "epochs": run.config.epochs, "seed": run.config.seed}
    return about | {"profile": run.profile, "run": run.hash} | runs.provenance(data, CPU)


if __name__ == "__main__":
    asked, measured = experiments.deployed(parameters("small")), []
    for run, full in zip(asked[::2], asked[1::2], strict=True):
        (model, data), (plain, _) = (runs.trained(one, RESULTS.parent) for one in (run, full))
        found = [measure(model.cpu(), plain.cpu(), data), *([] if measured else [switches(model, data)])]
        measured.append(pd.concat(found).assign(**described(run, data)))
    rows = pd.concat(measured, ignore_index=True)
    write("serving", rows, summary(rows), figure(rows))
