"""Tables, against numbers worked out by hand from a few rows."""

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
from pandas.io.formats.style import Styler

from emqlib import files
from emqlib.paper import tables as results

RUNS = count()


def run(
    method: str,
    accuracy: Mapping[int, tuple[float | None, float]],
    *,
    correction: str = "none",
    rate: float = 0.0,
    seed: int = 0,
    trained: tuple[int, ...] = (2, 4),
    passes: int = 1_000_000,
    scored: int = 0,
    steps: int = 100,
    seconds: float = 10.0,
    epochs: int = 4,
    candidates: float = 1.0,
) -> pd.DataFrame:
    """The rows of one run; accuracy: bit-width to top-1 in % without (None: not served) and with adaptation."""
    pairs = [
        (b, adapted, top1) for b, both in accuracy.items() for adapted, top1 in zip((False, True), both, strict=True)
    ]
    table = pd.DataFrame([(b, top1, b in trained, adapted) for b, adapted, top1 in pairs if top1 is not None])
    table.columns = ["bits", "top1", "trained", "adapted"]
    asked = {"method": method, "correction": correction, "pruning_rate": rate, "seed": seed}
    asked |= {"coreset": "tdds" if rate else "full data", "candidates": candidates, "epochs": epochs}
    cost = {"sample_passes": passes, "scoring_passes": scored, "steps": steps, "seconds": seconds}
    cost |= {"trained_bits": " ".join(map(str, trained)), "calibration_passes": 500_000 * table.adapted}
    return table.assign(**asked, run=f"{next(RUNS):012}", **cost)


def together(*runs: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(runs, ignore_index=True)


def table_1() -> pd.DataFrame:
    """Two seeds of ours, with and without correction, and pruned; two of Any-Precision; one of Dedicated."""
    full, pruned = {"passes": 8_000_000, "steps": 200}, {"passes": 1_600_000, "scored": 400_000, "steps": 40}
    return together(
        run("Ours", {2: (40, 70), 3: (50, 60), 4: (80, 82)}, **full),
        run("Ours", {2: (60, 80), 3: (30, 60), 4: (80, 84)}, seed=1, **full),
        run("Ours", {2: (66, 70), 3: (58, 60), 4: (81, 82)}, correction="mean_var", **full),
        run("Ours", {2: (74, 80), 3: (58, 60), 4: (83, 84)}, correction="mean_var", seed=1, **full),
        run("Ours", {2: (61, 62), 3: (52, 53), 4: (71, 72)}, correction="mean_var", rate=0.8, **pruned),
        run("Ours", {2: (63, 62), 3: (52, 53), 4: (75, 72)}, correction="mean_var", rate=0.8, seed=1, **pruned),
        run("Any-Precision", {2: (70, 70), 3: (None, 20), 4: (90, 90)}, passes=8_000_000, seconds=30),
        run("Any-Precision", {2: (72, 70), 3: (None, 30), 4: (92, 90)}, seed=1, passes=8_000_000, seconds=31),
        run("Dedicated", {2: (75, 74)}, trained=(2,), passes=4_000_000, seconds=11),
        run("Dedicated", {4: (91, 92)}, trained=(4,), passes=4_000_000, seconds=12),
    )


def columns(table: pd.DataFrame, *names: str) -> list[tuple]:
    """The named columns row by row, missing values as None."""
    part = table[list(names)].astype(object)
    return [tuple(row) for row in part.where(part.notna(), None).to_numpy()]


def test_what_was_not_told_is_a_group_too() -> None:
    rows = together(run("Ours", {2: (1, 2)}), run("Ours", {2: (3, 4)})).assign(candidates=[0.5, 0.5, None, None])
    rows = rows[~rows.adapted]
    assert columns(results.seed_means(rows, ["candidates"]), "candidates", "top1") == [(0.5, 1), (None, 3)]


def test_accuracy_table() -> None:
    table = results.accuracy_table(table_1())
    setting = ["method", "correction", "pruning_rate", "coreset", "candidates", "epochs"]
    assert list(table.columns) == [*setting, "adapted", "2*", "3", "4*"]
    assert columns(table, *setting[:3], "adapted", "2*", "3", "4*") == [
        ("Ours", "none", 0, False, "50.0 ± 14.1", "40.0 ± 14.1", "80.0 ± 0.0"),
        ("Ours", "none", 0, True, "75.0 ± 7.1", "60.0 ± 0.0", "83.0 ± 1.4"),
        ("Ours", "mean_var", 0, False, "70.0 ± 5.7", "58.0 ± 0.0", "82.0 ± 1.4"),
        ("Ours", "mean_var", 0, True, "75.0 ± 7.1", "60.0 ± 0.0", "83.0 ± 1.4"),
        ("Ours", "mean_var", 0.8, False, "62.0 ± 1.4", "52.0 ± 0.0", "73.0 ± 2.8"),
        ("Ours", "mean_var", 0.8, True, "62.0 ± 0.0", "53.0 ± 0.0", "72.0 ± 0.0"),
        ("Any-Precision", "none", 0, False, "71.0 ± 1.4", "", "91.0 ± 1.4"),
        ("Any-Precision", "none", 0, True, "70.0 ± 0.0", "25.0 ± 7.1", "90.0 ± 0.0"),
        ("Dedicated", "none", 0, False, "75.0", "", "91.0"),
        ("Dedicated", "none", 0, True, "74.0", "", "92.0"),
    ]
    rows = run("Ours", {8: (1, 2), 32: (3, 4), 2: (5, 6)}, trained=(32,))
    assert list(results.accuracy_table(rows).columns[7:]) == ["2", "8", "32*"]


def test_cost_table() -> None:
    """Accuracy is the mean over trained bit-widths, cost the sum over a method's networks; then means over seeds."""
    table = results.cost_table(table_1(), "table1")
    assert columns(table, "method", "correction", "pruning_rate", "top1 (%)", "adapted top1 (%)") == [
        ("Ours", "none", 0, "65.0 ± 7.1", "79.0 ± 4.2"),  # (40 + 80) / 2 and (60 + 80) / 2; 76 and 82
        ("Ours", "mean_var", 0, "76.0 ± 3.5", "79.0 ± 4.2"),  # 73.5 and 78.5
        ("Ours", "mean_var", 0.8, "67.5 ± 2.1", "67.0 ± 0.0"),  # 66 and 69
        ("Any-Precision", "none", 0, "81.0 ± 1.4", "80.0 ± 0.0"),  # 80 and 82
        ("Dedicated", "none", 0, "83.0", "83.0"),
    ]
    assert columns(table, "passes (M)", "scoring (%)", "steps", "seconds", "fewer passes", "faster") == [
        (8, 0, 200, 10, 1, 3.05),
        (8, 0, 200, 10, 1, 3.05),
        (1.6, 25, 40, 10, 5, 3.05),
        (8, 0, 100, 30, 1, 1),  # of 30 and 31 seconds: rounded half to even
        (8, 0, 200, 23, 1, 1.33),
    ]
    # Any-Precision's untrained 3 bits cannot be served without calibration, and ours can.
    assert list(table["calibration (M)"]) == [0, 0, 0, 0.5, 0]
    table = results.cost_table(run("Ours", {2: (40, 50)}), "table1")
    assert columns(table, "top1 (%)", "fewer passes") == [("40.0", None)]  # nothing to compare with
    rows = run("Any-Precision", {2: (60, 0), 3: (None, 0), 4: (None, 70)}, seconds=3)
    assert columns(results.with_cost(rows, "calibration"), "seed", "top1", "calibration") == [(0, 60, 0)]
    assert columns(results.with_cost(rows, "seconds"), "top1", "seconds") == [(60, 3)]
    with pytest.raises(ValueError, match="several runs of one setting and seed"):  # as if of two learning rates
        results.cost_table(together(rows, run("Any-Precision", {2: (60, 0)}, trained=(2, 4))), "table1")


def test_seconds_of_another_processor_are_missing() -> None:
    """Their mean over unlike processors would tell nothing; accuracies count all the same."""
    first = run("Any-Precision", {2: (60, 0)}, seconds=100).assign(processor="fast")
    other = run("Any-Precision", {2: (62, 0)}, seed=1, seconds=400).assign(processor="slow")
    rows = together(first, other, run("Ours", {2: (70, 0)}, rate=0.8, seconds=390).assign(processor="slow"))
    table = results.cost_table(rows, "table1")
    assert columns(table, "top1 (%)", "seconds", "faster") == [("61.0 ± 1.4", 100, 1), ("70.0", None, None)]
    assert columns(results.with_cost(rows, "seconds"), "top1", "seconds") == [(60, 100), (62, None), (70, None)]


def test_what_is_saved_is_against_the_first_any_precision() -> None:
    """A second one of as many epochs, as with other batches, is compared too."""
    first = run("Any-Precision", {2: (60, 0)}, passes=800, seconds=100)
    other = run("Any-Precision", {2: (62, 0)}, passes=800, seconds=125).assign(coreset="full data, batch_size=64")
    ours = run("Ours", {2: (50, 0)}, rate=0.8, passes=200, seconds=40)
    table = results.cost_table(together(first, other, ours), "table1")
    assert columns(table, "fewer passes", "faster") == [(1, 1), (1, 0.8), (4, 2.5)]


def curve() -> pd.DataFrame:
    """Any-Precision for 4 and 8 epochs, ours on the full data and pruned, with all of what it costs."""
    both = {"correction": "mean_var", "rate": 0.8, "candidates": 0.5}
    return together(
        run("Any-Precision", {2: (60, 0), 4: (70, 0)}, passes=800, seconds=100),
        run("Any-Precision", {2: (62, 0), 4: (70, 0)}, seed=1, passes=800, seconds=110),
        run("Any-Precision", {2: (70, 0), 4: (80, 0)}, epochs=8, passes=1600, seconds=200),
        run("Ours", {2: (64, 0), 4: (72, 0)}, correction="mean_var", passes=800, seconds=120),
        run("Ours", {2: (80, 0), 4: (84, 0)}, correction="mean_var", epochs=8, passes=1600, seconds=240),
        run("Ours", {2: (50, 0), 4: (50, 0)}, passes=100, seconds=30, **both),
        run("Ours", {2: (58, 0), 4: (60, 0)}, epochs=8, passes=200, seconds=60, **both),
    )


def test_comparison_of_run_lengths() -> None:
    table = results.comparison_table(curve(), "epochs", results.SETTING[:-1])
    assert list(table.columns) == ["method", "correction", "pruning_rate", "coreset", "candidates", 4, 8]
    assert columns(table, "method", "pruning_rate", "coreset", 4, 8) == [
        ("Any-Precision", 0, "full data", "65.5 ± 0.7", "75.0"),
        ("Ours", 0, "full data", "68.0", "82.0"),
        ("Ours", 0.8, "TDDS", "50.0", "59.0"),
    ]


def test_comparison_table() -> None:
    rows = together(
        run("Ours", {2: (50, 0), 4: (60, 0), 3: (0, 0)}, rate=0.5),
        run("Ours", {2: (52, 0), 4: (60, 0), 3: (0, 0)}, rate=0.5, seed=1),
        run("Ours", {2: (30, 0), 4: (40, 0)}, rate=0.8).assign(coreset="RS2"),
    )
    table = results.comparison_table(rows)
    assert columns(table, *table.columns) == [("TDDS", "55.5 ± 0.7", ""), ("random, each epoch (RS2)", "", "35.0")]
    assert list(table.columns) == ["coreset", 0.5, 0.8]


def options() -> pd.DataFrame:
    shared = {"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4}
    rows = [
        run("Ours", {2: (50, 52), 4: (60, 62)}, rate=0.8, passes=1500, candidates=0.3).assign(**shared),
        run("Ours", {2: (54, 52), 4: (60, 62)}, rate=0.8, passes=1500, candidates=0.3, seed=1).assign(**shared),
        run("Ours", {2: (40, 41), 4: (42, 43)}, rate=0.8, passes=3040).assign(**shared),
        run("Ours", {2: (44, 45), 4: (46, 47)}, rate=0.8, candidates=0.3).assign(
            **shared | {"batch_size": 64, "lr": 0.2}
        ),
        run("Ours", {2: (30, 31), 4: (32, 33)}, rate=0.8).assign(**shared, coreset="random"),
    ]
    return together(*rows).assign(scoring_epochs=lambda t: t.coreset.ne("random") * 3)


def test_names_tell_apart_all_that_differs() -> None:
    rows = options()
    names = list(dict.fromkeys(results.named(rows).coreset))
    assert names == ["tdds", "tdds, all candidates", "tdds, batch_size=64, lr=0.2", "random"]
    longer = rows.assign(epochs=rows.epochs + rows.coreset.eq("random"))
    assert set(results.named(longer, "epochs").coreset) - set(names) == {f"random, epochs={longer.epochs.max()}"}
    pd.testing.assert_frame_equal(rows, options().assign(run=rows.run))  # the rows themselves are left as they were


def test_coreset_table() -> None:
    """Means over draws and bit-widths, to three digits; what could not be computed is empty."""
    names = ["pruning_rate", "coreset", "candidates", "size", "union", "overlap", "drift", "rank_correlation"]
    names += ["clipped", "rarest_class", "commonest_class"]
    draws = [
        (0.8, "tdds", 1.0, 20, 0.4004, 0.2, None, 0.5, 0.0, 0.05, 0.2),
        (0.8, "tdds", 1.0, 20, 0.5, 0.4, 0.3, 0.7, 0.1, 0.07, 0.3),
        (0.8, "random", 1.0, 20, 0.5, 0.2, None, None, 0.0, 0.1, 0.1),
    ]
    table = results.coreset_table(
        pd.DataFrame(draws, columns=names).astype({"drift": float, "rank_correlation": float})
    )
    assert columns(table, *names) == [
        (0.8, "TDDS", 1, 20, 0.45, 0.3, 0.3, 0.6, 0.05, 0.06, 0.25),
        (0.8, "random, drawn once", 1, 20, 0.5, 0.2, None, None, 0, 0.1, 0.1),
    ]


def grown() -> pd.DataFrame:
    """2 and 3 bit-widths; 1,000 images, 10 epochs, of which 3 score all of a half."""
    rows = []
    for widths, b in (("2 4", 2), ("2 4 8", 3)):
        bits = dict.fromkeys(map(int, widths.split()), (1.0, 1.0))
        full = {"passes": 10_000 * b, "epochs": 10, "seconds": 10.0 * b}
        pruned = {"passes": 2900 * b, "scored": 1500 * b, "epochs": 10, "seconds": 3.0 * b}
        rows += [run("Ours", bits, **full).assign(trained_bits=widths)]
        rows += [run("Any-Precision", bits | {5: (None, 1.0)}, **full).assign(trained_bits=widths)]
        rows += [run("Ours", bits, rate=0.8, candidates=0.5, **pruned).assign(trained_bits=widths)]
    single = {"passes": 10_000, "epochs": 10, "seconds": 9.0}
    rows += [run("Dedicated", {w: (1.0, 1.0)}, trained=(w,), **single).assign(trained_bits=f"{w}") for w in (2, 4, 8)]
    return together(*rows).assign(n_train=1000, scoring_epochs=lambda t: t.pruning_rate.gt(0) * 3)


def test_growth_table() -> None:
    """Dedicated is a sum of networks, the others are what their runs took."""
    table = results.growth_table(grown())
    names = ("scheme", "bit-widths", "bits", "sample_passes", "calibration", "seconds")
    expected = []
    for b, bits in ((2, "2 4"), (3, "2 4 8")):
        full, pruned = 10_000 * b, 2900 * b
        expected += [
            ("Dedicated", b, bits, full, 0, 9 * b),
            ("Ours, full data", b, bits, full, 0, 10 * b),
            ("Any-Precision", b, bits, full, 500_000, 10 * b),
            ("Ours, 80% pruned, TDDS", b, bits, pruned, 0, 3 * b),
        ]
    assert columns(table, *names) == expected


def uncalibrated() -> pd.DataFrame:
    """Two seeds of own statistics, one of shared ones; bit-widths 1, 2, and 3, of which 2 is trained."""
    parts = []
    for norm, seed, gaps in (
        ("shared_affine", 0, (-30, -1, -2)),
        ("shared_affine", 1, (-30, -1, -1)),
        ("shared", 0, (-5, -12, 1)),
    ):
        accuracy = {b: (60.0 + gap, 60.0) for b, gap in zip((1, 2, 3), gaps, strict=True)}
        correction = "mean_var, output" if norm == "shared_affine" else "mean_var"
        parts.append(run("Ours", accuracy, correction=correction, seed=seed, trained=(2,)).assign(norm=norm))
    return together(*parts)


def test_adaptation_table() -> None:
    table = results.adaptation_table(uncalibrated())
    assert columns(table, *table.columns) == [
        ("own statistics, output correction", "-30.0 ± 0.0", "-1.0 ± 0.0", "-1.5 ± 0.7"),
        ("shared statistics", "-5.0", "-12.0", "1.0"),
    ]
    assert list(table.columns) == ["statistics", "1", "2*", "3"]


def test_statistics_table() -> None:
    """Columns are kinds of statistics, and the adapted network, whose rows name no kind."""
    one = run("Ours", {2: (50, 60), 4: (60, 64)}, rate=0.8)
    plain = one[~one.adapted]
    shared = plain.assign(statistics="shared", top1=plain.top1 - 5)
    table = results.statistics_table(together(plain.assign(statistics="own"), shared, one[one.adapted]))
    assert table.to_dict("records") == [
        {"coreset": "TDDS", "adapted": "62.0", "own statistics": "55.0", "shared statistics": "50.0"}
    ]


def test_untrained_table() -> None:
    rows = together(
        run("Any-Precision", {2: (70, 71), 3: (None, 40), 4: (90, 89)}, passes=8_000_000, seconds=20.4),
        run("Any-Precision", {2: (72, 71), 3: (None, 50), 4: (92, 89)}, seed=1, passes=8_000_000, seconds=21.4),
        run("Ours", {2: (66, 70), 3: (58, 60), 4: (81, 82)}, trained=(2,), correction="mean_var"),
    )
    rows["trained_bits"] = rows.method.map({"Any-Precision": "2 4", "Ours": "2"})
    table = results.untrained_table(rows)
    assert list(table.columns) == (
        ["trained_bits", "method", "correction", "2", "3", "4", "passes (M)", "calibration (k)", "seconds"]
    )
    assert [tuple(row) for row in table.to_numpy()] == [
        ("2 4", "Any-Precision", "none", "71.0 ± 1.4", "45.0 ± 7.1", "91.0 ± 1.4", 8.0, 500.0, 21.0),
        ("2", "Ours", "mean_var", "66.0", "58.0", "81.0", 1.0, 0.0, 10.0),
    ]


def test_transfer_table() -> None:
    def child(trained: tuple[int, ...], top1: dict[int, float], scheme: str, seed: int = 0, epochs: int = 8):
        rows = run("Ours", {b: (1.0, value) for b, value in top1.items()}, trained=trained, seed=seed)
        return rows.assign(trained_bits=" ".join(map(str, trained)), scheme=scheme, epochs=epochs)

    rows = together(
        child((2, 8), {8: 80, 2: 60}, "bitwise"),
        child((2, 8), {8: 80, 2: 62}, "bitwise", seed=1),
        child((8,), {2: 50, 8: 70}, "bitwise"),
        child((2,), {2: 55, 8: 66}, "bitwise"),
        child((2,), {2: 54}, "dedicated"),
        child((2,), {2: 52}, "dedicated", seed=1),
        child((8,), {8: 71}, "dedicated"),
        child((2,), {2: 51}, "dedicated", epochs=16),
        child((8,), {8: 73}, "dedicated", epochs=16),
    )
    assert [tuple(row) for row in results.transfer_table(rows).to_numpy()] == [
        (2, "53.0 ± 1.4", "50.0", "51.0", "61.0 ± 1.4", "8.0 ± 2.8"),
        (8, "71.0", "66.0", "73.0", "80.0 ± 0.0", "9.0"),
    ]


PAPER = "method,pruning_rate,metric,value,origin,source\n" + "\n".join(
    [
        "Ours,0.8,mean_top1,93.46,summary,Table 1",
        "Ours,0.8,time_ratio,7.88,abstract,Table 1",
        "Any-Precision,0,mean_top1,92.5,summary,Table 1",
        "Dedicated,,mean_top1,91.5,summary,Table 1",
        "Ours,0.8,something_else,1.0,summary,Table 1",
        "Ours,0.6,mean_top1,93.0,summary,Table 1",
    ]
)


def test_the_papers_numbers_stand_beside_ours_where_they_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "home", lambda: tmp_path)
    files.write_text(tmp_path / "results/paper/table1.csv", PAPER)
    rows = together(table_1(), run("Ours", {2: (60, 62), 4: (71, 72)}, rate=0.8))  # uncorrected: not the paper's method
    table = results.cost_table(rows, "table1")
    names = ("method", "correction", "pruning_rate", "summary: top1 (%)", "abstract: times faster")
    assert set(table.columns[-2:]) == set(names[-2:])
    assert columns(table, *names) == [
        ("Ours", "none", 0, None, None),
        ("Ours", "mean_var", 0, None, None),
        ("Ours", "mean_var", 0.8, 93.46, 7.88),
        ("Any-Precision", "none", 0, 92.5, None),
        ("Dedicated", "none", 0, None, None),
        ("Ours", "none", 0.8, None, None),
    ]
    without = ["top1 (%)", "passes (M)"]
    pd.testing.assert_frame_equal(table[without], results.cost_table(rows, "no such table")[without])
    assert list(results.cost_table(rows, "no such table").columns) == list(table.columns[:-2])


def test_the_committed_numbers_of_the_paper() -> None:
    reported = results.paper("table1")
    assert list(reported.columns) == ["method", "pruning_rate", "metric", "value", "origin", "source"]
    assert reported.source.str.contains("2510.20673").all()
    assert not reported.duplicated(["method", "pruning_rate", "metric"]).any()
    assert set(reported.method) <= {"Dedicated", "Any-Precision", "Ours"}
    table = results.cost_table(table_1(), "table1")
    assert columns(table[table.pruning_rate == 0.8], "summary: top1 (%)", "abstract: times faster") == [(93.46, 7.88)]
    assert list(results.paper("no such table").columns) == ["method", "pruning_rate", "metric", "value", "origin"]


def test_gap_table() -> None:
    """2 bits: the gap is 75 - 50, of which 60 - 50 and 70 - 50 are closed. 4 bits: 83.1 - 82.5 is less than a point."""
    rows = together(
        run("Ours", {2: (40, 70), 3: (50, 40), 4: (82.5, 83.1)}),
        run("Ours", {2: (60, 80), 3: (50, 40), 4: (82.5, 83.1)}, seed=1),
        run("Ours", {2: (60, 71), 3: (60, 61), 4: (83.0, 83.1)}, correction="mean"),
        run("Ours", {2: (70, 72), 3: (60, 62), 4: (83.0, 83.1)}, correction="mean_var"),
        run("Ours", {2: (0, 0), 3: (0, 0), 4: (0, 0)}, correction="mean_var", rate=0.8),
        run("Any-Precision", {2: (0, 0), 4: (0, 0)}),
        run("Dedicated", {2: (0, 0)}, trained=(2,)),
    )
    table = results.gap_table(rows)
    assert columns(table, "bits", "trained", "none", "mean", "mean_var") == [
        (2, True, 50, 60, 70),
        (3, False, 50, 60, 60),
        (4, True, 82.5, 83, 83),
    ]
    assert columns(table, "none, adapted", "mean, adapted", "mean_var, adapted") == [
        (75, 71, 72),
        (40, 61, 62),
        (83.1, 83.1, 83.1),
    ]
    assert columns(table, "mean closes (%)", "mean_var closes (%)") == [(40, 80), (None, None), (None, None)]
    assert list(results.gap_table(rows[rows.correction != "mean"]).columns[-1:]) == ["mean_var closes (%)"]
    for wrong in (rows[rows.correction == "mean_var"], rows[rows.method == "Dedicated"]):
        with pytest.raises(ValueError, match=r"^rows=.*expected runs of ours on the full data, without correction too"):
            results.gap_table(wrong)


def test_gap_of_a_point_counts_and_is_rounded_to_a_tenth() -> None:
    rows = together(
        run("Ours", {2: (50.0, 51.0), 4: (50.0, 50.75)}),
        run("Ours", {2: (50.25, 0), 4: (50.25, 0)}, correction="mean"),
        run("Ours", {2: (52.0, 0), 4: (52.0, 0)}, correction="mean_var"),
    )
    assert columns(results.gap_table(rows), "mean closes (%)", "mean_var closes (%)") == [(25, 200), (None, None)]
    parts = [run("Ours", {2: (top1, 80)}, seed=seed) for seed, top1 in enumerate((50, 50, 51))]
    table = results.gap_table(together(*parts, run("Ours", {2: (60, 0)}, correction="mean_var")))
    assert columns(table, "none", "mean_var closes (%)") == [(50.3, 32.6)]  # (60 - 151/3) / (80 - 151/3)


def test_save(tmp_path: Path) -> None:
    """The rows give the same tables when they are read again; a table alone leaves the rows where they are."""
    rows = table_1()
    results.save(results.cost_table(rows, "table1"), tmp_path / "small/01", rows)
    results.save(pd.DataFrame({"a": [1]}), tmp_path / "small/cost")
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"01.csv", "01.md", "cost.md"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "small/01.csv", dtype={"run": str}), rows)


def test_save_leaves_missing_cells_empty(tmp_path: Path) -> None:
    table = pd.DataFrame({"method": ["Ours", "Dedicated"], "passes": [1.5, 2.0], "paper": [93.46, None], "none": None})
    results.save(table, tmp_path / "a", table)
    lines = (tmp_path / "a.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["method", "passes", "paper", "none"]
    assert cells[2:] == [["Ours", "1.5", "93.46", ""], ["Dedicated", "2", "", ""]]
    assert (tmp_path / "a.csv").read_text() == "method,passes,paper,none\nOurs,1.5,93.46,\nDedicated,2.0,,\n"


def cells_of(style: Styler) -> list[list[str]]:
    """The cells of the body, as HTML."""
    body = style.to_html().split("<tbody>")[1]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]]


def test_a_table_is_shown_with_the_best_in_bold_and_spreads_in_grey() -> None:
    style = results.shown(results.accuracy_table(table_1()))
    cells = cells_of(style)
    assert [row[0] for row in cells][:2] == ["Ours, not corrected", "Ours, not corrected, adapted"]
    assert list(style.data.columns) == ["network", "epochs", "2*", "3", "4*"] and len(cells) == 10
    assert cells[0][2] == '50.0<span style="color: gray"> ± 14.1</span>'
    bold = [[name for name, cell in zip(style.data, row, strict=True) if "<b>" in cell] for row in cells]
    assert {name for names in bold for name in names} == {"2*", "3", "4*"}
    assert style.caption is None and "± 14.1" in repr(style)
    assert style.to_html() == results.shown(results.accuracy_table(table_1())).to_html()


def test_what_a_shown_table_leaves_out_is_said() -> None:
    """The last of the bit-widths that were not trained first; rows from the eleventh on."""
    names = ["statistics", "1", "2*", "3", "4*", "5", "6", "7", "8*"]
    style = results.shown(pd.DataFrame([["a", *map(str, range(8))]] * 12, columns=names))
    assert list(style.data) == ["statistics", "1", "2*", "3", "4*", "5", "8*"]
    assert style.caption == "the first 10 of 12 rows; without columns 6, 7"
    numbers = pd.DataFrame([[0.5, float("nan"), "<i>"]], columns=[0.5, "b", "c"], index=pd.Index([3], name="bits"))
    assert cells_of(results.shown(numbers, best=(), columns=3)) == [["3", "0.5", ""]]
    assert cells_of(results.shown(numbers)) == [["3", "0.5", "", "&lt;i&gt;"]]


def test_a_shown_table_is_in_words() -> None:
    found = pd.DataFrame({"trained_with": ["none", "mean_var"], "mean_shift, mean_var": [1, 2]})
    assert list(results.shown(found).data) == ["trained with", "mean shift, corrected"]
    assert [row[0] for row in cells_of(results.shown(found))] == ["not corrected", "corrected"]
