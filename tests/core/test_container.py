"""Files of tensors: what the format's own library reads, an exact round trip, and no file that is not whole."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from emqlib import files as container

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TENSORS = {
    "a": torch.tensor([[1.5, -math.inf], [math.nan, 0.0]]),
    "b.c": torch.arange(6, dtype=torch.int16).view(2, 3),
    "none": torch.empty(0, 3, dtype=torch.float64),
    "one": torch.tensor(7),
    "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    **{str(kind): torch.tensor([0, 1, 1]).to(kind) for kind in DTYPES},
}
TREE: dict[str, Any] = {
    "numbers": {0: TENSORS["a"], 1: {"0": TENSORS["one"], "dict": 3}},
    "a.b": [TENSORS["b.c"], (1, None, True, "text", 0.1), []],
    "a": {"b": TENSORS["last"], "tensor": "name", "list": {}},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(5), b.nan_to_num(5))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path: Path) -> Path:
    container.write(tmp_path / "file", {"version": 1, "text": "β"}, TENSORS)
    return tmp_path / "file"


def test_the_formats_own_library_reads_it(path: Path) -> None:
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and all(same(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["emqlib"][64:]) == {"version": 1, "text": "β"}


def test_what_was_written_is_read(path: Path) -> None:
    about, tensors = container.read(path, 1, "a file")
    assert about == {"version": 1, "text": "β"}
    assert tensors.keys() == TENSORS.keys() and all(same(tensors[name], tensor) for name, tensor in TENSORS.items())
    tensors["b.c"].add_(1)  # what was read is its own
    assert same(container.read(path, 1, "a file")[1]["b.c"], TENSORS["b.c"])


def test_no_copy_of_a_tensor_that_is_there_twice_changes_another(tmp_path: Path) -> None:
    x = torch.ones(3)
    container.write(tmp_path / "file", {"version": 1}, {"x": x, "again": x, "part": x[1:]})
    found = container.read(tmp_path / "file", 1, "a file")[1]
    found["x"][0] = 2
    assert found["again"].tolist() == [1, 1, 1] and found["part"].tolist() == [1, 1]


def test_a_tree_goes_through_json() -> None:
    tensors: dict[str, Tensor] = {}
    told = json.loads(json.dumps(container.flattened(TREE, tensors)))
    assert len(tensors) == 4
    assert same(container.restored(told, tensors), TREE)


def test_a_file_that_is_changed_cut_short_or_of_another_version_is_refused(path: Path) -> None:
    data = path.read_bytes()
    places = (0, 7, 8, 30, 500, len(data) - 100, len(data) - 1)
    changed = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in places]
    for content in (*changed, *(data[:length] for length in range(0, len(data), 37))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^file='.*file': expected a file[ :]"):
            container.read(path, 1, "a file", "file")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^path='.*file': expected a file, of version 2 of the format, not 1$"):
        container.read(path, 2, "a file")
