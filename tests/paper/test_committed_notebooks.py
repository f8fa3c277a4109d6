"""The notebooks as they are committed and as `make results` makes them: executed, with results and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import emqlib as emq
from emqlib.paper import experiments, measure, plots, profiles, runs, tables

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = {m.__name__.rpartition(".")[2]: m for m in (experiments, measure, plots, profiles, runs, tables)}
MODULES |= {"emq": emq}


def is_typed_with_comment(line: str) -> bool:
    """`name: type = value  # reason`, on one line."""
    body = ast.parse(line).body
    typed = len(body) == 1 and isinstance(body[0], ast.AnnAssign) and body[0].value is not None
    return typed and re.match(r"\s*#\s*\S", line[body[0].end_col_offset :]) is not None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_thin_and_holds_results_alone(path: Path) -> None:
    """It opens with a title, closes with what was seen, calls what there is, and was executed from first to last."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    first, *_, last = notebook.cells
    assert first.cell_type == last.cell_type == "markdown" and first.source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 20 for cell in code)
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    called = re.findall(rf"\b({'|'.join(MODULES)})\.(\w+)", "\n".join(cell.source for cell in code))
    assert called and all(hasattr(MODULES[module], name) for module, name in called)
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert all(map(is_typed_with_comment, parameters.source.splitlines()))
    assert path.stat().st_size <= 375_000 and notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert {"parameters"} <= tags <= {"parameters", "nbval-ignore-output"}  # a widget is another in each kernel
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"execute_result", "display_data", "stream"}
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert {out.name for out in outputs if out.output_type == "stream"} <= {"stdout"} and "\r" not in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_shows_small_tables(path: Path) -> None:
    """Ten rows and seven columns at most, the index included."""
    outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    shown = [out.data["text/html"] for out in outputs if "<table" in out.get("data", {}).get("text/html", "")]
    for rows in (html.split("<tbody>")[1].split("<tr")[1:] for html in shown):
        assert len(rows) <= 10 and max(len(re.findall("<t[hd]", row)) for row in rows) <= 7


def test_every_experiment_has_a_notebook_and_every_figure_is_drawn() -> None:
    code = "".join(path.read_text() for path in NOTEBOOKS)
    through_measure = {"corrected_or_not"}  # which measure.distributions trains
    assert {f.__name__ for f in experiments.RUNS} - through_measure == set(re.findall(r"experiments\.(\w+)\(p\)", code))
    drawn = set(re.findall(r'plots\.draw\(p\.(?:output\(|results_dir / )\\"(\w+)\\"\)', code))
    assert set(plots.FIGURES) < drawn


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_imagenet_its_notebook_is_said_not_to_run(tmp_path: Path) -> None:
    command = ["make", "execute-03_imagenet", "PROFILE=small", f"VENV={sys.prefix}"]
    environment = os.environ | {"EMQ_DATA": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "03_imagenet: not run, there is no ImageNet here (see GUIDE.md)\n"
