"""What README and GUIDE show is run: Python blocks as they stand, shell commands in smoke, and what they point at.

Notebooks with the parameters that the guide has one try: tests/project/test_notebooks.py.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import emqlib as emq
from emqlib.paper import experiments
from emqlib.paper.runs import Run
from emqlib.train.checkpoint import Deadline

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "GUIDE.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", README + GUIDE, flags=re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README + GUIDE, flags=re.DOTALL)
COMMANDS = [re.sub(r"\s+#.*", "", line) for block in SHELL for line in block.splitlines()]
TRIED = re.findall(r"^\| `(\d\d_\w+\.ipynb)` \| .* \| `(-p .*)` \|$", GUIDE, flags=re.MULTILINE)
TASKS = ["Train", "Coresets", "Own loop", "Deploy", "ImageNet", "Several GPUs", "Troubleshooting"]


def test_the_readme_is_short_and_the_guide_is_by_task() -> None:
    """Each of the seven tasks of the guide begins with what to type."""
    assert README.count("\n") <= 120
    headings = re.findall(r"^## (.+)\n\n(```)?", GUIDE, flags=re.MULTILINE)
    assert [name for name, _ in headings][: len(TASKS)] == TASKS and all(typed for _, typed in headings[: len(TASKS)])


def test_what_the_demo_is_said_to_print_is_the_table_of_the_quickstart() -> None:
    """The rows are committed; that the demo prints this table and nothing else of them is tested below."""
    (shown,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    table = (ROOT / "results/small/00_quickstart.md").read_text()
    assert [line for line in shown.splitlines() if line.startswith("|")] == table.splitlines()


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) == 8 and "emq.convert(" in BLOCKS[0]
    assert TRIED and {name for name, _ in TRIED} <= {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


def executed(block: str, names: dict[str, Any]) -> int:
    """Run the README's own text, nobody else's, a statement at a time; how many used the network.

    No use changes anything in it: neither running statistics nor what else it holds.
    """
    uses = 0
    for statement in ast.parse(block).body:
        calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
        in_use = any(isinstance(f, ast.Name) and f.id == "model" for f in calls)
        before = deepcopy(names["model"].state_dict()) if in_use else {}
        exec(compile(ast.Module([statement], []), "README", "exec"), names)
        assert all(torch.equal(value, names["model"].state_dict()[name]) for name, value in before.items())
        uses += in_use
    return uses


def test_the_python_of_readme_and_guide_runs_from_first_to_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    digits = emq.load_dataset("digits").subset(1000, 200)
    monkeypatch.setattr(emq, "load_dataset", lambda name: digits)
    names: dict[str, Any] = {}
    assert executed(BLOCKS[0], names) == 1
    table = emq.evaluate(names["model"], digits)
    assert (tmp_path / "digits.checkpoint").exists() and "top1" in capsys.readouterr().out
    assert table.bits.tolist() == list(range(1, 9)) and table[table.trained].top1.max() > 25
    assert names["logits"].shape == (1, 10)
    used = [executed(block, names) for block in BLOCKS[1:]]
    assert used == [0, 0, 0, 0, 0, 1, 0] and "emq.export_onnx(" in BLOCKS[6]
    assert emq.evaluate(names["recommended"], digits, bits=(2, 4, 8)).top1.min() > 25
    assert len(names["history"].attrs["coresets"]) == 3 * 5 and len(names["coresets"].drawn[2]) == 500
    assert (tmp_path / "recipe.checkpoint").exists() and (tmp_path / "digits_4bit.onnx").exists()
    assert names["agreement"] > 0.99 and re.search(r"\d+\.\d% of the answers agree", capsys.readouterr().out)


def run(command: str, checkout: Path) -> str:
    """Run a command of the README in smoke, by the programs beside this Python; what it printed."""
    own = {"EMQ_PROFILE": "smoke", "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    own |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    own |= {name: str(checkout.parent / "user") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    done = subprocess.run(
        shlex.split(command), cwd=checkout, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]
    return done.stdout.decode()


def assert_told_in_words(demo: str) -> None:
    """A line on what is about to happen, progress, the table, where the figure is and what to do next; no cells."""
    lines = [line.rpartition("\r")[2] for line in demo.splitlines(keepends=True)]
    assert lines[0].startswith("Training a small network") and len(demo.split("\n")) < 20
    assert "run 2 of 2" in demo and not re.search(r"Cell|Executing|papermill|Warning|WARNING", demo)
    header, without, corrected = (line for line in lines if line.startswith("| "))
    assert header.startswith("| accuracy (%) by bit-width ") and re.findall(r"\d\*?", header)[:3] == ["1", "2*", "3"]
    assert without.startswith("| without weight bias") and corrected.startswith("| with weight bias")
    (figure,) = re.findall(r"^Figure: (.+png)$", demo, re.MULTILINE)
    assert Path(figure).exists() and "jupyter lab notebooks/00_quickstart.ipynb" in demo


def test_every_other_command_is_run_or_another_test_runs_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`make test` runs this file; GPUs and ImageNet are not everywhere."""
    left = [command for command in COMMANDS if command != "cd notebooks"]
    for command in ("make demo", "make results PROFILE=smoke", "make test"):  # the second: tests/test_suite.py
        left.remove(command)
    if shutil.which("make") and Path(sys.prefix, "bin/papermill").exists():
        demo = run(f"make demo -o install VENV={sys.prefix}", checkout)  # with the programs that are there
        assert_told_in_words(demo)
    (shell,) = [command for command in left if command.startswith("python -m emqlib.paper.experiments ")]
    left.remove(shell)  # as a program: tests/test_experiments.py

    def finished(runs: list[Run], place: Path, *, budget: Deadline, **_: object) -> pd.DataFrame:
        assert {run.profile for run in runs} == {"paper"} and budget.end is not None
        return pd.DataFrame({"run": [run.hash for run in runs]})

    monkeypatch.setattr(experiments, "run_all", finished)
    assert experiments.main(shlex.split(shell)[3:]) == 0 and " runs, " in capsys.readouterr().out
    (first,) = [command for command in left if command.startswith("papermill 01_")]
    left.remove(first)  # tests/test_notebooks.py
    (answers,) = [command for command in left if command.startswith("python -m emqlib.deploy ")]
    left.remove(answers)  # tests/deploy/test_command.py
    several = [command for command in left if "processes" in command or "imagefolder:PATH" in command]
    assert sorted({*left} - {*several}) == ['papermill 03_imagenet.ipynb out.ipynb -p bits "[2,4,8]"']
    assert dict(TRIED)["03_imagenet.ipynb"] == '-p bits "[2,4,8]"'  # tests/test_notebooks.py too
    assert "imagenet" in {f.__name__ for f in experiments.RUNS} and len(several) == 2  # tests/test_experiments.py


def test_links_and_paths_exist() -> None:
    text = README + GUIDE
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", text) + re.findall(
        r"`((?:notebooks|results|tests|benchmarks)/[\w./]+\.\w+)`", text
    )
    assert linked and [path for path in linked if not (ROOT / path).exists()] == []
