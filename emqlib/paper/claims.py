"""What the paper claims and what this project adds, with the numbers measured here and a verdict on each.

Every number in these texts is worked out from the rows of a CSV file below `results/`. After a change of rows or of a
text, `python -m emqlib.paper.claims` writes the tables of `results/README.md` and `README.md` again.
"""

import sys
from dataclasses import dataclass
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
    """The mean and, of several seeds, the standard deviation, with so many `digits`: "71.2 ± 0.3".

    values: one number for each seed, or rows, of which `seeds` takes the column `of`.
    """
    numbers = (seeds(values, of, **where) if isinstance(values, pd.DataFrame) else values).dropna()
    if numbers.empty:
        raise checks.invalid("values", "none", "numbers of the same seeds")
    mean = f"{round(numbers.mean(), digits) + 0.0:,.{digits}f}"  # + 0.0: a zero without a sign
    return mean + (f" ± {numbers.std():.{digits}f}" if len(numbers) > 1 else "")


def plain(values: pd.DataFrame | pd.Series, of: str = "top1", digits: int = 0, **where: Any) -> str:
    """The mean of `said` alone, for a number that all seeds share."""
    return said(values, of, digits, **where).partition(" ±")[0]


def claims(results: Path) -> list[Claim]:
    """The claims of the paper and then those beyond it; ValueError: rows that a claim is about are missing."""
    groups = (_correction, _children, _coresets, _scores, _cost, _transformers, _beyond, _speed, _large)
    paragraphs = [text for group in groups for text in group(checks.path("results", results)).split("\n\n")]
    return [Claim(*(" ".join(cell.split()) for cell in text.split("|"))) for text in paragraphs]


# Each of these functions returns claims as paragraphs, with "|" between the fields of `Claim`.


def _correction(results: Path) -> str:
    none, corrected = (read(results, "small/08_mismatch", bits=2, trained_with=c) for c in ("none", "mean_var"))
    full = {"method": "Ours", "pruning_rate": 0}
    rows = read(results, "small/01_cifar10", **full)
    states = (("none", False), ("mean_var", False), ("mean_var", True))
    two, eight = ([said(rows, bits=b, correction=c, adapted=a) for c, a in states] for b in (2, 8))
    curves, large = read(results, "small/01_cifar10_curves", **full), read(results, "benchmarks/paper_network", **full)
    short, long = at(curves, epochs=4), at(curves, epochs=8)
    return f"""
    Weight bias correction aligns the distributions of bit-widths | yes (Figure 3) | At 2 bits, correction reduces
    the shift of the mean from {said(none, "mean_shift", 2)} to {said(corrected, "mean_shift", 2)} standard
    deviations. It reduces the distance to the distribution at 8 bits from {said(none, "wasserstein", 3)} to
    {said(corrected, "wasserstein", 3)}. | partly | The distributions come closer but stay different, because
    quantized activations have another variance.

    One shared batch norm needs no calibration | yes | Accuracy at 2 bits: {two[0]} % uncorrected, {two[1]} %
    corrected, {two[2]} % corrected and calibrated. At 8 bits: {eight[0]}, {eight[1]} and {eight[2]} %. | partly |
    From 2 bits up, correction closes nearly all of the gap. Calibration still adds about a point.

    The same in a longer training | yes | At 2 bits, calibration adds {said(_gain(short, 2))} points after
    {plain(short, "epochs")} epochs and {said(_gain(long, 2))} after {plain(long, "epochs")}. On an H200, it adds
    {said(_gain(large, 2))} to the paper's network after {plain(large, "epochs")} epochs. | not supported | The
    longer the training, the less the shared statistics fit 2 bits. Own statistics (below) solve this.
    """


def _gain(rows: pd.DataFrame, bits: int) -> pd.Series:
    """How many points calibration gains."""
    return seeds(rows, bits=bits, adapted=True) - seeds(rows, bits=bits, adapted=False)


def _children(results: Path) -> str:
    rows = read(results, "small/10_untrained_bitwidths", method="Ours", trained_bits="2 4 8", adapted=False)
    reported = read(results, "paper/figure4", metric="angle")
    angles = read(results, "small/09_angles", layer="all layers", epoch=8)
    pairs = ((4, 8), (2, 4), (2, 8), (4, 4))
    high, low, ends, others = (said(angles, "angle", 0, bits=a, other_bits=b) for a, b in pairs)
    steps = read(results, "small/09_knowledge_transfer", adapted=True)
    without = ", ".join(said(steps, bits=b, trained_bits=rest) for b, rest in ((2, "4 8"), (4, "2 8"), (8, "2 4")))
    alone = ", ".join(said(steps, bits=b, trained_bits=str(b)) for b in (2, 4, 8))
    return f"""
    Bit-widths that were not trained work | yes | A network trained at 2, 4 and 8 bits and not calibrated has
    {said(rows, bits=1)} % at 1 bit, {said(rows, bits=3)} % at 3 bits, {said(rows, bits=4)} % at 4 bits and
    {said(rows, bits=6)} % at 6 bits. | partly | From 3 bits up, they are as accurate as their trained neighbours.
    At 1 bit, the network fails.

    The children's gradients align | below about {plain(reported, "value")} degrees (Figure 4) | After
    {plain(angles, "epoch")} epochs, the angle is {high} degrees between 4 and 8 bits, {low} between 2 and 4 bits,
    {ends} between 2 and 8 bits, and {others} between different images at 4 bits. | partly | They align far better
    than the gradients of different images. Only 4 and 8 bits are below the paper's angle.

    A child model gains from the steps of the others | yes | The others' steps alone give {without} % at 2, 4 and 8
    bits. Half as many steps of its own give {alone} %. All are calibrated. | supported | The others' steps help a
    child model more than half as many steps of its own do.
    """


def _coresets(results: Path) -> str:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    ours = at(curves, method="Ours", coreset="tdds")
    half, most, nearly_all = (said(ours, pruning_rate=rate) for rate in (0.5, 0.8, 0.9))
    hundred, tiny = (read(results, f"small/02_{name}", **AS_TRAINED) for name in ("cifar100", "tinyimagenet"))
    return f"""
    Coresets keep accuracy up to 80 % pruning |
    {plain(read(results, "paper/table1", metric="mean_top1"), "value", 2)} % at 80 % pruning (CIFAR-10) | CIFAR-10,
    {plain(ours, "epochs")} epochs: {said(curves, method="Any-Precision")} % with Any-Precision; with TDDS coresets
    {half} % at 50 % pruning, {most} % at 80 % and {nearly_all} % at 90 %. CIFAR-100 and TinyImageNet at 80 %:
    {said(hundred, pruning_rate=0.8)} % and {said(tiny, pruning_rate=0.8)} %, against
    {said(hundred, method="Any-Precision")} % and {said(tiny, method="Any-Precision")} % with Any-Precision. |
    partly | At 50 % they do. At 80 %, a coreset chosen once loses at equal epochs but wins at equal passes (below).
    """


def _scores(results: Path) -> str:
    rows = read(results, "small/05_coreset_comparison", **AS_TRAINED)
    tdds, random, longer = (
        ", ".join(said(rows, coreset=name, pruning_rate=rate) for rate in (0.5, 0.8, 0.9))
        for name in ("tdds", "RS2", "RS2, epochs=9")
    )
    options = read(results, "small/07_ablation_scoring_scheme", **AS_TRAINED)
    names = ("tdds", "tdds, scoring=joint", "tdds, across_bits=identical")
    bitwise, joint, identical = (said(options, coreset=f"{name}, all candidates") for name in names)
    return f"""
    Importance beats random | yes | {plain(rows, "epochs", coreset="tdds")} epochs on {plain(rows, "n_train")}
    images at 50, 80 and 90 % pruning give {tdds} % with TDDS and {random} % with random coresets drawn each epoch
    (RS2). RS2 reaches {longer} % with the passes that TDDS and its scoring take. | not supported | TDDS is ahead at
    equal epochs, but not when random coresets also get the passes that scoring takes.

    Scores extracted bit-wise are better than joint ones (Table 7) | yes | At 80 % pruning and equal passes:
    {bitwise} % with bit-wise scores, {joint} % with joint scores, {identical} % with the same coreset for all
    bit-widths. | partly | Joint scoring also takes only a third of the steps. Coresets that differ by bit-width
    help as much when they are random, because they cover more images.
    """


def _cost(results: Path) -> str:
    curves = read(results, "small/01_cifar10_curves", epochs=8, **AS_TRAINED)
    joint, pruned = at(curves, method="Any-Precision"), at(curves, method="Ours", coreset="tdds")
    fewer, faster = (seeds(joint, of) / seeds(pruned, of, pruning_rate=0.8) for of in ("sample_passes", "seconds"))
    times = read(results, "benchmarks/schemes")
    alternating = seeds(times, "seconds", scheme="Any-Precision") / seeds(times, "seconds", scheme="ours, 80% pruned")
    large = read(results, "benchmarks/paper_network")
    many, few = at(large, coreset="tdds"), at(large, method="Any-Precision")
    names = ("table1", "table3", "tinyimagenet")
    ratios = [plain(read(results, f"paper/{name}", metric="time_ratio"), "value", 2) for name in names]
    return f"""
    Coresets save training time | {ratios[0]} times less on CIFAR-10, {ratios[1]} on ImageNet, {ratios[2]} on
    TinyImageNet | {plain(joint, "epochs")} epochs at 80 % pruning, with scoring, take {plain(fewer, digits=1)}
    times fewer passes and {said(faster)} times less time than Any-Precision; {said(alternating)} times less when
    both alternate in one process. | partly | Pruning 80 % can save a factor of five at most. The paper's ratios are
    above that.

    At equal cost ours is ahead of Any-Precision | yes | In {plain(pruned, "epochs")} epochs and no more time:
    {said(pruned, pruning_rate=0.5)} % at 50 % pruning against {said(joint)} %. The paper's network on an H200:
    {said(many, **AS_TRAINED)} % after {plain(many, "epochs")} epochs at 80 % pruning
    ({plain(many, "sample_passes")} passes) against {said(few, **AS_TRAINED)} % after {plain(few, "epochs")}
    ({plain(few, "sample_passes")}). | supported | Bit-wise training takes several optimizer steps where joint
    training takes one.
    """


def _transformers(results: Path) -> str:
    rows = [read(results, f"small/04_vit_{name}", pruning_rate=0, trained=True) for name in ("cifar10", "tinyimagenet")]
    ours = {"method": "Ours", "correction": "mean_var"}
    methods = (ours, {"method": "Any-Precision"}, {"method": "Dedicated"})
    here, there = ([said(part, **method) for method in methods] for part in rows)
    return f"""
    Vision transformers: bit-wise training of one network | yes | CIFAR-10: {here[0]} % against {here[1]} % with
    Any-Precision and {here[2]} % with dedicated networks. TinyImageNet: {there[0]}, {there[1]} and {there[2]} %. |
    supported | Ours takes several times as many optimizer steps in as many sample passes.

    Vision transformers: weight bias correction | yes | CIFAR-10: {said(rows[0], method="Ours", correction="none")}
    % without correction, {here[0]} % with it. | not supported | Correction does no harm but is not needed, because
    layer norm keeps no statistics.

    ImageNet-1K (Table 3) | {plain(read(results, "paper/table3", metric="time_ratio"), "value", 2)} times less time
    | Not run: the images and the GPU hours were not available. | not run | Notebook 03 runs in `smoke` on images
    from files. The README says what a full run needs.
    """


def _beyond(results: Path) -> str:
    rows = read(results, "small/06_without_calibration", norm="shared_affine", correction="mean_var, output")
    gaps = ", ".join(f"{said(-_gain(rows, b))} at {b} bit{'s' * (b > 1)}" for b in (1, 2, 3, 4, 8))
    equal = read(results, "small/07_equal_epochs", epochs=8, **AS_TRAINED)
    names = ("tdds, sample of all", "RS2", "el2n, how=sample, all candidates", "tdds, batch_size=128")
    tdds, random, el2n, chosen = (said(equal, coreset=name) for name in names)
    large = read(results, "benchmarks/paper_network", **AS_TRAINED)
    once = at(large, coreset="tdds")
    return f"""
    Beyond the paper: no calibration, by own statistics and output correction |  | Points above the calibrated
    network: {gaps}. | supported | `QuantSpec(norm="shared_affine", output_correction=True)` is as good as
    calibration from 2 bits up.

    Beyond the paper: 80 % pruning at equal epochs, with coresets drawn anew, small batches, own statistics |  |
    After {plain(equal, "epochs")} epochs: {tdds} % by TDDS, {random} % at random, {el2n} % by EL2N of one epoch on
    all data, {chosen} % with a coreset chosen once, {said(equal, method="Any-Precision")} % with Any-Precision. The
    paper's network on an H200, {plain(once, "epochs")} epochs: {said(large, method="Ours, own statistics")} %, and
    {said(once)} % with a coreset chosen once. | partly | Most of the loss disappears. One epoch on all data removes the
    rest. Small batches also help Any-Precision.
    """


def _speed(results: Path) -> str:
    codes = read(results, "benchmarks/any_precision")
    published, ours = at(codes, way="published code"), at(codes, way="ours, 80% pruned", epochs=5, epoch=4)
    steps = read(results, "benchmarks/steps", phase="training", network="resnet20")
    ways = [("compiled", "none"), ("compiled", "bfloat16"), ("eager", "none")]
    parts = [at(steps, mode=mode, precision=precision) for mode, precision in ways]
    single, half, eager = (said(seeds(part, "plain") / seeds(part, "ours"), digits=2) for part in parts)
    return f"""
    Time to an accuracy against the published Any-Precision code |  | Pre-activation ResNet-20 on
    {plain(published, "train")} images of CIFAR-10 and two cores reaches {plain(published, digits=1, epoch=9)} % in
    {plain(published, "seconds", epoch=9)} s with the published code, in {plain(ours, "seconds")} s with ours at 80
    % pruning. | supported | The recipe, bfloat16, bit-wise training and coresets each help
    ([table](benchmarks/any_precision.md)). One seed.

    A quantized training step costs nearly nothing |  | ResNet-20 on two cores has {single} of the plain network's
    speed in float32, {half} in bfloat16 (compiled, mean over 1 to 8 bits), and {eager} when not compiled. |
    supported | The compiler fuses the added work. brevitas and torchao are slower
    ([table](benchmarks/implementations.md)).
    """


def _large(results: Path) -> str:
    growth = read(results, "benchmarks/growth")
    pruned = at(growth, scheme="80% pruned", bit_widths=8, mode="compiled")
    trainings = seeds(pruned, "seconds") / seeds(growth, "seconds", scheme="full precision", bit_widths=1, mode="eager")
    graphs = read(results, "benchmarks/paper_network", method="Ours", pruning_rate=0, seed=0)
    files = read(results, "benchmarks/serving", runtime="onnxruntime")
    least = plain(files.groupby("seed").agreement.min(), digits=2)
    two, eight, full = (at(files, bits=b) for b in (2, 8, 32))
    smaller = plain(seeds(full, "file") / seeds(two, "file"), digits=1)
    slower = plain(seeds(two, "latency") / seeds(full, "latency"), digits=1)
    return f"""
    Eight bit-widths at 80 % pruning cost at most two trainings in full precision |  | ResNet-20 for
    {plain(pruned, "epochs")} epochs of {plain(pruned, "train")} images, compiled: {said(trainings, digits=2)}
    trainings. | supported | This holds for runs long enough to compile. Compilation is not counted
    ([growth](benchmarks/growth.md)).

    ResNet-20 of width 80, five bit-widths, 200 epochs at 80 % pruning in under 3 minutes of an H100 |  | An H200
    with CUDA graphs makes {plain(seeds(graphs, "sample_passes") / seeds(graphs, "seconds"))} sample passes a
    second. | not supported | Ten million passes take a quarter of an hour. Compiled graphs were not measured: there
    was no time to compile.

    One checkpoint is served at every bit-width |  | ONNX files agree with the network on {least} % of the images or
    more. They have {said(two)} % accuracy at 2 bits, {said(eight)} % at 8 bits and {said(full)} % in float32. A
    file at 2 bits is {smaller} times smaller than in float32 and takes {slower} times as long. | partly | The files
    are smaller but not faster, because onnxruntime's CPU kernels compute in float32.
    """


def texts(root: Path) -> dict[Path, str]:
    """What `results/README.md`, with all claims, and `README.md`, with the paper's, are to hold."""
    table = pd.DataFrame(claims(root / "results"))
    tables = {root / "results/README.md": table, root / "README.md": table[table.paper != ""].drop(columns="why")}
    return {path: _written(path.read_text(), part) for path, part in tables.items()}


def _written(text: str, table: pd.DataFrame) -> str:
    """`text` with `table` between the two MARKS, each of which it must have once, in this order."""
    before, _, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end or any(mark in before + after for mark in MARKS):
        raise checks.invalid("text", text[:60], f"the marks {MARKS}, each once")
    rows = [list(table), ["---"] * table.shape[1], *table.to_numpy()]
    note = "Accuracies for which no bit-width is named are means over the trained bit-widths."
    lines = [before + MARKS[0], *(f"| {' | '.join(row)} |" for row in rows), "", note, "", MARKS[1] + after]
    return "\n".join(lines)


def main(root: Path) -> None:
    """Write both files again, for the project at `root`."""
    for path, text in texts(checks.path("root", root)).items():
        write_text(path, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else home())
