"""Mutants of a module: the module with one place of its syntax tree changed, so that each is a valid program.

What is changed: a comparison, an operator, a number by one, True and False, a minimum for a maximum, a condition for
its negation, a returned value for None; a raise, an augmented assignment and a call whose value nobody takes are left
out. Docstrings, annotations, decorators and the texts of errors stay as they are.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FLIPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
}  # fmt: skip
PAIRS = ("min max", "clamp_min clamp_max", "amin amax", "minimum maximum", "any all", "floor ceil", "head tail")
TWINS = {a: b for pair in map(str.split, PAIRS) for a, b in (pair, pair[::-1])}
UNTOUCHED = {"annotation", "returns", "decorator_list"}  # fields of a syntax tree
SIMPLE = ast.expr | ast.keyword | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, the source around it before and after, and the whole module with it."""

    file: str
    function: str
    line: int
    before: str
    after: str
    nth: int  # of those that read the same
    text: str = field(repr=False)

    @property
    def id(self) -> str:
        """Its name, which does not depend on lines elsewhere."""
        return identity(vars(self))


def identity(row: dict[str, Any]) -> str:
    """The id of a mutant, or of a row of the report."""
    count = f" #{row['nth']}" if int(row["nth"]) > 1 else ""
    return f"{row['file']}:{row['function']}: {row['before']} -> {row['after']}{count}"


def mutants(file: str, text: str, only: tuple[str, ...] = ()) -> list[Mutant]:
    """All mutants of the module `text`, in the order of the source; only: the functions to change, by default all."""
    tree = ast.parse(text)
    if missing := set(only) - {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        raise ValueError(f"only={sorted(missing)}: expected functions of {file}")
    found: list[Mutant] = []
    parts, place = [ast.unparse(part) for part in tree.body], {part: i for i, part in enumerate(tree.body)}
    seen, counts = {"\n\n".join(parts)}, Counter[tuple[str, ...]]()
    for above, name, index, function in _places(tree, [tree], ""):
        if only and function not in only:
            continue
        parent, node = above[-2:]
        shown = _shown(above)
        before = ast.unparse(shown)
        for new in _changes(node, name):
            _put(parent, name, index, new)
            i, after = place[above[1]], ast.unparse(new if shown is node else shown)
            whole = "\n\n".join([*parts[:i], ast.unparse(tree.body[i]), *parts[i + 1 :]])
            _put(parent, name, index, node)
            if whole not in seen:
                seen.add(whole)
                key = (file, function or "(module)", before, after)
                counts[key] += 1
                found.append(Mutant(*key[:2], node.lineno, *key[2:], counts[key], whole))
    return found


def _places(node: ast.AST, above: list[ast.AST], function: str) -> Iterator[tuple[list[ast.AST], str, int, str]]:
    """Every node below `node`: itself last after those above it, its field, its place in that, and the function."""
    for name, value in ast.iter_fields(node):
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if name in UNTOUCHED or not isinstance(child, ast.AST):
                continue
            below = [*above, child]
            named = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inside = f"{function}.{child.name}".lstrip(".") if named else function
            yield below, name, index, inside
            if not isinstance(child, ast.Raise):
                yield from _places(child, below, inside)


def _put(parent: ast.AST, name: str, index: int, node: ast.AST) -> None:
    value = getattr(parent, name)
    if isinstance(value, list):
        value[index] = node
    else:
        setattr(parent, name, node)


def _shown(above: list[ast.AST]) -> ast.AST:
    """The smallest expression or statement around the last node that is long enough to be found again."""
    node, *outer = above[::-1]
    while outer and isinstance(outer[0], SIMPLE) and len(ast.unparse(node)) < 16:
        node = outer.pop(0)
    return node


def _changes(node: ast.AST, name: str) -> Iterator[ast.AST]:
    """What may stand in the place of `node`, which is the field `name` of another."""

    def other(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    match node:
        case ast.Compare(ops=ops):
            yield from (other(ops=[*ops[:i], FLIPS[type(op)](), *ops[i + 1 :]]) for i, op in enumerate(ops))
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            if type(op) in FLIPS and not _joins_types(node):
                yield other(op=FLIPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool() | int() | float() as value):
            yield ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.Call(func=ast.Attribute(attr=called)) if called in TWINS:
            yield other(func=ast.Attribute(node.func.value, TWINS[called], ast.Load()))
        case ast.Call(func=ast.Name(id=called)) if called in TWINS:
            yield other(func=ast.Name(TWINS[called], ast.Load()))
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
    match node:
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case (
            ast.Constant() | ast.UnaryOp(op=ast.Not()) | ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.In()])
        ):
            pass  # negated above
        case ast.expr() if name in ("test", "ifs"):
            yield ast.UnaryOp(ast.Not(), node)


def _joins_types(node: ast.AST) -> bool:
    """Whether this is `Tensor | None`, which is no arithmetic."""
    sides = [ast.unparse(side) for side in (getattr(node, "left", None), getattr(node, "right", None)) if side]
    return isinstance(node.op, ast.BitOr) and any(side in ("None", "float", "str") or side.istitle() for side in sides)
