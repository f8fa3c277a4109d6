"""Which mistakes the tests would miss: every mutant (see mutants.py) of the SOURCES that no test notices.

For each mutant the tests of its module run, until the first that fails, on a copy of the package with the mutant in
it. They run in a fork of this process, which has loaded PyTorch, pandas and pytest but not emqlib; a child takes emqlib
from its copy, and checks that. Tests that found earlier mutants come first, then the quick ones. A mutant that takes
four times as long as the unchanged module counts as found. Nothing starts unless the unchanged modules pass.

`build/mutants.txt` gets a line a mutant, so that a run that was stopped goes on; a line counts while the mutant and the
tests are what they were. At the end `results/reliability/mutants.csv` and `.md` are written from it, with the reasons
in `mutation_survivors.csv` why no test can be expected to notice a survivor. `make mutants` calls it.
"""

import argparse
import ast
import hashlib
import importlib
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
import torchvision  # noqa: F401 - what emqlib imports, loaded once and not in every child
from hypothesis import Phase, settings
from mutants import Mutant, identity, mutants
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "emqlib"
REPORT = ROOT / "results" / "reliability" / "mutants.csv"
LOG = ROOT / "build" / "mutants.txt"
REASONS = Path(__file__).with_name("mutation_survivors.csv")
QUICK = "not every_run and (hash or name or row or record or draw or cost or derived or damaged or provenance)"
WHOLE = ("quantizers", "correction", "coreset", "files", "container", "results")
SOURCES = {f"{name}.py": [f"tests/test_{name}.py"] for name in WHOLE}  # the modules that are changed, the tests of each
SOURCES |= {name: ["tests/test_experiments.py", "-k", QUICK] for name in ("runs.py", "derived.py")}
# Those whose functions are also given wrong values; of the others nothing is asked from outside.
CHECKED = ("quantizers.py", "correction.py", "coreset.py", "results.py", "runs.py", "derived.py")
# What writes and reads rows in these, which do more.
WRITING = {"runs.py": ("_frame", "_stored", "_flat", "_asked"), "derived.py": ("_keep", "_kept")}
COLUMNS = ["file", "function", "line", "before", "after", "nth", "outcome", "reason"]
BROKEN = 99  # exit status of a child that could not run the tests


def all_mutants() -> list[Mutant]:
    """The mutants of all SOURCES."""
    texts = {file: (PACKAGE / file).read_text() for file in SOURCES}
    return [mutant for file, text in texts.items() for mutant in mutants(file, text, WRITING.get(file, ()))]


class _Order:
    """A pytest plugin: tests that failed before come first, then quick ones; notes times and what failed."""

    def __init__(self, killers: list[str], seconds: dict[str, float]) -> None:
        self.killers, self.known = killers, seconds
        self.seconds, self.failed = Counter[str](), ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {name: i for i, name in enumerate(self.killers)}
        items.sort(key=lambda item: (place.get(item.nodeid, len(place)), self.known.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = report.nodeid


def _copy(folder: Path) -> None:
    """What the tests of SOURCES read, its modules written as mutants are, from their syntax trees."""
    for name in ("emqlib", "tests", "results/paper", "results/small"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for file in SOURCES:
        (folder / "emqlib" / file).write_text(ast.unparse(ast.parse((PACKAGE / file).read_text())))


def _tested(folder: Path, file: str, order: _Order) -> int:
    """In a child: pytest's exit status for the tests of `file` on the package in `folder`."""
    assert not [name for name in sys.modules if name.split(".")[0] == "emqlib"]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = bool(order.known)  # what the first call leaves is of tests and modules that stay
    try:
        package = importlib.import_module("emqlib")
    except Exception:
        return pytest.ExitCode.TESTS_FAILED
    assert Path(package.__file__).parent == folder / "emqlib"
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    options += ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile=mutation"]
    status = pytest.main([*SOURCES[file], *options], plugins=[order])
    if status or file not in CHECKED:
        return status
    return pytest.main(["tests/test_bad_input.py", "-k", file.replace("py", ""), *options], plugins=[order])


def _fork(folder: Path, file: str, limit: float, order: _Order) -> int:
    """Start the tests of `file` in a child, and return its process. It leaves what `order` noted in `folder`."""
    (folder / "failed").write_text("")
    if child := os.fork():
        return child
    status = BROKEN
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        signal.alarm(int(5 * limit))  # for one that waits
        with (folder / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        status = _tested(folder, file, order)
        (folder / "failed").write_text(order.failed)
        pd.Series(order.seconds, dtype=float).to_json(folder / "seconds")
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _outcome(folder: Path, status: int) -> str:
    """What the end of a child says of its mutant; RuntimeError where the tests did not run."""
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL) else "killed"
    code = os.WEXITSTATUS(status)
    if code in (BROKEN, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError((folder / "output").read_text())
    return "killed" if code else "survived"


def outcomes(todo: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Each of `todo` with "killed", "timeout" or "survived", in the order in which they end, `jobs` at a time."""
    settings.register_profile("mutation", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    torch.set_num_threads(1)
    waiting, running = todo[::-1], dict[int, tuple[Mutant, Path]]()
    killers: dict[str, list[str]] = {file: [] for file in SOURCES}
    with TemporaryDirectory() as temporary:
        free = [Path(temporary, str(job)) for job in range(jobs)]
        seconds = _prepare(free, dict.fromkeys(mutant.file for mutant in todo))
        unchanged = {file: (free[0] / "emqlib" / file).read_text() for file in SOURCES}
        try:
            while waiting or running:
                while waiting and free:
                    mutant, folder = waiting.pop(), free.pop()
                    (folder / "emqlib" / mutant.file).write_text(mutant.text)
                    order = _Order(killers[mutant.file], seconds[mutant.file])
                    running[_fork(folder, mutant.file, 10 + 4 * sum(order.known.values()), order)] = mutant, folder
                child, status = os.wait()
                mutant, folder = running.pop(child)
                _end(child)
                (folder / "emqlib" / mutant.file).write_text(unchanged[mutant.file])
                free.append(folder)
                yield mutant, _outcome(folder, status)
                if failed := (folder / "failed").read_text():
                    killers[mutant.file] = list(dict.fromkeys([failed, *killers[mutant.file]]))
        finally:
            for child in running:
                _end(child)


def _prepare(folders: list[Path], files: Iterable[str]) -> dict[str, dict[str, float]]:
    """Fill `folders`; seconds of each test of `files` on the unchanged modules, RuntimeError if one fails."""
    seconds, first = {}, folders[0]
    _copy(first)
    for file in files:
        _, status = os.waitpid(_fork(first, file, 600, _Order([], {})), 0)
        if _outcome(first, status) != "survived":
            raise RuntimeError(f"{file} fails unchanged: " + (first / "output").read_text())
        seconds[file] = pd.read_json(first / "seconds", typ="series").to_dict()
    for file in SOURCES:  # what is compiled of these is of no mutant
        for path in first.glob(f"emqlib/__pycache__/{file.removesuffix('.py')}.*"):
            path.unlink()
    for folder in folders[1:]:
        shutil.copytree(first, folder, ignore=shutil.ignore_patterns("tmp"))
    return seconds


def _end(child: int) -> None:
    """Stop what a child has started, and itself."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _key(mutant: Mutant) -> str:
    """A hash of all that decides the outcome of `mutant`, other modules apart."""
    tests = [ROOT / name for name in ("tests/conftest.py", "tests/reference.py", SOURCES[mutant.file][0])]
    parts = [mutant.id, mutant.text, *SOURCES[mutant.file], *(path.read_text() for path in tests)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def table(found: list[Mutant], outcome: dict[str, str]) -> pd.DataFrame:
    """The report: COLUMNS, a row a mutant; outcome: by id."""
    reasons = pd.read_csv(REASONS, index_col="id", keep_default_na=False).reason
    rows = [vars(m) | {"outcome": outcome[m.id]} for m in found]
    rows = [row | {"reason": reasons.get(identity(row), "") if row["outcome"] == "survived" else ""} for row in rows]
    return pd.DataFrame(rows, columns=COLUMNS)


def report() -> pd.DataFrame:
    """The committed rows."""
    return pd.read_csv(REPORT, keep_default_na=False)


def markdown(rows: pd.DataFrame) -> str:
    """The report as it is read: shares by file, then the survivors with their reasons."""
    lines = ["| file | mutants | killed | survived | share killed |", "| --- | --- | --- | --- | --- |"]
    for name, part in [*rows.groupby("file", sort=False), ("all", rows)]:
        survived = int(part.outcome.eq("survived").sum())
        killed = len(part) - survived
        lines.append(f"| {name} | {len(part)} | {killed} | {survived} | {killed / len(part):.1%} |")
    late = int(rows.outcome.eq("timeout").sum())
    lines += ["", f"Of the killed ones {late} ran until their time was up. What survived, and why no test notices:", ""]
    for row in rows[rows.outcome.eq("survived")].to_dict("records"):
        lines.append(f"- `{identity(row)}`: {row['reason'] or 'no reason known'}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Run what is left, write the report; 1 where a survivor has no reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--trust", action="store_true", help="what the report calls killed stays so")
    parser.add_argument("--only", default="", help="a part of the ids of the mutants to run; without a report then")
    asked = parser.parse_args(arguments)
    found = [mutant for mutant in all_mutants() if asked.only in mutant.id]
    old = report().to_dict("records") if asked.trust else []
    outcome = {identity(row): row["outcome"] for row in old if row["outcome"] != "survived"}
    LOG.parent.mkdir(exist_ok=True)
    LOG.touch()
    known, keys = dict(map(str.split, LOG.read_text().splitlines())), {mutant.id: _key(mutant) for mutant in found}
    outcome |= {name: known[key] for name, key in keys.items() if key in known}
    todo = [mutant for mutant in found if mutant.id not in outcome]
    with LOG.open("a", buffering=1) as log, tqdm(total=len(todo)) as bar:
        for mutant, result in outcomes(todo, asked.jobs):
            outcome[mutant.id] = result
            log.write(f"{keys[mutant.id]} {result}\n")
            bar.update()
    rows = table(found, outcome)
    print(markdown(rows))
    if not asked.only:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(REPORT, index=False)
        REPORT.with_suffix(".md").write_text(markdown(rows))
    return int((rows.outcome.eq("survived") & rows.reason.eq("")).any())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
