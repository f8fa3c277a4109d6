"""What the README shows is run: its Python blocks as they stand, and the files and names it points at."""

import re
from pathlib import Path

import pytest

import emqlib as emq

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) == 2 and "emq.convert(" in BLOCKS[0] and "emq.export_onnx(" in BLOCKS[1]


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


def test_links_and_paths_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"`((?:notebooks|results)/[\w./]+\.\w+)`", README
    )
    assert linked and [path for path in linked if not (ROOT / path).exists()] == []
