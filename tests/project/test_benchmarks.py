"""The benchmarks still run; what they measure is never a test's business."""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import matplotlib
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import emqlib as emq
from emqlib.paper.experiments import write_class_folders

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COMMITTED = sorted((FOLDER.parent / "results/benchmarks").glob("*.csv"))
matplotlib.use("agg")


def benchmark(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def digits() -> emq.Dataset:
    return emq.load_dataset("digits").subset(40, 10)


@pytest.mark.usefixtures("drawn_as_committed")
def test_every_benchmark_has_rows_a_table_and_a_figure_that_its_rows_give(tmp_path: Path) -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"common", "redraw"}
    assert {path.stem for path in COMMITTED} == names
    for path in COMMITTED:
        shutil.copy(path, tmp_path)
    assert benchmark("redraw").redraw(tmp_path) == sorted(names)
    for path in COMMITTED:
        for kind in (".md", ".png", ".svg"):
            assert (tmp_path / path.name).with_suffix(kind).read_bytes() == path.with_suffix(kind).read_bytes()
    pyplot.close("all")


TINY = {"resnet8": {"width": 4}}
ON_LITTLE = {  # what each is asked to measure of a few digits, and how many rows that gives
    "implementations": ((("none",), ("eager",), ("plain", "ours")), {"repeats": 2, "batch": 4}, 8),
    "loading": ((TINY,), {"repeats": 2}, 2),
    "recording": ((("tdds", "el2n"),), {"repeats": 2}, 4),
    "schemes": ((), {"repeats": 2, "epochs": 4}, 6),
    "steps": ((TINY, ("none", "bfloat16"), ("eager",)), {"bits": (1, 8), "repeats": 2, "batch": 4}, 16),
}


def test_a_step_on_a_gpu_launches_less_than_a_third_of_what_it_did() -> None:
    pytest.importorskip("triton")
    gpu_step = benchmark("gpu_step")
    rows = gpu_step.measure(width_factor=1, batch=8, bits=2)
    table = gpu_step.summary(rows).set_index("stage")
    assert table.loc["and activations", "all (kernels)"] * 3 <= table.loc["before", "all (kernels)"]
    same = table[["products (kernels)", "batch norm (kernels)", "operations (GFLOP)"]]
    assert same.nunique().eq(1).all()
    gpu_step.figure(rows)
    pyplot.close("all")


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="asks for the compiler's inside, as of PyTorch 2.14")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler would keep what it is told of another GPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_block_applies_a_batch_norm_clips_and_rounds_in_one_kernel() -> None:
    pytest.importorskip("triton")
    gpu_blocks = benchmark("gpu_blocks")
    rows = gpu_blocks.measure(width_factor=1, batch=64)
    found = rows[rows.direction.eq("forward") & rows.images]
    assert found.kernel.str.contains("batch_norm.*maximum_minimum.*round").sum() == 2  # two norms
    assert found.kernel.str.contains("batch_norm|round").sum() == 4  # besides, the first sums of their statistics
    assert gpu_blocks.summary(rows).launches.sum() == len(rows)
    pyplot.close(gpu_blocks.figure(rows).figure)


def test_the_script_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(FOLDER / "gpu.py"), str(tmp_path), "--dry"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    rows = pd.read_csv(tmp_path / "gpu.csv")
    assert rows.note.isna().all() and (rows.value[rows.part != "kernels"] > 0).all()
    errors = rows.value[rows.part == "kernels"]
    assert len(errors) == 18 and (errors < 1e-4).all() and (tmp_path / "gpu.png").exists()


@pytest.mark.processor
@pytest.mark.parametrize("name", ON_LITTLE)
def test_on_little_data(name: str, digits: emq.Dataset) -> None:
    """Each repeat measures the same cases, in times above zero; its rows give a table and a figure."""
    arguments, options, count = ON_LITTLE[name]
    module = benchmark(name)
    rows = module.measure(digits, *arguments, **options)
    assert len(rows) == count and set(rows.repeat) == {0, 1}
    cases = rows[rows.columns.intersection(["network", "score", "scheme", "implementation", "phase", "precision"])]
    assert cases[rows.repeat == 0].to_numpy().tolist() == cases[rows.repeat == 1].to_numpy().tolist()
    times = rows[rows.columns.intersection(["seconds", "plain", "ours", "recording", "batch", "step"])]
    assert not times.empty and (times > 0).all(axis=None)
    assert not module.summary(rows).empty
    pyplot.close(module.figure(rows).figure)


def test_schemes_count_their_passes(digits: emq.Dataset) -> None:
    schemes = benchmark("schemes")
    rows = schemes.measure(digits.subset(30, 10), repeats=1, epochs=4)
    passes = [3 * 4 * 30, *[3 * (3 * 8 + 6)] * 2]  # a phase of 3 epochs on 8
    assert rows.sample_passes.tolist() == passes
    assert schemes.summary(rows)["fewer sample passes (times)"].tolist() == [360 / count for count in passes]


def test_steps_take_each_network_in_its_faster_setting() -> None:
    steps = benchmark("steps")
    case = {"phase": "training", "network": "net", "precision": "none", "bits": 4, "batch": 1}
    seconds = {"eager": (2, 5), "compiled": (3, 4)}  # the plain network's and ours
    rows = [
        case | {"mode": mode, "repeat": repeat, "plain": slow * plain, "ours": slow * ours}
        for repeat, slow in enumerate((1, 3, 2))  # a machine whose own speed drifts
        for mode, (plain, ours) in seconds.items()
    ]
    table = steps.summary(pd.DataFrame(rows)).iloc[0]
    speeds = table["speed in eager (plain = 1), median"], table["speed at best (plain = 1)"]
    assert (*speeds, table["our faster setting"]) == (0.4, 0.5, "compiled")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_growth(digits: emq.Dataset) -> None:
    growth = benchmark("growth")
    threads, config = torch.get_num_threads(), emq.TrainConfig(epochs=4, lr=0.1)
    schemes = {"full precision": (), "80% pruned": (2, 4)}
    found = {scheme: growth._measured(scheme, bits, digits, config, 4, threads) for scheme, bits in schemes.items()}
    assert [found[scheme]["sample_passes"] for scheme in schemes] == [160, 2 * (3 * 11 + 8)]
    assert all(row["seconds"] > 0 for row in found.values())


def test_scaling() -> None:
    scaling = benchmark("scaling")
    small = {"train": 40, "width": 4, "epochs": 4, "dataset": "digits"}
    rows = scaling.measure([scaling.Case(**small), scaling.Case(**small, processes=2)], repeats=1)
    assert rows.sample_passes.tolist() == [3 * (3 * 11 + 8)] * 2 and (rows.seconds > 0).all()
    assert rows.device.str.startswith("2 x").tolist() == [False, True]
    assert scaling.summary(rows)["training time (first line = 1)"].iloc[0] == 1


def test_growth_counts_each_scheme_in_its_faster_mode() -> None:
    growth = benchmark("growth")
    seconds = {("full precision", "eager"): 10, ("full precision", "compiled"): 20}
    seconds |= {("80% pruned", "eager"): 30, ("80% pruned", "compiled"): 16}
    rows = pd.DataFrame(
        {"scheme": scheme, "bit_widths": 1, "mode": mode, "repeat": repeat, "sample_passes": 50, "peak": 1.0}
        | {"seconds": time * (1 + repeat)}  # a machine that slows down
        for repeat in (0, 1)
        for (scheme, mode), time in seconds.items()
    )
    table = growth.summary(rows).set_index("scheme")
    assert table["mode"].to_dict() == {"full precision": "eager", "80% pruned": "compiled"}
    assert table["training time (full precision = 1), median"].to_dict() == {"full precision": 1, "80% pruned": 1.6}
    assert table["sample passes (full precision = 1)"].to_dict() == {"full precision": 1, "80% pruned": 1}


def test_any_precision(tmp_path: Path) -> None:
    """Ours, each run once; the published code takes a checkout of it."""
    module, path = benchmark("any_precision"), tmp_path / "rows.csv"
    data = module.splits(emq.load_dataset("digits"), 40, 10)
    assert torch.equal(*(part.train.images for part in data)) and not torch.equal(*(part.test.images for part in data))
    case = module.Case(module.OURS, 3e-3, 10, False, 2)
    found = module.kept(path, *data)(case)
    assert module.kept(path, *data)(case) == found and pd.read_csv(path).seconds.item() > 0


def test_without_a_checkout(digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EMQ_ANY_PRECISION", raising=False)
    images, code = digits.train.images[:2].float(), ("published code",)
    with pytest.warns(UserWarning, match="published code: not run .EMQ_ANY_PRECISION=''"):
        assert benchmark("implementations").implementations(digits, images, code) == {}
    monkeypatch.setenv("EMQ_ANY_PRECISION", str(tmp_path))
    with pytest.raises(ValueError, match=r"^EMQ_ANY_PRECISION='.*': expected a checkout of SHI-Labs"):
        benchmark("any_precision").published()


def test_a_race_by_hand() -> None:
    module, rows = benchmark("any_precision"), []

    def held_out(case: tuple) -> float:
        luck, loss = (0, 1, -2, 1)[case.seed], 1000 * abs(case.lr - 3e-3) + (case.batch == 128) + case.distillation
        rows.append(case._asdict() | {"held_out": 51 + case.epochs + luck - loss, "top1": 1.0, "seconds": case.epochs})
        return rows[-1]["held_out"]

    module.race(held_out)
    raced = [(row["epochs"], row["seed"]) for row in rows[-7:]]
    assert raced == [(5, 1), (7, 1), (10, 1), (10, 2), (14, 1), (14, 2), (14, 3)]
    target, theirs, ours = module.finish(pd.DataFrame(rows))
    assert (target, set(theirs.batch), set(theirs.distillation), set(ours.epochs)) == (61, {42}, {False}, {14})
    assert module.summary(pd.DataFrame(rows))["times less time"].dropna().to_dict() == {17: 0.7}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_streaming() -> None:
    streaming = benchmark("streaming")
    data = streaming.enlarged(emq.load_dataset("digits").subset(32, 10), 48)
    assert data.train.images.shape == (32, 3, 48, 48)
    row = streaming._measured("gradient_angles", data, "resnet8", 48, torch.get_num_threads())
    assert row["peak"] == row["before"] + row["beyond"] and row["seconds"] > 0
    table = streaming.summary(pd.DataFrame([row, row | {"batch": 0}]))
    assert table.analysis.tolist() == ["gradient angles"] * 2
    assert table["images in a batch"].isna().tolist() == [False, True]
    assert streaming._size(nn.Sequential(nn.Linear(999, 250), nn.BatchNorm1d(250, affine=False))) == 1.002008


def test_decoding(tmp_path: Path) -> None:
    write_class_folders(emq.load_dataset("digits").subset(20, 10), tmp_path / "digits")
    decoding, found = benchmark("decoding"), []
    rows = decoding.measure(tmp_path / "digits/train", workers=(0, 1), repeats=2, batch=8)
    cases = [("now", 0), ("now", 1), ("with copies", 0)]
    assert list(zip(rows.way, rows.workers, strict=True)) == cases * 2 and list(rows.repeat) == [0] * 3 + [1] * 3
    assert set(rows.images) == {20} and list(decoding.summary(rows)["worker processes"]) == [0, 1, 0]
    files = decoding.listed(decoding.enlarged(tmp_path / "digits/train", tmp_path / "large", 12), 0).train.items
    for get in (decoding.copied, type(files).__getitem__):
        torch.manual_seed(0)
        found.append(get(files, 3)[0])
    assert torch.equal(*found)


def test_the_papers_network_is_trained_for_about_as_many_passes_by_each_method() -> None:
    paper_network = benchmark("paper_network")
    asked = paper_network.asked()
    rows = pd.read_csv(FOLDER.parent / "results/benchmarks/paper_network.csv")
    collapsed = {5: (2, 4, 4), 4: (2, 3, 4)}  # how release 1.0, which made the rows, scaled (100, 150, 180) of 200
    configs = [replace(r.config, milestones=collapsed.get(r.config.epochs, r.config.milestones)) for r in asked]
    hashes = [replace(run, config=config).hash for run, config in zip(asked, configs, strict=True)]
    assert list(dict.fromkeys(rows.run)) == hashes and set(rows.device) == {"NVIDIA H200"}
    table = paper_network.summary(rows)
    assert table["sample passes (millions)"].between(0.6, 0.81).all()
    assert table["summary of the paper: top-1 (%)"].notna().sum() == 1
