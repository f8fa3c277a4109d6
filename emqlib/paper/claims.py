"""The claims, their numbers and verdicts: each number is worked out from the rows of a CSV and written into the texts.

`results/claims.toml` has each claim's texts with names in place of numbers, and for each name where its rows are.
`python -m emqlib.paper.claims` writes the tables of `results/README.md` and `README.md` anew, between two marks.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

from .. import checks
from ..files import home, write_text

VERDICTS = ("supported", "partly", "not supported", "not run")
MARKS = ("<!-- claims: python -m emqlib.paper.claims -->", "<!-- end of claims -->")
TABLES = {"results/README.md": ["claim", "paper", "measured", "verdict", "why"]}
TABLES["README.md"] = ["claim", "paper", "measured", "verdict"]
_KEYS = {"rows", "where", "of", "how", "minus", "over", "digits", "spread"}


def number(source: dict[str, Any], folder: Path) -> str:
    """What a text says of the rows of a CSV file below `folder`: mean ± standard deviation over seeds, "71.2 ± 0.3".

    source: rows, the file without suffix; where, the values (or lists of them) that its columns have in them; of, the
    column, "top1" without; how, "mean", "min", "max", "sum" or "nunique" of each seed's rows; minus or over, another
    source, or what differs in it, to take off or to divide by, seed by seed; digits after the point, 1 without; spread,
    False for the mean alone. ValueError: not so, no such rows, or rows that do not say where they come from.
    """
    value = _by_seed(checks.instance("source", source, dict, "a table of what the number is of"), Path(folder))
    for key, combine in {"minus": pd.Series.sub, "over": pd.Series.div}.items():
        if key in source:
            where = source.get("where", {}) | source[key].get("where", {})
            value = combine(value, _by_seed(source | source[key] | {"where": where}, Path(folder))).dropna()
    digits = checks.integer("digits", source.get("digits", 1), 0, 6)
    if value.empty:
        raise checks.invalid("source", source, "rows of the same seeds")
    spread = f" ± {value.std():.{digits}f}" if source.get("spread", True) and len(value) > 1 else ""
    return f"{round(value.mean(), digits) + 0.0:,.{digits}f}{spread}"  # a zero without a sign


def _by_seed(source: dict[str, Any], folder: Path) -> pd.Series:
    """The number of each seed; rows without seeds are of one."""
    if "rows" not in source or not set(source) <= _KEYS:
        raise checks.invalid("source", source, f"rows, and others of {', '.join(sorted(_KEYS))}")
    rows, how = pd.read_csv(folder / f"{source['rows']}.csv"), source.get("how", "mean")
    checks.choice("how", how, ("mean", "min", "max", "sum", "nunique"))
    for column, wanted in source.get("where", {}).items():
        checks.table("rows", rows, (column,))
        rows = rows[rows[column].isin(wanted if isinstance(wanted, list) else [wanted])]
    of = source.get("of", "top1")
    origin = ["source"] if source["rows"].startswith("paper/") else ["commit", "data_sha256"]
    if rows.empty or of not in rows or rows.reindex(columns=origin).isna().any(axis=None):
        raise checks.invalid("source", source, f"rows that have {', '.join([of, *origin])}")
    return rows.groupby(rows.seed if "seed" in rows else 0 * rows.index)[of].agg(how)


def _claims(folder: Path) -> list[dict[str, str]]:
    """The claims of `folder`/claims.toml, each with claim, paper, measured, verdict and why, numbers filled in.

    ValueError: a text missing, another verdict than VERDICTS, a name without a number or a number without a place.
    """
    with (checks.path("folder", folder) / "claims.toml").open("rb") as file:
        return [_filled(claim, Path(folder)) for claim in tomllib.load(file)["claim"]]


def _filled(claim: dict[str, Any], folder: Path) -> dict[str, str]:
    texts = {name: claim.get(name, "") for name in TABLES["results/README.md"]}
    checks.choice("verdict", texts["verdict"], VERDICTS)
    numbers = claim.get("numbers", {})
    named = set(re.findall(r"{(\w+)}", "".join(texts.values())))
    if not texts["why"] or named != set(numbers):
        raise checks.invalid("claim", texts["claim"], f"a why, and a number for each of {sorted(named ^ set(numbers))}")
    found = {name: number(_source(claim, name), folder) for name in numbers}
    return {name: re.sub(r"{(\w+)}", lambda match: found[match[1]], text) for name, text in texts.items()}


def _source(claim: dict[str, Any], name: str) -> dict[str, Any]:
    """Where the number `name` of `claim` is worked out from: the claim's own rows, where it names no others."""
    source = claim["numbers"][name]
    if "rows" in source:
        return source
    shared = {key: claim[key] for key in ("rows", "where") if key in claim}
    return shared | source | {"where": shared.get("where", {}) | source.get("where", {})}


def _written(text: str, table: list[dict[str, str]], columns: list[str]) -> str:
    """`text` with `columns` of `table` between the two MARKS. ValueError: it does not have them."""
    parts = re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text)
    if parts[1::2] != list(MARKS):
        raise checks.invalid("text", text[:60], f"the marks {MARKS}, each once")
    lines = ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(row[name] for name in columns)} |" for row in table]
    return "".join([*parts[:2], "\n".join([*lines, "", ""]), *parts[3:]])


def main(root: Path) -> None:
    """Write the tables of claims of the project at `root` anew: all in the gallery, the paper's own in the README."""
    for path, text in _texts(checks.path("root", root)).items():
        write_text(path, text)


def _texts(root: Path) -> dict[Path, str]:
    """What `main` writes: each file and its whole text."""
    table = _claims(root / "results")
    rows = {"results/README.md": table, "README.md": [claim for claim in table if claim["paper"]]}
    return {root / name: _written((root / name).read_text(), rows[name], columns) for name, columns in TABLES.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else home())
