"""The pages of the site: what they have to name, and that they build."""

import importlib
import re
from pathlib import Path

import pytest

import emqlib as emq

ROOT = Path(__file__).parents[2]
REFERENCE = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)


def named(path: str) -> object:
    """What a dotted path names: a module, or something in a module."""
    module, _, name = path.rpartition(".")
    found = importlib.import_module(module)
    return vars(found).get(name) or importlib.import_module(path)


def test_the_reference_has_every_public_name_once() -> None:
    public = [getattr(emq, name) for name in emq.__all__]
    assert sorted(map(id, map(named, REFERENCE))) == sorted(map(id, public))


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_site_leads_to_every_notebook(notebook: Path) -> None:
    assert f"- notebooks/{notebook.name}\n" in (ROOT / "mkdocs.yml").read_text()
