"""Mutants of a module's source: each is the module with one small fault.

Annotations, docstrings, decorators, messages and the arguments of `raise` stay as they are, and so do the
strings that have a space in them: a wording is no result.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
Change = tuple[str, ast.AST]
"""how it reads, and the node that stands in another's place"""

_UNTOUCHED = {"annotation", "returns", "decorator_list", "bases", "ctx", "type_params"}
_ORDER = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE)}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    **_ORDER,
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
_NO_FAULT_OF_A_RESULT = {"strict"}
"""Keywords that only guard against a fault of our own."""


@dataclass(frozen=True)
class Mutant:
    """One small fault in one place."""

    module: str
    """the path below src/lazarus"""
    line: int
    function: str
    """the outermost function, with its class; empty for what runs when the module is imported"""
    what: str
    text: str
    """the first line of the statement, as it is in the file"""
    statements: frozenset[int]
    """where the statements begin that it may change: its own; for a name of the module, those that have it"""
    occurrence: int
    """which one, where several in a function read alike"""
    source: str

    @property
    def key(self) -> str:
        """A name that other lines of the module do not change."""
        number = f" ({self.occurrence})" if self.occurrence else ""
        return f"{self.module}: {self.function or 'on import'}: {self.text}: {self.what}{number}"


@dataclass(frozen=True)
class _Place:
    function: str = ""
    outer: str = ""
    statement: int = 0
    in_function: bool = False


def mutants(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, none twice and none that reads as the module does."""
    tree = ast.parse(source)
    lines, uses = source.splitlines(), _uses(tree)
    found: list[Mutant] = []
    seen, alike = {ast.unparse(tree)}, Counter[tuple[str, str, str]]()
    for line, what, place, mutated in _walk(tree, tree, _Place()):
        if mutated in seen:
            continue
        seen.add(mutated)
        text = lines[place.statement - 1].strip()
        sort = (place.function, text, what)
        at = frozenset([place.statement]) if place.function else uses[place.statement]
        found.append(Mutant(module, line, place.function, what, text, at, alike[sort], mutated))
        alike[sort] += 1
    return found


def _uses(tree: ast.Module) -> dict[int, frozenset[int]]:
    """For each statement of the module itself, those in functions that have a name which it binds."""
    by_name: dict[str, set[int]] = defaultdict(set)
    for statement in [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]:
        for node in ast.walk(statement):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if name and not isinstance(statement, Function | ast.ClassDef):
                by_name[name].add(statement.lineno)
    found: dict[int, frozenset[int]] = defaultdict(frozenset)
    for statement in [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]:
        if isinstance(statement, Function):
            found[statement.lineno] = frozenset(
                node.lineno for node in ast.walk(statement) if isinstance(node, ast.stmt)
            )
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found[statement.lineno] = frozenset(line for name in names for line in by_name[name])
    return found


def with_hits(source: str, module: str, name: str) -> str:
    """The module with a call before each statement of its functions, which tells the module and the line."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    inside = {id(node): node for function in functions for node in ast.walk(function)}
    for node in inside.values():
        for field, value in ast.iter_fields(node):
            if _is_body(value):
                setattr(node, field, list(_told(value, module, name)))
    return ast.unparse(ast.fix_missing_locations(tree))


def _told(body: list[ast.stmt], module: str, name: str) -> Iterator[ast.stmt]:
    for statement in body:
        call = ast.parse(f"{name}({module!r}, {statement.lineno})").body[0]
        ast.copy_location(call, statement)
        if not _is_docstring(statement):
            yield call
        yield statement


def _walk(tree: ast.Module, node: ast.AST, place: _Place) -> Iterator[tuple[int, str, _Place, str]]:
    """Each change in turn, made and taken back: its line, how it reads, its place, the whole source."""
    for field, value in ast.iter_fields(node):
        if field in _UNTOUCHED or (field == "args" and isinstance(node, Function)):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _is_left_alone(child, place):
                continue
            inner = _inside(child, place)
            for what, other in _changes(child, node, field):
                put(node, field, i, other)
                yield getattr(child, "lineno", inner.statement), what, inner, ast.unparse(tree)
                put(node, field, i, child)
            yield from _walk(tree, child, inner)
    if isinstance(node, Function):
        outside = replace(place, function=place.outer, in_function=bool(place.outer), statement=node.lineno)
        yield from _walk(tree, node.args, outside)


def put(node: ast.AST, field: str, index: int, child: ast.AST) -> None:
    """Set a field of a node, or one element of it."""
    value = getattr(node, field)
    if isinstance(value, list):
        value[index] = child
    else:
        setattr(node, field, child)


def _inside(node: ast.AST, place: _Place) -> _Place:
    """The place that a node is, seen from what it is in."""
    if isinstance(node, ast.stmt):
        place = replace(place, statement=node.lineno)
    if isinstance(node, ast.ClassDef) and not place.in_function:
        return replace(place, outer=f"{place.outer}{node.name}.", function="")
    if isinstance(node, Function) and not place.in_function:
        return replace(place, function=f"{place.outer}{node.name}", outer="", in_function=True)
    return place


def _is_left_alone(node: ast.AST, place: _Place) -> bool:
    if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.keyword) and node.arg in _NO_FAULT_OF_A_RESULT:
        return True
    if _is_docstring(node) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        return True
    return not place.in_function and not place.outer and isinstance(node, ast.Assign) and _is_alias(node)


def _is_alias(node: ast.Assign) -> bool:
    """An assignment that names a type, or what the module exports."""
    value = node.value
    is_union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    is_variable = isinstance(value, ast.Call) and ast.unparse(value.func) == "TypeVar"
    return (
        is_union
        or is_variable
        or isinstance(value, ast.Subscript)
        or ast.unparse(node.targets[0]) == "__all__"
    )


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_body(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], ast.stmt)


def _reads(old: ast.AST, new: ast.AST | str) -> str:
    before, after = (part if isinstance(part, str) else ast.unparse(part) for part in (old, new))
    return " ".join(f"{_cut(before)} → {_cut(after)}".split())


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else f"{flat[:60]} … {flat[-39:]}"


def _changes(node: ast.AST, parent: ast.AST, field: str) -> Iterator[Change]:
    """Yield what may stand in a node's place."""
    if isinstance(parent, ast.Raise):
        return
    for kind, change in _BY_KIND.items():
        if isinstance(node, kind):
            yield from change(node)
    if field == "test" and not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield _reads(node, f"not {ast.unparse(node)}"), ast.UnaryOp(ast.Not(), node)  # type: ignore[arg-type]
    if field == "value" and isinstance(parent, ast.Return | ast.Yield) and not _is_none(node):
        word = type(parent).__name__.lower()
        yield f"{word} {_cut(ast.unparse(node))} → {word} None", ast.Constant(None)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _changed(node: ast.AST, **fields: Any) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _compare(node: ast.Compare) -> Iterator[Change]:
    for i, op in enumerate(node.ops):
        for kind in _COMPARISONS[type(op)]:
            other = _changed(node, ops=[*node.ops[:i], kind(), *node.ops[i + 1 :]])
            yield _reads(node, other), other


def _arithmetic(node: ast.BinOp) -> Iterator[Change]:
    texts = [isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right)]
    if type(node.op) in _ARITHMETIC and not any(texts):
        other = _changed(node, op=_ARITHMETIC[type(node.op)]())
        yield _reads(node, other), other


def _augmented(node: ast.AugAssign) -> Iterator[Change]:
    if type(node.op) in _ARITHMETIC:
        other = _changed(node, op=_ARITHMETIC[type(node.op)]())
        yield _reads(node, other), other
    yield _deleted(node)


def _both(node: ast.BoolOp) -> Iterator[Change]:
    other = _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    yield _reads(node, other), other
    for value in node.values:
        rest = [kept for kept in node.values if kept is not value]
        short = rest[0] if len(rest) == 1 else _changed(node, values=rest)
        yield _reads(node, short), short


def _unary(node: ast.UnaryOp) -> Iterator[Change]:
    yield _reads(node, node.operand), node.operand


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _constant(node: ast.Constant) -> Iterator[Change]:
    value = node.value
    others: list[Any] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [value + 1, value - 1]
    elif isinstance(value, float):
        others = [value * 2, value / 2]
    elif isinstance(value, str) and value and " " not in value:
        others = [f"{value}XX"]
    for other in others:
        yield f"{value!r} → {other!r}", ast.Constant(other)


def _name(node: ast.Name | ast.Attribute) -> Iterator[Change]:
    field = "id" if isinstance(node, ast.Name) else "attr"
    other = _NAMES.get(getattr(node, field))
    if other:
        changed = _changed(node, **{field: other})
        yield _reads(node, changed), changed


def _call(node: ast.Call) -> Iterator[Change]:
    for keyword in node.keywords:
        if keyword.arg not in _NO_FAULT_OF_A_RESULT:
            other = _changed(node, keywords=[kept for kept in node.keywords if kept is not keyword])
            yield f"{_cut(ast.unparse(node))} without {keyword.arg or ast.unparse(keyword.value)}", other


def _dict(node: ast.Dict) -> Iterator[Change]:
    for i, value in enumerate(node.values):
        rest = {"keys": node.keys[:i] + node.keys[i + 1 :], "values": node.values[:i] + node.values[i + 1 :]}
        key = node.keys[i]
        yield f"entry {_cut(ast.unparse(key or value))} left out", _changed(node, **rest)


def _slice(node: ast.Slice) -> Iterator[Change]:
    for bound in ("lower", "upper", "step"):
        if getattr(node, bound) is not None:
            other = _changed(node, **{bound: None})
            yield f"slice {_cut(ast.unparse(node))} without its {bound}", other


def _filter(node: ast.comprehension) -> Iterator[Change]:
    for condition in node.ifs:
        rest = [kept for kept in node.ifs if kept is not condition]
        yield f"filter left out: if {_cut(ast.unparse(condition))}", _changed(node, ifs=rest)
        if not isinstance(condition, ast.Compare | ast.BoolOp | ast.UnaryOp):
            flipped = [ast.UnaryOp(ast.Not(), kept) if kept is condition else kept for kept in node.ifs]
            yield f"filter negated: if {_cut(ast.unparse(condition))}", _changed(node, ifs=flipped)


def _deleted(node: ast.stmt) -> Change:
    return f"left out: {_cut(ast.unparse(node))}", ast.Pass()


def _statement(node: ast.Expr | ast.Raise | ast.Continue | ast.Break | ast.Delete) -> Iterator[Change]:
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Yield | ast.YieldFrom):
        nothing = ast.Expr(ast.YieldFrom(ast.Tuple([], ast.Load())))
        yield f"left out: {_cut(ast.unparse(node))}", nothing
    else:
        yield _deleted(node)


def _assign(node: ast.Assign) -> Iterator[Change]:
    """Only where something was there before: a name that was never set is found by any test."""
    if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        yield _deleted(node)


def _with(node: ast.With) -> Iterator[Change]:
    if all(item.optional_vars is None for item in node.items):
        items = ", ".join(ast.unparse(item) for item in node.items)
        yield f"without the context: {_cut(items)}", ast.If(ast.Constant(True), node.body, [])


_BY_KIND: dict[Any, Callable[[Any], Iterator[Change]]] = {
    ast.Compare: _compare,
    ast.BinOp: _arithmetic,
    ast.AugAssign: _augmented,
    ast.BoolOp: _both,
    ast.UnaryOp: _unary,
    ast.Constant: _constant,
    ast.Name | ast.Attribute: _name,
    ast.Call: _call,
    ast.Dict: _dict,
    ast.Slice: _slice,
    ast.comprehension: _filter,
    ast.Expr | ast.Raise | ast.Continue | ast.Break | ast.Delete: _statement,
    ast.Assign: _assign,
    ast.With: _with,
}
