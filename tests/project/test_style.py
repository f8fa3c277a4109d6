"""What keeps this repository readable and no tool of `make lint` looks at.

Ruff sees to type hints, docstrings, unsafe calls and prints; import-linter to the direction of imports; deptry to what
is declared. Here are sizes, shapes in docstrings, and tests that assert nothing. Notebooks: test_committed_notebooks.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE, LIBRARY = sorted((ROOT / "emqlib").glob("*.py")), sorted((ROOT / "emqlib").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
PACKAGES = ("train", "deploy", "paper")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def of_files(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


# Sizes


# What there is, so that no change makes it longer. The aim is 2,300, 6,800 and 13,000.
SIZES = {"core": (CORE, 3271), "library": (LIBRARY, 10033), "tests": (TESTS, 15814)}


@pytest.mark.parametrize(("paths", "most"), SIZES.values(), ids=SIZES)
def test_the_whole_is_small(paths: list[Path], most: int) -> None:
    assert sum(map(length, paths)) <= most


def test_no_file_is_long() -> None:
    most = dict.fromkeys(LIBRARY, 600) | dict.fromkeys(TESTS, 720)
    most[ROOT / "emqlib/paper/plots.py"] = 605
    assert not {str(path): length(path) for path in most if length(path) > most[path]}


@of_files(LIBRARY)
def test_no_function_is_long(path: Path) -> None:
    """40 lines, the docstring left out."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
    told = {f: len((ast.get_docstring(f) or "").splitlines()) for f in functions}
    assert not [f.name for f in functions if f.end_lineno - f.lineno + 1 - told[f] > 40]


def test_few_arrows_between_the_rooms_of_the_house() -> None:
    """A package is one room; `emqlib/__init__.py`, which only hands names on, is none."""
    graph = grimp.build_graph("emqlib", cache_dir=None)
    for package in PACKAGES:
        graph.squash_module(f"emqlib.{package}")
    rooms = graph.modules - {"emqlib"}
    arrows = [(room, other) for room in rooms for other in graph.find_modules_directly_imported_by(room)]
    assert len(arrows) <= 60, len(arrows)


# Docstrings

DIMENSION = r"(?:[A-Za-z]\w?'?|\d+|\.\.\.|num_classes)(?:\s*[*/+-]\s*\w+)?"
SHAPE = re.compile(rf"\((?=[^)]*(?:[A-Z]|\.\.\.)){DIMENSION},(?:\s*{DIMENSION})?(?:,\s*{DIMENSION})*\)")
IN_WORDS = re.compile(r"\bscalars?\b|\bany shape\b|\btwin of\b", re.IGNORECASE)  # a twin's are its formula's
CONTAINER = re.compile(r"\b(?:dict|Mapping|Callable)\[.*\]")  # a state dict holds tensors of many shapes


def public(body: list[ast.stmt]) -> Iterator[Function]:
    """Public functions, and public methods of public classes."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield from [node] if isinstance(node, Function) else public(node.body)


def shapeless(tree: ast.Module) -> list[str]:
    """Public functions of tensors whose docstrings name no shape: "(N, C)", "any shape" or "scalar"."""
    found = []
    for function in public(tree.body):
        arguments = function.args
        nodes = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        hints = [ast.unparse(hint) for hint in [n and n.annotation for n in nodes] + [function.returns] if hint]
        text = " ".join((ast.get_docstring(function) or "").split())
        of_tensors = any(re.search(r"\bTensor\b", CONTAINER.sub("", hint)) for hint in hints)
        if of_tensors and not SHAPE.search(text) and not IN_WORDS.search(text):
            found.append(function.name)
    return found


@of_files(LIBRARY)
def test_public_functions_of_tensors_name_their_shapes(path: Path) -> None:
    assert not shapeless(ast.parse(path.read_text()))


def test_what_counts_as_a_shape() -> None:
    named = ["(N, C)", "(O, ...)", "(N,)", "(B, 3, H, W)", "(N, C * D)", "(N, num_classes)", "(N, O, H', W')"]
    named += ["Any shape"]
    for text in named:
        assert not shapeless(ast.parse(f'class A:\n    def f(x: Tensor):\n        """{text}"""'))
    for text in ["", "(2, 4, 8)", "(Kim, 2025)", "(see below)", "(N)", "f(x)"]:
        assert shapeless(ast.parse(f'def f(*, x: Tensor | None) -> int:\n    """{text}"""')) == ["f"]


# Tests


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    calls = (ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call))
    known = {"pytest.raises", "pytest.warns", *helpers}
    return any(isinstance(part, ast.Assert) for part in ast.walk(node)) or any(
        call in known or ".testing.assert_" in call for call in calls
    )


def assertless(tree: ast.Module) -> list[str]:
    """Tests that assert nothing, themselves or through functions of their file."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    helpers: set[str] = set()
    for _ in functions:
        helpers |= {name for name, node in functions.items() if name[:5] != "test_" and asserts(node, helpers)}
    return [name for name, node in functions.items() if name[:5] == "test_" and not asserts(node, helpers)]


@of_files([path for path in TESTS if path.name.startswith("test_")])
def test_every_test_asserts_something(path: Path) -> None:
    assert not assertless(ast.parse(path.read_text()))


def test_a_test_that_asserts_nothing_is_found() -> None:
    helpers = "def held(x):\n    assert x\ndef both(x):\n    held(x)\n"
    for line in ("assert x", "both(x)", "with pytest.raises(ValueError): f()", "torch.testing.assert_close(x, x)"):
        assert not assertless(ast.parse(f"{helpers}def test_a(x):\n    {line}"))
    for line in ("f(x)", "x.held()", "pass"):
        assert assertless(ast.parse(f"{helpers}def test_a(x):\n    {line}")) == ["test_a"]


# Dependencies

NAMED = re.compile(r'^\s*"([\w-]+)>=[\d.]+,<[\d.]+",\s+# \S', re.MULTILINE)
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DECLARED = [re.match(r"[\w-]+", text)[0] for group in GROUPS for text in group]


def test_dependencies_are_bounded_explained_named_once_and_pinned() -> None:
    assert sorted(NAMED.findall(PYPROJECT)) == sorted(DECLARED) and len(set(DECLARED)) == len(DECLARED)
    pinned = re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert not set(DECLARED) - set(pinned)


def test_the_library_is_imported_without_its_extras() -> None:
    extras = {"matplotlib", "seaborn", "sklearn", "tabulate", "accelerate", "onnx", "onnxscript", "onnxruntime", "timm"}
    extras |= {"papermill", "IPython", "jupyterlab", "tqdm.auto"}  # which warns in a notebook without ipywidgets
    modules = [f"emqlib.{name}" for name in ("deploy.onnx", "paper.experiments", "paper.measure")]
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
