"""The texts about the claims say what the rows say: every number, and no number that has no rows."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import claims
import pandas as pd
import pytest
from claims import Claim, at, plain, said, seeds
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def told() -> list[Claim]:
    return claims.claims(RESULTS)


@pytest.fixture(scope="module")
def used() -> set[str]:
    """The CSV files that claims are about."""
    names = set()
    with pytest.MonkeyPatch.context() as patch:
        read = claims.read
        patch.setattr(claims, "read", lambda results, name, **where: names.add(name) or read(results, name, **where))
        claims.claims(RESULTS)
    return names


def test_the_texts_are_those_of_the_rows() -> None:
    for path, text in claims.texts(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python results/claims.py"


def test_the_words_of_the_abstract_are_its_own(told: list[Claim]) -> None:
    """What is said to be of the abstract is a quotation of it, its numbers included, and nothing else is quoted."""
    abstract = " ".join((RESULTS / "paper/abstract.txt").read_text().split())
    quoted = [claim.claim for claim in told if claim.source == "abstract"]
    assert len(quoted) >= 7 and all(text[0] == text[-1] == '"' and text[1:-1] in abstract for text in quoted)
    assert not [claim.claim for claim in told if claim.source != "abstract" and '"' in claim.claim]
    reported = pd.concat([pd.read_csv(path) for path in (RESULTS / "paper").glob("*.csv")])
    assert all(
        (f"{value:g}" in abstract) == (origin == "abstract") for value, origin in reported[["value", "origin"]].values
    )


def test_every_verdict_has_an_interval(told: list[Claim]) -> None:
    for claim in told:
        compared = claim.verdict in ("consistent", "inconsistent", "inconclusive")
        assert claim.why.endswith(".") and (claim.source == "engineering") == (claim.verdict == ""), claim.claim
        assert not compared or claim.source == "summary" or re.search(r"[+-][\d.]+ \[", claim.measured), claim.claim


def test_intervals_and_verdicts_by_hand() -> None:
    """Student's t of a second library; the whole interval lies inside, outside, or neither."""
    values = pd.Series([1.0, 2.0, 4.5])
    for count, quantile in claims.STUDENT.items():
        assert stats.t.ppf(0.975, count - 1) == pytest.approx(quantile, rel=1e-3)
    expected = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert claims.interval(values) == pytest.approx(expected, rel=1e-3)
    assert claims.differs(values) == "+2.5 [-2.0, +7.0]" and claims.differs(values - values) == "+0.0 [+0.0, +0.0]"
    assert claims.verdict(values) == "inconclusive" and claims.verdict(values, -3) == "consistent"
    assert claims.verdict(values, -3, 6) == "inconclusive" == claims.verdict([values, values + 5])
    assert claims.verdict(values, 8) == "inconsistent" == claims.verdict([values + 9, values - 9])


def test_rows_behind_claims_say_where_they_come_from(used: set[str]) -> None:
    """The commit and the images of each row, or the paper's page; what the notebooks measure has three seeds."""
    for name in used:
        rows = pd.read_csv(RESULTS / f"{name}.csv")
        origin = ["source"] if name.startswith("paper/") else ["commit", "data_sha256"]
        assert rows[origin].notna().all(axis=None), name
        assert not name.startswith("small/") or rows.seed.nunique() >= 3, name


MEASURED = ["top1", "adapted_top1", "seconds", "sample_passes", "mean_shift", "wasserstein", "angle", "value", "plain"]
MEASURED += ["agreement", "file", "latency"]


def test_the_numbers_follow_their_rows(used: set[str], told: list[Claim], tmp_path: Path) -> None:
    """Of each file in turn all that is measured is changed: some claims change, and those about other files do not."""
    for name in used:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / f"{name}.csv", tmp_path / f"{name}.csv")
    assert claims.claims(tmp_path) == told
    changing = set()
    for name in sorted(used):
        path = tmp_path / f"{name}.csv"
        rows = pd.read_csv(path)
        columns = rows.columns.intersection(MEASURED)
        change = 3 * rows[columns].astype(float) + 1 if "bits" in rows or "metric" in rows else 3 * rows[columns]
        rows.assign(**(change.assign(seconds=change.seconds**2) if "seconds" in change else change)).to_csv(path)
        differing = {i for i, (new, old) in enumerate(zip(claims.claims(tmp_path), told, strict=True)) if new != old}
        assert 0 < len(differing) <= 5, name
        changing |= differing
        shutil.copy(RESULTS / f"{name}.csv", path)
    assert changing == set(range(len(told)))


def test_numbers_by_hand() -> None:
    """Mean and sample standard deviation over seeds, of the mean of each seed's rows; differences seed by seed."""
    values = {("a", 2): (1, 3), ("a", 4): (3, 5), ("b", 2): (10, 20), ("b", 4): (10, 20)}
    rows = pd.DataFrame(
        [
            {"way": way, "bits": bits, "seed": seed, "top1": value, "steps": 1000 * bits}
            for (way, bits), both in values.items()
            for seed, value in enumerate(both)
        ]
    )
    a, b = at(rows, way="a"), at(rows, way="b")
    assert said(a) == said(rows, way="a") == "3.0 ± 1.4" and plain(a, digits=2) == "3.00"
    assert said(a, bits=2) == "2.0 ± 1.4" and said(seeds(a) - seeds(a)) == "0.0 ± 0.0"
    assert said(seeds(b) - seeds(a)) == "12.0 ± 5.7" and said(seeds(b) / seeds(a), digits=2) == "5.00 ± 0.00"
    assert plain(a, "steps") == "3,000" and said(a.drop(columns="seed")) == "3.0"
    assert said(seeds(a, seed=0) - 2.04) == "-0.0".removeprefix("-")


def test_what_has_no_rows_is_refused() -> None:
    rows = pd.DataFrame({"bits": [2, 4], "seed": [0, 1], "top1": [1.0, 2.0]})
    for wrong, told in (({"bits": 9}, "rows='none'"), ({"bit": 2}, "the column 'bit' too")):
        with pytest.raises(ValueError, match=told):
            said(rows, **wrong)
    with pytest.raises(ValueError, match="the column 'top5' too"):
        said(rows, "top5")
    with pytest.raises(ValueError, match="numbers of the same seeds"):
        said(seeds(rows, seed=0) - seeds(rows, seed=1))
    for told in (claims.interval, claims.differs, claims.verdict):
        with pytest.raises(ValueError, match="numbers of the same seeds"):
            told(pd.Series([1.0, 2.0, float("nan")]))  # one side has a seed that the other lacks


# Numbers that no experiment gave: names, what was asked for, and what is counted in the sentence itself

SETTINGS = [
    r"CIFAR-100?|ResNet-\d+|ImageNet-1K|H[12]00|RS2|EL2N|int8|b?float(16|32)|top-1|arXiv 2510\.20673|NeurIPS 2025",
    r"[Nn]otebooks? \d+( and \d+)?|Figures? \d|Tables? \d",
    r"\d+( to \d+| and \d+)?(, \d+)*( and \d+)? bits?|from 1 to 8|trained at 2, 4 and 8",
    r"(2 and 8|4 and 8|2 and 4)(?=  )|[1-8] bits?  ",  # bit-widths before a number
    r"(50|60|80|90)(, 80)?( and 90)? %( pruning| pruned)?",
    r"95 % interval|Python 3\.11 to 3\.13|6 GB|width 80|200 epochs|3 minutes|speed is 1",
]


def numbers_without_rows(text: str) -> list[str]:
    """What is left of a text's numbers without code, links, comments and SETTINGS."""
    for pattern in (r"```.*?```", r"`[^`\n]*`", r"<!--.*?-->", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    for pattern in SETTINGS:
        text = re.sub(rf"(?<![\w.])({pattern})(?![\w])", " ", text)
    return re.findall(r"\S*\d\S*", text)


def test_no_number_stands_in_a_claim_that_was_not_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worked out is left out here."""
    for name in ("said", "plain", "differs", "part"):
        monkeypatch.setattr(claims, name, lambda *_, **__: " ")
    for claim in claims.claims(RESULTS):
        for text in asdict(claim).values():
            assert numbers_without_rows(text) == [], claim.claim


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_no_number_stands_beside_the_claims(name: str) -> None:
    parts = re.split("|".join(map(re.escape, claims.MARKS)), (ROOT / name).read_text())
    assert numbers_without_rows(parts[0] + parts[2]) == []


def test_a_number_that_was_not_worked_out_is_found() -> None:
    assert numbers_without_rows("71.2 % at 2 bits, 80 % pruned, `0.8`, CIFAR-10, [a](b/01.md)") == ["71.2"]
    assert numbers_without_rows("within 0.4 points, 4.4 times, ± 3") == ["0.4", "4.4", "3"]


def test_what_the_gallery_points_at_is_there() -> None:
    linked = re.findall(r"\]\(([^)]+)\)", (RESULTS / "README.md").read_text())
    assert len(linked) > 70
    assert not [path for path in linked if not path.startswith("https://") and not (RESULTS / path).exists()]
