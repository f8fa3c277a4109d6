"""The check of the tests: which mutants it makes of a source, and that the committed report is of the sources here."""

import ast

import mutation
import pandas as pd
import pytest
from mutants import identity, mutants

EXAMPLE = '''
"""What 1 + 1 is."""
def mean(values: list[int | None], *, low: float = 0.5) -> float:
    """The mean, 2 at least."""
    if not values:
        raise ValueError(f"values={len(values) + 1}: expected more")
    total = 0
    for v in values:
        total += v if v > 1 and v not in (3,) else -2
    values.sort(reverse=True)
    return max(total, 2) / len(values)
class Box:
    @property
    def open(self) -> bool:
        return self.x is None
'''
EXPECTED = {
    "mean: 0.5 -> 1.5",
    "mean: not values -> values",
    "mean: raise ValueError(f'values={len(values) + 1}: expected more') -> pass",
    "mean: total = 0 -> total = 1",
    "mean: total += v if v > 1 and v not in (3,) else -2 -> total -= v if v > 1 and v not in (3,) else -2",
    "mean: total += v if v > 1 and v not in (3,) else -2 -> pass",
    "mean: v > 1 and v not in (3,) -> v > 1 or v not in (3,)",
    "mean: v > 1 and v not in (3,) -> not (v > 1 and v not in (3,))",
    "mean: v > 1 and v not in (3,) -> v >= 1 and v not in (3,)",
    "mean: v > 1 and v not in (3,) -> v > 2 and v not in (3,)",
    "mean: v > 1 and v not in (3,) -> v > 1 and v in (3,)",
    "mean: v > 1 and v not in (3,) -> v > 1 and v not in (4,)",
    "mean: v if v > 1 and v not in (3,) else -2 -> v if v > 1 and v not in (3,) else 2",
    "mean: v if v > 1 and v not in (3,) else -2 -> v if v > 1 and v not in (3,) else -3",
    "mean: values.sort(reverse=True) -> pass",
    "mean: values.sort(reverse=True) -> values.sort(reverse=False)",
    "mean: return max(total, 2) / len(values) -> return None",
    "mean: max(total, 2) / len(values) -> max(total, 2) * len(values)",
    "mean: max(total, 2) / len(values) -> min(total, 2) / len(values)",
    "mean: max(total, 2) / len(values) -> max(total, 3) / len(values)",
    "Box.open: return self.x is None -> return None",
    "Box.open: return self.x is None -> return self.x is not None",
}


def test_every_place_of_an_example_is_changed_and_no_text() -> None:
    found = mutants("a.py", EXAMPLE)
    assert {mutant.id for mutant in found} == {f"a.py:{name}" for name in EXPECTED} and len(found) == len(EXPECTED)
    assert [m.line for m in found] == sorted(m.line for m in found)
    texts = {mutant.text for mutant in found}
    assert len(texts) == len(found)
    for text in texts:
        assert ast.get_docstring(ast.parse(text)) == "What 1 + 1 is." and "int | None" in text


def test_a_mutant_differs_in_one_line_and_can_be_compiled() -> None:
    original = ast.unparse(ast.parse(EXAMPLE)).splitlines()
    for mutant in mutants("a.py", EXAMPLE):
        compile(mutant.text, "a.py", "exec")
        lines = ast.unparse(ast.parse(mutant.text)).splitlines()
        assert len(lines) == len(original)
        assert sum(a != b for a, b in zip(lines, original, strict=True)) == 1


def test_names_do_not_depend_on_lines_and_tell_repetitions_apart() -> None:
    moved = EXAMPLE.replace("    total = 0", "    pass\n\n    total = 0")
    assert [mutant.id for mutant in mutants("a.py", moved)] == [mutant.id for mutant in mutants("a.py", EXAMPLE)]
    twice = mutants("a.py", "def f(a):\n    g(a, 1)\n    g(a, 1)\n")
    assert [mutant.id for mutant in twice] == [
        f"a.py:f: g(a, 1) -> {new}{count}" for count in ("", " #2") for new in ("pass", "g(a, 2)")
    ]


def test_only_some_functions() -> None:
    assert {mutant.function for mutant in mutants("a.py", EXAMPLE, ("mean",))} == {"mean"}
    with pytest.raises(ValueError, match=r"^only=\['median'\]: expected functions of a\.py$"):
        mutants("a.py", EXAMPLE, ("mean", "median"))


def test_the_table_of_an_example() -> None:
    found = mutants("a.py", "def f(a):\n    return a + 1\n")
    rows = mutation.table(found, dict(zip((m.id for m in found), ("killed", "survived", "timeout"), strict=True)))
    assert mutation.markdown(rows).splitlines() == [
        "| file | mutants | killed | survived | share killed |",
        "| --- | --- | --- | --- | --- |",
        "| a.py | 3 | 2 | 1 | 66.7% |",
        "| all | 3 | 2 | 1 | 66.7% |",
        "",
        "Of the killed ones 1 ran until their time was up. What survived, and why no test notices:",
        "",
        "- `a.py:f: return a + 1 -> return a - 1`: no reason known",
    ]


@pytest.fixture(scope="module")
def report() -> pd.DataFrame:
    return mutation.report()


def test_the_committed_report_kills_nine_tenths_of_what_the_sources_give_now(report: pd.DataFrame) -> None:
    every = mutation.all_mutants()
    found = {mutant.id: mutant.file for mutant in every}
    assert len(found) == len(every) > 900
    killed = {identity(row) for row in report[report.outcome.ne("survived")].to_dict("records")}
    for file in mutation.SOURCES:
        own = [name for name, of in found.items() if of == file]
        assert len(killed.intersection(own)) >= 0.9 * len(own), file
    assert set(report.outcome) <= {"killed", "timeout", "survived"}


def test_every_survivor_has_a_reason_and_no_other_mutant(report: pd.DataFrame) -> None:
    survivors = report[report.outcome.eq("survived")]
    assert survivors.reason.str.strip().ne("").all() and report[report.outcome.ne("survived")].reason.eq("").all()
    reasons = pd.read_csv(mutation.REASONS)
    assert sorted(reasons.id) == sorted(identity(row) for row in survivors.to_dict("records"))


def test_the_readme_says_how_many_are_killed(report: pd.DataFrame) -> None:
    share = 100 * report.outcome.ne("survived").mean()
    assert f"{share:.0f} % of the changes that a script makes" in (mutation.ROOT / "GUIDE.md").read_text()


def test_the_committed_table_is_what_the_rows_give(report: pd.DataFrame) -> None:
    assert mutation.REPORT.with_suffix(".md").read_text() == mutation.markdown(report)
