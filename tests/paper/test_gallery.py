"""The gallery and the README say what the rows say: every number, and no number that has no rows."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from emqlib.paper import claims as gallery

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
CLAIMS = tomllib.loads((RESULTS / "claims.toml").read_text())["claim"]
NUMBERS = [(claim, name) for claim in CLAIMS for name in claim.get("numbers", {})]


def test_the_texts_are_those_of_the_rows() -> None:
    """`python -m emqlib.paper.claims` writes them anew."""
    for path, text in gallery._texts(ROOT).items():
        assert path.read_text() == text, f"{path.name}: python -m emqlib.paper.claims"


def test_every_claim_has_a_verdict_and_a_reason_and_the_papers_are_all_there() -> None:
    told = " ".join(claim["claim"] for claim in CLAIMS)
    wanted = ("aligns the distributions", "no calibration", "not trained work", "gradients align", "up to 80 % pruning")
    wanted += ("beats random", "bit-wise are better than joint", "save training time", "ImageNet")
    assert not [words for words in wanted if words not in told]
    assert all(claim["why"].endswith(".") and claim["verdict"] in gallery.VERDICTS for claim in CLAIMS)


@pytest.mark.parametrize(("claim", "name"), NUMBERS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_follows_its_rows(claim: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Where the rows that it is of change alone, it changes; where all others change, it does not."""
    source = gallery._source(claim, name)
    before = gallery.number(source, RESULTS)
    rows = pd.read_csv(RESULTS / f"{source['rows']}.csv")
    own = pd.Series(True, rows.index)
    for column, wanted in source.get("where", {}).items():
        own &= rows[column].isin(wanted if isinstance(wanted, list) else [wanted])
    of, place = source.get("of", "top1"), tmp_path / f"{source['rows']}.csv"
    place.parent.mkdir(parents=True)
    other_part, chosen_by_itself = "over" in source or "minus" in source, of in source.get("where", {})
    for changed, differs in ((own, True), (~own, False)):
        if not differs and (other_part or chosen_by_itself):  # other rows would belong to the number too
            continue
        rows.assign(**{of: rows[of].where(~changed, 3 * rows[of] + 1)}).to_csv(place, index=False)
        if other_part:
            for key in ("over", "minus"):
                if "rows" in source.get(key, {}):
                    shutil.copy(RESULTS / f"{source[key]['rows']}.csv", tmp_path / f"{source[key]['rows']}.csv")
        try:
            assert (gallery.number(source, tmp_path) != before) == differs
        except ValueError:
            assert chosen_by_itself  # there are no such rows any more


@pytest.mark.parametrize(("claim", "name"), NUMBERS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_of_the_notebooks_is_of_three_seeds(claim: dict[str, Any], name: str) -> None:
    source = gallery._source(claim, name)
    assert not source["rows"].startswith("small/") or len(gallery._by_seed(source, RESULTS)) >= 3


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Mean and sample standard deviation over seeds, of the mean of each seed's rows; differences seed by seed."""
    origin = {"commit": "c", "data_sha256": "d"}
    values = {("a", 2): (1, 3), ("a", 4): (3, 5), ("b", 2): (10, 20), ("b", 4): (10, 20)}
    rows = [
        {"way": way, "bits": bits, "seed": seed, "top1": value, "steps": 1000 * bits} | origin
        for (way, bits), both in values.items()
        for seed, value in enumerate(both)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)

    def told(way: str = "a", **source: Any) -> str:
        where = {"way": way} | source.pop("where", {})
        return gallery.number({"rows": "t", "where": where} | source, tmp_path)

    assert told() == "3.0 ± 1.4" and told(spread=False, digits=2) == "3.00"
    assert told(where={"bits": 2}) == "2.0 ± 1.4" and told(where={"bits": [2, 4]}) == "3.0 ± 1.4"
    assert told("b", minus={"where": {"way": "a"}}) == "12.0 ± 5.7" and told(minus={}) == "0.0 ± 0.0"
    assert told("b", over={"where": {"way": "a"}}, digits=2) == "5.00 ± 0.00"
    assert told(of="steps", digits=0, spread=False) == "3,000" and told(how="min") == "2.0 ± 1.4"


ROWS = {"rows": "small/01_cifar10"}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({}, "rows, and others of"),
        (ROWS | {"wher": {}}, "rows, and others of"),
        (ROWS | {"where": {"bits": 9}}, "rows that have top1, commit, data_sha256"),
        (ROWS | {"of": "top5"}, "rows that have top5"),
        (ROWS | {"digits": 7}, "digits=7"),
        (ROWS | {"how": "median"}, "how='median'"),
        (ROWS | {"where": {"seed": 0}, "minus": {"where": {"seed": 1}}}, "rows of the same seeds"),
        ({"rows": "small/05_coresets", "of": "size"}, "rows that have size, commit, data_sha256"),
    ],
    ids=str,
)
def test_a_number_without_rows(source: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        gallery.number(source, RESULTS)


CLAIM = {"claim": "a", "paper": "", "measured": "{n} %", "verdict": "partly", "why": "b.", "numbers": {"n": ROWS}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"verdict": "maybe"}, "verdict='maybe'"),
        ({"why": ""}, "a why, and a number"),
        ({"measured": "{n} {m}"}, r"a number for each of \['m'\]"),
        ({"measured": "none"}, r"a number for each of \['n'\]"),
    ],
)
def test_a_claim_that_is_not_whole(change: dict[str, str], told: str) -> None:
    assert gallery._filled(CLAIM, RESULTS)["measured"].endswith(" %")
    with pytest.raises(ValueError, match=told):
        gallery._filled(CLAIM | change, RESULTS)


@pytest.mark.parametrize("text", ["", gallery.MARKS[0], "".join(gallery.MARKS[::-1]), "".join(gallery.MARKS * 2)])
def test_a_text_without_its_marks(text: str) -> None:
    with pytest.raises(ValueError, match="the marks"):
        gallery._written(text, [], ["claim"])


# Numbers that no experiment gave: names, what was asked for, and what is counted in the sentence itself

SETTINGS = [
    r"CIFAR-100?|ResNet-\d+|ImageNet-1K|H[12]00|RS2|EL2N|int8|b?float(16|32)|top-1|arXiv 2510\.20673|NeurIPS 2025",
    r"[Nn]otebooks? \d+( and \d+)?|Figures? \d|Tables? \d",
    r"\d+( to \d+| and \d+)?(, \d+)*( and \d+)? bits?|from 1 to 8|trained at 2, 4 and 8",
    r"(2 and 8|4 and 8|2 and 4)(?=  )|[1-8] bits?  ",  # bit-widths before a number
    r"(50|60|80|90)(, 80)?( and 90)? %( pruning| pruned)?",
    r"Python 3\.11 to 3\.13|6 GB|width 80|200 epochs|3 minutes|speed is 1",
]


def numbers_without_rows(text: str) -> list[str]:
    """What is left of a text's numbers without code, links, comments and SETTINGS."""
    for pattern in (r"```.*?```", r"`[^`\n]*`", r"<!--.*?-->", r"\]\([^)]*\)", r"{\w+}"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    for pattern in SETTINGS:
        text = re.sub(rf"(?<![\w.])({pattern})(?![\w])", " ", text)
    return re.findall(r"\S*\d\S*", text)


def test_no_number_stands_in_a_claim_that_was_not_worked_out() -> None:
    for claim in CLAIMS:
        for name in ("claim", "paper", "measured", "why"):
            assert numbers_without_rows(claim.get(name, "")) == [], (claim["claim"], name)


@pytest.mark.parametrize("name", gallery.TABLES)
def test_no_number_stands_beside_the_claims(name: str) -> None:
    parts = re.split("|".join(map(re.escape, gallery.MARKS)), (ROOT / name).read_text())
    assert numbers_without_rows(parts[0] + parts[2]) == []


def test_a_number_that_was_not_worked_out_is_found() -> None:
    assert numbers_without_rows("71.2 % at 2 bits, 80 % pruned, `0.8`, CIFAR-10, [a](b/01.md)") == ["71.2"]
    assert numbers_without_rows("within 0.4 points, 4.4 times, ± 3") == ["0.4", "4.4", "3"]


def test_what_the_reasons_of_failed_claims_point_at_is_there() -> None:
    text = (RESULTS / "README.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    assert len(linked) > 80 and not [path for path in linked if not (RESULTS / path).exists()]
    assert json.loads((ROOT / "notebooks/07_ablation_scoring_scheme.ipynb").read_text())
