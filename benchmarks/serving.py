"""One child model in each runtime, at every bit-width, beside the same network in float32: time, size, answers.

`python benchmarks/serving.py` exports four networks, runs the files in onnxruntime and OpenVINO and the frozen network
in PyTorch, and writes results/benchmarks/serving.csv. All take turns in one process, one thread each. A time is the
processor time of a call, all threads together, so that other work on the machine counts little; of the repeats the
table has the least. It also names the operations in which one image spends most of its time. ResNet-8 is trained on
20,000 images of CIFAR-10 for four epochs and kept in build/serving. The other networks are as they were made, and only
timed.

Claim: with integer kernels a file is at least 1.2 times as fast as float32 on processors with AVX2, twice with VNNI.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torchvision
from common import write
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import emqlib as emq
from emqlib import files
from emqlib.paper import plots, tables
from emqlib.paper.runs import provenance
from emqlib.train.evaluate import batches

CPU = torch.device("cpu")
ALL_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
SOME_BITS = (2, 4, 8, 32)
BATCH = 16  # images at a time where images a second are measured; a quarter of it at 224 pixels
CALIBRATION = 200  # training images from which the files take their ranges
CASE = ["network", "size", "runtime", "bits"]
Network = Callable[[np.ndarray], np.ndarray]


def runtimes(model: nn.Module, bits: int, some: Tensor, file: Path, every: bool) -> Iterator[tuple[str, Network]]:
    """One child model in each runtime that is installed, each with one thread; every: also compiled and in bfloat16."""
    emq.export_onnx(model, file, bits, some)
    yield "PyTorch", _in_pytorch(emq.freeze(model, bits), torch.float32)
    if every:
        yield "PyTorch, compiled", _in_pytorch(torch.compile(emq.freeze(model, bits)), torch.float32)
        half = emq.freeze(model, bits).bfloat16()
        yield "PyTorch, bfloat16", _in_pytorch(half, torch.bfloat16)
        yield "PyTorch, bfloat16, compiled", _in_pytorch(torch.compile(half), torch.bfloat16)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    yield "onnxruntime", lambda x: session.run(None, {"images": x})[0]
    try:
        import openvino
    except ImportError:
        return
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    yield "OpenVINO", lambda x: compiled(x)[0]


def _in_pytorch(network: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Network:
    return lambda x: network(torch.from_numpy(x).to(dtype)).float().numpy()


def measure(
    name: str,
    model: nn.Module,
    bits: tuple[int, ...],
    some: Tensor,
    repeats: int,
    test: tuple[Tensor, Tensor] | None,
    every: bool = False,
) -> pd.DataFrame:
    """Measure one network.

    Args:
        model: a converted network, whose child models are exported.
        some: images (N, 3, H, W) from which ranges are taken, and of which the first are timed.
        repeats: how often all take turns.
        test: images and labels, if the network is trained.
        every: as of `runtimes`.

    Returns:
        A row a runtime, bit-width and repeat: network, size (pixels), runtime, bits, repeat, file (bytes), kernels,
        latency (seconds of one image), images_a_second and, where there is a `test`, top1 and agreement (%).
    """
    cases, rows, many_graphs = {}, [], torch._dynamo.config.patch(recompile_limit=64)  # of each bit-width, type, batch
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), many_graphs:
        for b in bits:
            file = Path(folder) / f"{b}.onnx"
            for runtime, network in runtimes(model, b, some, file, every):
                about = {"network": name, "size": some.shape[-1], "runtime": runtime, "bits": b}
                about |= {"file": file.stat().st_size, "kernels": kernels(runtime, file, network, some[:1].numpy())}
                cases[runtime, b] = network, about | quality(model, b, network, test)
        one, many = some[:1].numpy(), some[:BATCH].numpy()
        for repeat, (network, about) in itertools.product(range(repeats), cases.values()):
            times = {"latency": seconds(network, one), "images_a_second": len(many) / seconds(network, many)}
            rows.append(about | {"repeat": repeat} | times)
    return pd.DataFrame(rows)


def kernels(runtime: str, file: Path, network: Network, x: np.ndarray, calls: int = 20) -> str:
    """The three kinds of operations in which one image spends most of its time, with their share of it (%).

    Of onnxruntime and PyTorch; of OpenVINO nothing.
    """
    times = Counter()
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix = str(file.with_suffix(""))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for _ in range(calls):
            session.run(None, {"images": x})
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event["name"].endswith("_kernel_time"):
                times[event["args"]["op_name"]] += event["dur"]
    elif runtime.startswith("PyTorch"):
        network(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(calls):
                network(x)
        for event in seen.key_averages():
            name = "compiled kernels" if "CompiledFxGraph" in event.key else event.key.removeprefix("aten::")
            times[name] += event.self_cpu_time_total
    most = times.most_common(3)
    return ", ".join(f"{name} {100 * time / times.total():.0f}" for name, time in most)


def quality(model: nn.Module, bits: int, network: Network, test: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """Accuracy and agreement (%) of what a runtime answers, beside the network itself."""
    if test is None:
        return {}
    images, labels = test
    found = torch.cat([torch.from_numpy(network(part.numpy())) for part in images.split(500)]).argmax(1)
    with emq.at_bits(model, bits):
        expected = torch.cat([model(part) for part in images.split(500)]).argmax(1)
    right, same = (found == labels).double().mean(), (found == expected).double().mean()
    trained = (expected == labels).double().mean()
    return {"top1": 100 * right.item(), "trained_top1": 100 * trained.item(), "agreement": 100 * same.item()}


def seconds(network: Network, x: np.ndarray, least: float = 0.05) -> float:
    """Processor seconds of a call: the least of three rows of calls, each of `least` seconds or more."""
    network(x)  # allocates
    start = process_time()
    network(x)
    count = max(1, round(least / max(process_time() - start, 1e-6)))
    found = []
    for _ in range(3):
        start = process_time()
        for _ in range(count):
            network(x)
        found.append((process_time() - start) / count)
    return min(found)


def _least(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a network, runtime and bit-width: the least time, and how many times as fast as float32 it is."""
    found = rows.groupby(CASE, sort=False)
    table = found.agg({"file": "first", "latency": "min", "images_a_second": "max", "top1": "first"})
    table = table.join(found[["trained_top1", "agreement", "kernels"]].first()).reset_index()
    full = table.loc[table.bits == 32, [*CASE[:3], "latency", "images_a_second"]]
    beside = table.merge(full, on=CASE[:3], suffixes=("", "_32"))
    table["faster, one"] = (beside.latency_32 / beside.latency).round(2)
    table["faster, batch"] = (beside.images_a_second / beside.images_a_second_32).round(2)
    table = table.assign(file=(table.file / 1e3).round(1), latency=(1e3 * table.latency).round(3))
    return table.round({"images_a_second": 0, "top1": 2, "trained_top1": 2, "agreement": 2})


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a network, runtime and bit-width: file, the least time, accuracy, agreement, and speed beside float32."""
    table = _least(rows)
    names = {"network": "network", "size": "image side (pixels)", "runtime": "runtime", "bits": "bit-width"}
    names |= {"file": "file (KB)", "latency": "latency (ms)", "images_a_second": "images a second", "top1": "top-1 (%)"}
    names |= {"trained_top1": "top-1 of the network (%)", "agreement": "same answers as the network (%)"}
    names |= {"faster, one": "one image: times as fast as float32"}
    names |= {"faster, batch": "batch: times as fast as float32", "kernels": "operations with most time (% of it)"}
    table = table.assign(network=table.network.map(tables.in_words), kernels=table.kernels.fillna(""))
    return table[[*names]].rename(columns=names)


def figure(rows: pd.DataFrame) -> Axes:
    """Accuracy and time of one image by bit-width in each runtime, and how much faster than float32 files are.

    1 bit is on a scale of its own; float32, which the network was not trained at, is left out.
    """
    table = _least(rows[~rows.runtime.str.contains(",")])
    with sns.axes_style("whitegrid"):
        figure, panels = pyplot.subplots(
            1, 3, figsize=(15, 4.2), width_ratios=(2, 1.2, 1.2), dpi=90, layout="constrained"
        )
    points = table[table.top1.notna() & table.bits.le(8)]
    points = points.assign(line=points.runtime, trained=points.bits.isin(SOME_BITS))
    plots.by_bits(panels[0], points, "top1", "top-1 accuracy (%)", legend=False)
    shared = {"hue": "runtime", "hue_order": list(dict.fromkeys(table.runtime)), "palette": "colorblind"}
    sns.lineplot(points, x="bits", y="latency", style="runtime", markers=True, **shared, legend=False, ax=panels[1])
    panels[1].set(xlabel="bit-width", ylabel="milliseconds for one image", ylim=(0, None))
    eight = table[table.bits == 8]
    chosen = eight.assign(case=eight.network.map(tables.in_words) + "\n" + eight["size"].astype(str) + " px")
    sns.barplot(chosen, y="case", x="faster, one", ax=panels[2], **shared)
    panels[2].axvline(1, **plots.NAMED, label="float32 in the same runtime")
    panels[2].legend()
    plots.finish(panels[2], "times as fast as float32, 8 bits", "")
    faster = chosen[chosen.runtime != "PyTorch"]["faster, one"]
    title = f"At 8 bits, ONNX files are {faster.min():.1f} to {faster.max():.1f} times as fast as float32"
    figure.suptitle(title, fontsize=10)
    return panels[0]


def trained_resnet8() -> tuple[nn.Module, emq.Dataset]:
    """ResNet-8 on a part of CIFAR-10."""
    path, data = files.home() / "build/serving/resnet8.safetensors", emq.load_dataset("cifar10").subset(20_000, 5000)
    if path.exists():
        return emq.load(path), data
    torch.manual_seed(0)
    model = emq.convert(emq.models.resnet8(10), emq.QuantSpec(bits=(2, 4, 8)))
    emq.train(model, data, emq.TrainConfig(epochs=4, batch_size=100, lr=0.1))
    emq.save(model, path)
    return model, data


def untrained(net: nn.Module, size: int) -> tuple[nn.Module, Tensor]:
    """A converted network whose batch norms and ranges have seen images of noise, and such images."""
    count = BATCH if size == 32 else BATCH // 4
    model, images = emq.convert(net, emq.QuantSpec(bits=(2, 4, 8))), torch.randn(count, 3, size, size)
    with torch.no_grad():
        model.train()(images)
    return model.eval(), images


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data = trained_resnet8()
    test = tuple(map(torch.cat, zip(*batches(data, "test", CPU, 500), strict=True)))
    some = torch.cat([x for x, _ in batches(data, "train", CPU, 100, CALIBRATION)])
    measured = [measure("resnet8", model, ALL_BITS, some, 3, test)]
    builders = {"resnet20": emq.models.resnet20, "resnet18": torchvision.models.resnet18}
    for name, build in (builders | {"mobilenet_v2": torchvision.models.mobilenet_v2}).items():
        torch.manual_seed(0)
        noisy, images = untrained(build(num_classes=1000), 32 if name == "resnet20" else 224)
        measured.append(measure(name, noisy, SOME_BITS, images, 3, None, every=name == "resnet20"))
    rows = pd.concat(measured, ignore_index=True).assign(seed=0, **provenance(data, CPU))
    write("serving", rows, summary(rows), figure(rows))
