"""The programs of docs/recipes.md, run as they stand there, against `emq.train`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import emqlib as emq

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
RECIPES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
PLAIN = dict(RECIPES)["A plain loop"]
NET = re.search(r"^net = .*?^\)\n", PLAIN, re.MULTILINE | re.DOTALL)[0]
BEGIN = "import torch\nfrom torch import nn\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n"


def mean_accuracy(table: pd.DataFrame) -> float:
    return table.loc[table["trained"], "top1"].mean()


def run(code: str, folder: Path, *launcher: str) -> pd.DataFrame:
    """The table that a program prints, run as a file of its own."""
    told = code.replace("print(", f"(lambda table: table.to_csv({str(folder / 'table.csv')!r}))(")
    (folder / "own.py").write_text(BEGIN + ("" if NET in code else NET) + told)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EMQ_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "own.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return pd.read_csv(folder / "table.csv")


@pytest.fixture(scope="module")
def spread() -> tuple[float, float]:
    """The lowest and the highest mean accuracy of `emq.train`, over seeds."""
    names: dict[str, object] = {}
    exec(BEGIN + NET, names)
    data = emq.load_dataset("digits")
    data = emq.Dataset(**(vars(data) | {"flip": False, "crop_padding": 0}))  # the recipes do not augment
    coreset = emq.CoresetConfig(score="el2n", how="sample", pruning_rate=0.5)
    found = []
    for seed in range(3):
        model = emq.convert(names["net"], emq.QuantSpec(bits=(2, 4, 8)))
        config = emq.TrainConfig(
            epochs=10, batch_size=64, lr=0.1, weight_decay=0, seed=seed, coreset=coreset, device="cpu"
        )
        emq.train(model, data, config, progress=False)
        found.append(mean_accuracy(emq.evaluate(model, data)))
    return min(found), max(found)


@pytest.mark.parametrize(("name", "code"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_recipe_trains_as_well_as_train(name: str, code: str, spread: tuple[float, float], tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"] if "Accelerate" in name else []
    accuracy = mean_accuracy(run(code, tmp_path, *launcher))
    low, high = spread
    assert low - 0.5 < accuracy < high + 0.5


def test_a_plain_loop_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """With the lines of the page that save and take up, its last table is that of a loop that was not stopped."""
    take_up, keep = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1:3]
    code = PLAIN.replace("for epoch in range(epochs):", f"{take_up}for epoch in range(coresets.next_epoch, epochs):")
    code = code.replace("    schedule.step()\n", f"    schedule.step()\n{keep}    if epoch == stop:\n        break\n")
    assert code.count("coresets.next_epoch") == code.count("torch.save") == 1
    (tmp_path / "whole").mkdir()
    whole = run(f"stop = 9\n{code}", tmp_path / "whole")
    half = run(f"stop = 3\n{code}", tmp_path)
    pd.testing.assert_frame_equal(run(f"stop = 9\n{code}", tmp_path), whole)
    assert not half.equals(whole)


def test_a_recipe_has_at_most_30_lines() -> None:
    assert len(RECIPES) == 4
    for name, code in RECIPES:
        assert len(code.splitlines()) <= 30, name
