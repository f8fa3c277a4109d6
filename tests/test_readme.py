"""What README and GUIDE show is run: Python blocks as they stand, shell commands in smoke, and what they point at."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emqlib as emq
from emqlib import experiments

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "GUIDE.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", README + GUIDE, flags=re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README + GUIDE, flags=re.DOTALL)
COMMANDS = [re.sub(r"\s+#.*", "", line) for block in SHELL for line in block.splitlines()]
TRIED = re.findall(r"^\| `(\d\d_\w+\.ipynb)` \| .* \| `(-p .*)` \|$", README, flags=re.MULTILINE)


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) == 2 and "emq.convert(" in BLOCKS[0] and "emq.export_onnx(" in BLOCKS[1]
    assert [name for name, _ in TRIED] == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_your_own_network_in_ten_lines_and_to_an_onnx_file_in_ten_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    digits = emq.load_dataset("digits").subset(600, 200)
    monkeypatch.setattr(emq, "load_dataset", lambda name: digits)
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)  # the README's own text, nobody else's
    table = emq.evaluate(names["model"], digits)
    assert (tmp_path / "digits.checkpoint").exists() and "top1" in capsys.readouterr().out
    assert table.bits.tolist() == list(range(1, 9)) and table[table.trained].top1.max() > 25
    assert names["logits"].shape == (1, 10)
    assert BLOCKS[1].count("\n") <= 10
    exec(BLOCKS[1], names)
    assert (tmp_path / "digits_4bit.onnx").exists() and names["agreement"] > 0.99
    assert re.search(r"\d+\.\d% of the answers agree", capsys.readouterr().out)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands need, where what they leave behind harms nothing."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("emqlib", "notebooks", "results/paper"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(command: str, copy: Path, cwd: str = ".") -> str:
    """Run a command of the README in smoke, by the programs beside this Python; what it printed."""
    own = {"EMQ_PROFILE": "smoke", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    own |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    own |= {name: str(copy.parent / "user") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    done = subprocess.run(
        shlex.split(command), cwd=copy / cwd, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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


@pytest.mark.parametrize(("notebook", "parameters"), TRIED, ids=lambda part: part.partition(".")[0])
def test_a_notebook_is_run_by_papermill_as_the_readme_has_it(notebook: str, parameters: str, copy: Path) -> None:
    pytest.importorskip("papermill")
    pytest.importorskip("sklearn")
    run(f"papermill -k python3 {notebook} {notebook}.out.ipynb {parameters}", copy, "notebooks")


def test_every_other_command_is_run(copy: Path) -> None:
    """`make test` runs this file; `make results` is run for one notebook. GPUs and ImageNet are not everywhere."""
    pytest.importorskip("papermill")
    pytest.importorskip("sklearn")
    left = [command for command in COMMANDS if command != "cd notebooks"]
    for command in ("make demo", "make results PROFILE=smoke", "make test"):
        left.remove(command)
    installed = f"-o install VENV={sys.prefix}"  # with the programs that are there
    if shutil.which("make") and Path(sys.prefix, "bin/papermill").exists():
        assert_told_in_words(run(f"make demo {installed}", copy))
        assert "1 notebooks" in run(f"make results PROFILE=smoke ONLY=00_quickstart {installed}", copy)
    shell = "python -m emqlib.experiments table1 --profile paper --budget 600"
    left.remove(shell)
    assert "runs" in run(shell.replace("table1 --profile paper", "quickstart --profile smoke"), copy)
    (first,) = [command for command in left if command.startswith("papermill 01_")]
    left.remove(first)
    run(first.replace("papermill", "papermill -k python3"), copy, "notebooks")
    several = [command for command in left if "processes" in command or "imagefolder:PATH" in command]
    assert sorted({*left} - {*several}) == ['papermill 03_imagenet.ipynb out.ipynb -p bits "[2,4,8]"']
    assert dict(TRIED)["03_imagenet.ipynb"] == '-p bits "[2,4,8]"'  # which is run above
    assert "imagenet" in {f.__name__ for f in experiments.RUNS} and len(several) == 3  # tests/test_experiments.py


def test_links_and_paths_exist() -> None:
    text = README + GUIDE
    linked = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(
        r"`((?:notebooks|results|tests|benchmarks)/[\w./]+\.\w+)`", text
    )
    assert linked and [path for path in linked if not (ROOT / path).exists()] == []
