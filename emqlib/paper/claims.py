"""What the paper claims and what this project adds, with the numbers measured here and a verdict on each.

Every number in these texts is worked out from the rows of a CSV file below `results/`. After a change of rows or of a
text, `python -m emqlib.paper.claims` writes the tables of `results/README.md` and `README.md` anew.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from .. import checks
from ..files import home, write_text

MARKS = ("<!-- claims: python -m emqlib.paper.claims -->", "<!-- end of claims -->")
AS_TRAINED = {"trained": True, "adapted": False}  # at the trained bit-widths, without batch-norm adaptation


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    claim: str
    paper: str  # what the paper reports, empty for a claim of this project
    measured: str  # the same measured here
    verdict: Literal["supported", "partly", "not supported", "not run"]
    why: str


def read(results: Path, name: str, **where: Any) -> pd.DataFrame:
    """The rows of `results`/name.csv whose columns have the values `where`."""
    return at(pd.read_csv(results / f"{name}.csv"), **where)


def at(rows: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows whose columns have the values `where`."""
    for column, value in where.items():
        rows = rows[checks.table("rows", rows, [column])[column] == value]
    return rows


def seeds(rows: pd.DataFrame, of: str = "top1", **where: Any) -> pd.Series:
    """The mean of a column for each seed; rows without a seed count as one. ValueError: no rows, or no such column."""
    part = checks.table("rows", at(rows, **where), [of])
    return part.groupby(part.seed if "seed" in part else 0 * part.index)[of].mean()


def said(values: pd.DataFrame | pd.Series, of: str = "top1", digits: int = 1, **where: Any) -> str:
    """The mean and, of several seeds, the standard deviation: "71.2 ± 0.3".

    Args:
        values: rows, of whose column `of` and values `where` this is, or one number for each seed.
        digits: how many after the point.
    """
    numbers = (seeds(values, of, **where) if isinstance(values, pd.DataFrame) else values).dropna()
    return plain(numbers, digits=digits) + (f" ± {numbers.std():.{digits}f}" if len(numbers) > 1 else "")


def plain(values: pd.DataFrame | pd.Series, of: str = "top1", digits: int = 0, **where: Any) -> str:
    """The mean alone, as of what is the same in all rows."""
    numbers = (seeds(values, of, **where) if isinstance(values, pd.DataFrame) else values).dropna()
    if numbers.empty:
        raise checks.invalid("values", "none", "numbers of the same seeds")
    return f"{round(numbers.mean(), digits) + 0.0:,.{digits}f}"  # + 0.0: a zero without a sign


def claims(results: Path) -> list[Claim]:
    """The claims of the paper and then those beyond it, with numbers from the CSV files below `results`.

    ValueError: rows that a claim is about are missing.
    """
    groups = (_correction, _children, _coresets, _cost, _transformers, _beyond, _time, _large)
    return [claim for group in groups for claim in group(checks.path("results", results))]


def _correction(results: Path) -> Iterator[Claim]:
    none, corrected = (
        read(results, "small/08_mismatch", bits=2, trained_with=correction) for correction in ("none", "mean_var")
    )
    full = {"method": "Ours", "pruning_rate": 0}
    rows = read(results, "small/01_cifar10", **full)
    states = (("none", False), ("mean_var", False), ("mean_var", True))
    two, eight = ([said(rows, bits=b, correction=c, adapted=a) for c, a in states] for b in (2, 8))
    curves, large = read(results, "small/01_cifar10_curves", **full), read(results, "benchmarks/paper_network", **full)
    short, long = at(curves, epochs=4), at(curves, epochs=8)
    yield Claim(
        "Weight bias correction aligns the distributions of bit-widths",
        "yes (Figure 3)",
        "shift of the mean from the shared running mean at 2 bits, in standard deviations: "
        f"{said(none, 'mean_shift', 2)} without, {said(corrected, 'mean_shift', 2)} with it; distance to the "
        f"distribution at 8 bits {said(none, 'wasserstein', 3)} and {said(corrected, 'wasserstein', 3)}",
        "partly",
        "The distributions come much closer and do not become one: a channel's inputs have means of their own, and "
        "quantized activations another variance.",
    )
    yield Claim(
        "One shared batch norm needs no calibration",
        "yes",
        f"2 bits: {two[0]} % uncorrected, {two[1]} % corrected, {two[2]} % corrected and calibrated; 8 bits: "
        f"{eight[0]}, {eight[1]} and {eight[2]} %",
        "partly",
        "Correction closes nearly all of the uncorrected network's gap from 2 bits up; calibrating the corrected "
        "network still gains about a point.",
    )
    yield Claim(
        "The same in a longer training",
        "yes",
        f"ours on the full data, 2 bits, {plain(short, 'epochs')} and {plain(long, 'epochs')} epochs: "
        f"{said(_gain(short, 2))} and {said(_gain(long, 2))} points below the calibrated network; the paper's network, "
        f"{plain(large, 'epochs')} epochs on an H200: {said(_gain(large, 2))}",
        "not supported",
        "The longer the training, the less one table of running statistics fits 2 bits; own statistics for each "
        "bit-width (below) do away with it.",
    )


def _gain(rows: pd.DataFrame, bits: int) -> pd.Series:
    """How many points calibration gains."""
    return seeds(rows, bits=bits, adapted=True) - seeds(rows, bits=bits, adapted=False)


def _children(results: Path) -> Iterator[Claim]:
    rows = read(results, "small/10_untrained_bitwidths", method="Ours", trained_bits="2 4 8", adapted=False)
    reported = read(results, "paper/figure4", metric="angle")
    angles = read(results, "small/09_angles", layer="all layers", epoch=8)
    high, low, ends, others = (
        said(angles, "angle", 0, bits=a, other_bits=b) for a, b in ((4, 8), (2, 4), (2, 8), (4, 4))
    )
    steps = read(results, "small/09_knowledge_transfer", adapted=True)
    without = ", ".join(said(steps, bits=b, trained_bits=rest) for b, rest in ((2, "4 8"), (4, "2 8"), (8, "2 4")))
    alone = ", ".join(said(steps, bits=b, trained_bits=str(b)) for b in (2, 4, 8))
    yield Claim(
        "Bit-widths that were not trained work",
        "yes",
        f"trained at 2, 4 and 8 bits, not calibrated: 3 bits {said(rows, bits=3)} %, 6 bits {said(rows, bits=6)} %, "
        f"beside {said(rows, bits=4)} % at 4 bits; 1 bit {said(rows, bits=1)} %",
        "partly",
        "From 3 bits up they lie with their trained neighbours; 1 bit fails.",
    )
    yield Claim(
        "The children's gradients align",
        f"below about {plain(reported, 'value')} degrees (Figure 4)",
        f"after {plain(angles, 'epoch')} epochs: 4 and 8 bits {high}, 2 and 4 bits {low}, 2 and 8 bits {ends} degrees; "
        f"other images at 4 bits {others}",
        "partly",
        "Far closer than gradients of other images are, but below the paper's angle only between 4 and 8 bits.",
    )
    yield Claim(
        "A child gains from steps that only the others took",
        "yes",
        f"others' steps alone {without} % at 2, 4 and 8 bits; its own alone {alone} % (half as many); all calibrated",
        "supported",
        "Steps of the others take a child further than half as many of its own.",
    )


def _coresets(results: Path) -> Iterator[Claim]:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    pruned = at(curves, method="Ours", coreset="tdds")
    hundred, tiny = (read(results, f"small/02_{name}", **AS_TRAINED) for name in ("cifar100", "tinyimagenet"))
    by_score = read(results, "small/05_coreset_comparison", **AS_TRAINED)
    tdds, random, longer = (
        ", ".join(said(by_score, coreset=name, pruning_rate=rate) for rate in (0.5, 0.8, 0.9))
        for name in ("tdds", "RS2", "RS2, epochs=9")
    )
    options = read(results, "small/07_ablation_scoring_scheme", **AS_TRAINED)
    whole, joint, identical = (
        said(options, coreset=f"tdds{name}, all candidates")
        for name in ("", ", scoring=joint", ", across_bits=identical")
    )
    yield Claim(
        "Coresets keep accuracy up to 80 % pruning",
        f"{plain(read(results, 'paper/table1', metric='mean_top1'), 'value', 2)} % at 80 % pruning (CIFAR-10)",
        f"mean over trained bit-widths after {plain(pruned, 'epochs')} epochs of CIFAR-10: Any-Precision "
        f"{said(curves, method='Any-Precision')} %; TDDS coresets {said(pruned, pruning_rate=0.5)} % at 50 % pruning, "
        f"{said(pruned, pruning_rate=0.8)} % at 80 %, {said(pruned, pruning_rate=0.9)} % at 90 %; at 80 % CIFAR-100 "
        f"{said(hundred, pruning_rate=0.8)} against {said(hundred, method='Any-Precision')} %, TinyImageNet "
        f"{said(tiny, pruning_rate=0.8)} against {said(tiny, method='Any-Precision')} %",
        "partly",
        "At 50 % yes; at 80 % a coreset that is chosen once loses at equal epochs, and is ahead at equal passes "
        "(below).",
    )
    yield Claim(
        "Importance beats random",
        "yes",
        f"{plain(by_score, 'epochs', coreset='tdds')} epochs on {plain(by_score, 'n_train')} images, 50, 80 and 90 % "
        f"pruned: TDDS {tdds} %; random, drawn anew each epoch (RS2) {random} %; RS2 for as many passes as TDDS with "
        f"its scoring {longer} %",
        "not supported",
        "Ahead at equal epochs, but no more once random coresets get the passes that scoring costs.",
    )
    yield Claim(
        "Scores extracted bit-wise are better than joint ones (Table 7)",
        "yes",
        f"80 % pruned, at equal passes: {whole} % against {joint} %; coresets identical for all bit-widths {identical} "
        "%",
        "partly",
        "The direction holds, but joint scoring also makes a third of the steps meanwhile; coresets of its own gain a "
        "bit-width no more than random ones do, which cover more images too.",
    )


def _cost(results: Path) -> Iterator[Claim]:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    joint, pruned = at(curves, method="Any-Precision"), at(curves, method="Ours", coreset="tdds")
    fewer, faster = (seeds(joint, of) / seeds(pruned, of, pruning_rate=0.8) for of in ("sample_passes", "seconds"))
    schemes = read(results, "benchmarks/schemes")
    alternating = seeds(schemes, "seconds", scheme="Any-Precision") / seeds(
        schemes, "seconds", scheme="ours, 80% pruned"
    )
    large = read(results, "benchmarks/paper_network")
    many, few = at(large, coreset="tdds"), at(large, method="Any-Precision")
    names = ("table1", "table3", "tinyimagenet")
    ratios = [plain(read(results, f"paper/{name}", metric="time_ratio"), "value", 2) for name in names]
    yield Claim(
        "Coresets save training time",
        f"{ratios[0]} times less on CIFAR-10, {ratios[1]} on ImageNet, {ratios[2]} on TinyImageNet",
        f"80 % pruned against Any-Precision, scoring included: {plain(fewer, digits=1)} times fewer passes and "
        f"{said(faster)} times less time at {plain(joint, 'epochs')} epochs; alternating in one process "
        f"{said(alternating)} times less time",
        "partly",
        "By a factor of five at most, which is what pruning 80 % can give at equal bit-widths; the paper's ratios lie "
        "above it.",
    )
    yield Claim(
        "At equal cost ours is ahead of Any-Precision",
        "yes",
        f"{plain(pruned, 'epochs')} epochs, in no more time: {said(pruned, pruning_rate=0.5)} % at 50 % pruning "
        f"against {said(joint)} %; the paper's network on an H200, {said(many, **AS_TRAINED)} % after "
        f"{plain(many, 'epochs')} epochs at 80 % pruning ({plain(many, 'sample_passes')} passes) against "
        f"{said(few, **AS_TRAINED)} % after {plain(few, 'epochs')} ({plain(few, 'sample_passes')})",
        "supported",
        "Bit-wise training makes several optimizer steps for each of joint training's.",
    )


def _transformers(results: Path) -> Iterator[Claim]:
    full = {"pruning_rate": 0, "trained": True}
    here, there = (read(results, f"small/04_vit_{name}", **full) for name in ("cifar10", "tinyimagenet"))
    ours = {"method": "Ours", "correction": "mean_var"}
    ratio = plain(read(results, "paper/table3", metric="time_ratio"), "value", 2)
    yield Claim(
        "Vision transformers: bit-wise training of one network",
        "yes",
        f"ViT, mean over trained bit-widths: CIFAR-10 {said(here, **ours)} % against "
        f"{said(here, method='Any-Precision')} % for Any-Precision and {said(here, method='Dedicated')} % for "
        f"dedicated networks; TinyImageNet {said(there, **ours)}, {said(there, method='Any-Precision')} and "
        f"{said(there, method='Dedicated')} %",
        "supported",
        "At as many sample passes, with several times the optimizer steps.",
    )
    yield Claim(
        "Vision transformers: weight bias correction",
        "yes",
        f"ViT on CIFAR-10, mean over trained bit-widths: {said(here, method='Ours', correction='none')} % without, "
        f"{said(here, **ours)} % with it",
        "not supported",
        "Not wrong, but not needed: layer norm keeps no statistics that bit-widths would have to share.",
    )
    yield Claim(
        "ImageNet-1K (Table 3)",
        f"{ratio} times less time",
        "not run: neither its images nor the GPU-hours were at hand",
        "not run",
        "Notebook 03 runs in `smoke`, on images from files; see the README for what a run needs.",
    )


def _beyond(results: Path) -> Iterator[Claim]:
    rows = read(results, "small/06_without_calibration", norm="shared_affine", correction="mean_var, output")
    gaps = {b: said(-_gain(rows, b)) for b in (1, 2, 3, 4, 8)}
    equal, large = (
        read(results, "small/07_equal_epochs", epochs=8, **AS_TRAINED),
        read(results, "benchmarks/paper_network"),
    )
    chosen_once = at(large, coreset="tdds", **AS_TRAINED)
    yield Claim(
        "Beyond the paper: no calibration, by own statistics and output correction",
        "",
        f"points above the calibrated network, none of it calibrated: 2 bits {gaps[2]}, 3 bits {gaps[3]}, 4 bits "
        f"{gaps[4]}, 8 bits {gaps[8]}; 1 bit {gaps[1]}",
        "supported",
        '`QuantSpec(norm="shared_affine", output_correction=True)` is as good as calibration from 2 bits up, '
        "trained or not.",
    )
    yield Claim(
        "Beyond the paper: 80 % pruning at equal epochs, with coresets drawn anew, small batches, own statistics",
        "",
        f"after {plain(equal, 'epochs')} epochs: by TDDS {said(equal, coreset='tdds, sample of all')} %, at random "
        f"{said(equal, coreset='RS2')} %, by EL2N of one epoch on all data "
        f"{said(equal, coreset='el2n, how=sample, all candidates')} %, a coreset chosen once "
        f"{said(equal, coreset='tdds, batch_size=128')} %, Any-Precision {said(equal, method='Any-Precision')} %; the "
        f"paper's network on an H200, {plain(chosen_once, 'epochs')} epochs: "
        f"{said(large, method='Ours, own statistics', **AS_TRAINED)} % against {said(chosen_once)} % chosen once",
        "partly",
        "Most of the loss goes, and one epoch on all data takes the rest; Any-Precision gains from smaller batches too "
        "(notebook 7).",
    )


def _time(results: Path) -> Iterator[Claim]:
    codes = read(results, "benchmarks/any_precision")
    published, ours = at(codes, way="published code"), at(codes, way="ours, 80% pruned", epochs=5, epoch=4)
    steps = read(results, "benchmarks/steps", phase="training", network="resnet20")
    speed, half, eager = (
        said(seeds(steps, "plain", **how) / seeds(steps, "ours", **how), digits=2)
        for how in (
            {"mode": "compiled", "precision": "none"},
            {"mode": "compiled", "precision": "bfloat16"},
            {"mode": "eager", "precision": "none"},
        )
    )
    yield Claim(
        "Time to an accuracy against the published Any-Precision code",
        "",
        f"pre-activation ResNet-20, {plain(published, 'train')} images of CIFAR-10, two cores, to "
        f"{plain(published, digits=1, epoch=9)} % (mean over bit-widths): {plain(published, 'seconds', epoch=9)} s of "
        f"the published code, {plain(ours, 'seconds')} s of ours at 80 % pruning",
        "supported",
        "Ten times less, of which the recipe, bfloat16, bit-wise training and coresets each have a part ([factor by "
        "factor](benchmarks/any_precision.md)); one seed.",
    )
    yield Claim(
        "A quantized training step costs nearly nothing",
        "",
        f"two cores, compiled, mean over 1 to 8 bits, the plain network's speed is 1: ResNet-20 {speed} in float32, "
        f"{half} in bfloat16; not compiled {eager}",
        "supported",
        "Compiled, quantizers and correction are fused into what a step does anyway; brevitas and torchao are slower "
        "([implementations](benchmarks/implementations.md)).",
    )


def _large(results: Path) -> Iterator[Claim]:
    growth = read(results, "benchmarks/growth")
    pruned = at(growth, scheme="80% pruned", bit_widths=8, mode="compiled")
    trainings = seeds(pruned, "seconds") / seeds(growth, "seconds", scheme="full precision", bit_widths=1, mode="eager")
    graphs = read(results, "benchmarks/paper_network", method="Ours", pruning_rate=0, seed=0)
    files = read(results, "benchmarks/serving", runtime="onnxruntime")
    least = plain(files.groupby("seed").agreement.min(), digits=2)
    two, eight, full = (at(files, bits=b) for b in (2, 8, 32))
    smaller = plain(seeds(full, "file") / seeds(two, "file"), digits=1)
    slower = plain(seeds(two, "latency") / seeds(full, "latency"), digits=1)
    yield Claim(
        "Eight bit-widths at 80 % pruning cost at most two trainings in full precision",
        "",
        f"ResNet-20, {plain(pruned, 'epochs')} epochs of {plain(pruned, 'train')} images, compiled: "
        f"{said(trainings, digits=2)} trainings",
        "supported",
        "Where runs are long enough to compile; compilation is not counted ([growth](benchmarks/growth.md)).",
    )
    yield Claim(
        "ResNet-20 of width 80, five bit-widths, 200 epochs at 80 % pruning in under 3 minutes of an H100",
        "",
        f"on an H200, as CUDA graphs, {plain(seeds(graphs, 'sample_passes') / seeds(graphs, 'seconds'))} sample passes "
        "a second",
        "not supported",
        "These are ten million passes, a quarter of an hour; a graph of unfused kernels waits for memory. Compiled "
        "graphs were not measured: compiling took longer than the GPU was at hand.",
    )
    yield Claim(
        "One checkpoint is served at every bit-width",
        "",
        f"ONNX files answer as the network in training on {least} % of the images or more; {said(two)} % right at 2 "
        f"bits, {said(eight)} % at 8 bits, float32 {said(full)} %; a file at 2 bits is {smaller} times smaller than in "
        f"float32, an image takes {slower} times as long",
        "partly",
        "Smaller, not faster: onnxruntime's CPU kernels compute in float32.",
    )


def texts(root: Path) -> dict[Path, str]:
    """What `results/README.md`, with all claims, and `README.md`, with the paper's, are to hold."""
    table = pd.DataFrame(map(asdict, claims(root / "results")))
    tables = {root / "results/README.md": table, root / "README.md": table[table.paper != ""].drop(columns="why")}
    return {path: _written(path.read_text(), part) for path, part in tables.items()}


def _written(text: str, table: pd.DataFrame) -> str:
    """`text` with `table` between the two MARKS, each of which it must have once, in this order."""
    before, _, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end or any(mark in before + after for mark in MARKS):
        raise checks.invalid("text", text[:60], f"the marks {MARKS}, each once")
    lines = [list(table), ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join([before + MARKS[0], *(f"| {' | '.join(line)} |" for line in lines), "", MARKS[1] + after])


def main(root: Path) -> None:
    """Write both files anew, for the project at `root`."""
    for path, text in texts(checks.path("root", root)).items():
        write_text(path, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else home())
