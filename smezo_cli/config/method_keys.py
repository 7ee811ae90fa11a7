"""Read what a method takes and can from the source of its class, without importing it or torch.

So a mistake on the command line is told at once, and a method's keys, their ranges and what the
method can stand in one place: its class.
"""

import ast
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smezo_cli.zo import ranges
from smezo_cli.zo.ranges import SettingType

# Arguments that the run gives, so that no setting of a method does.
_BY_THE_RUN = ("model", "seed", "backend", "check", "index")
_ROOT = Path(__file__).resolve().parent.parent  # of the package


@dataclass(frozen=True)
class MethodKey:
    """Describe one argument of a method.

    Attributes:
        type: its range; None where the signature names none.
        is_needed: it has no default.
        may_be_null: None is a value of it.
    """

    type: SettingType | None
    is_needed: bool
    may_be_null: bool


@dataclass(frozen=True)
class MethodClass:
    """Describe what the class of a method takes and can.

    Attributes:
        keys: its keyword arguments, by name, but for those that the run gives.
        traits: constants of the class, such as ``takes_steps``.
        doc: its docstring, or that of the nearest class that has one.
    """

    keys: Mapping[str, MethodKey]
    traits: Mapping[str, Any] = field(default_factory=dict)
    doc: str = ""


def describe(method: object) -> MethodClass | None:
    """Return what the class that a method's node names takes and can; None for no class of ours."""
    target = method.get("_target_") if isinstance(method, Mapping) else None
    if not isinstance(target, str) or not target.startswith("smezo_cli.methods."):
        return None
    module, _, name = target.rpartition(".")
    return _described(module, name)


def trait(method: object, name: str, default: bool) -> bool:
    """Return a constant of the method's class, or the default where it has none."""
    found = describe(method)
    return bool(default if found is None else found.traits.get(name, default))


def shared_by(method: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Return which settings of a method say how many queries ranks can share, and how many.

    A query stands for points that one rank (or those that share its rows) measures. There may be
    more of them; None: it is known once the model is loaded.
    """
    found = describe(method)
    traits = {} if found is None else found.traits
    names = traits.get("groups_by", "num_queries").split()
    counts = [method.get(name, 1) for name in names]
    if None in counts:
        return names, None
    return names, max(traits.get("least_groups", 1), math.prod(counts))


@functools.cache
def _described(module: str, name: str) -> MethodClass | None:
    keys: dict[str, MethodKey] = {}
    traits: dict[str, Any] = {}
    classes = list(_lineage(module, name))
    if not classes:
        return None
    for _, node in reversed(classes):  # what a class says counts more than what its bases say
        traits |= _constants(node)
    for module, node in classes:
        found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if found:
            taken = dict(_arguments(module, found[0]))
            keys = {name: key for name, key in taken.items() if name not in _BY_THE_RUN}
            break
    docs = (ast.get_docstring(node) for _, node in classes)
    return MethodClass(keys, traits, next((doc for doc in docs if doc), ""))


def _lineage(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Return a class of ours and those that it is made from, with their modules, nearest first."""
    tree = _tree(module)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield module, node
            for base in node.bases:
                if isinstance(base, ast.Name):
                    yield from _lineage(_origin(module, base.id), base.id)


@functools.cache
def _tree(module: str) -> ast.Module | None:
    path = _ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not module.startswith("smezo_cli.") or not path.is_file():
        return None
    return ast.parse(path.read_text(encoding="utf-8"))


def _origin(module: str, name: str) -> str:
    """Return the module that a name comes from where a module uses it."""
    tree = _tree(module)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            return node.module or ""
    return module


def _constants(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if isinstance(line.value, ast.Constant):
            yield line.target.id, line.value.value


def _arguments(module: str, init: ast.FunctionDef) -> Iterator[tuple[str, MethodKey]]:
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        yield argument.arg, _key(argument.annotation, is_needed=default is None)
    if (rest := init.args.kwarg) is not None and isinstance(rest.annotation, ast.Subscript):
        shared = rest.annotation.slice  # Unpack[Common]
        if isinstance(shared, ast.Name):
            for _, node in _lineage(_origin(module, shared.id), shared.id):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        yield line.target.id, _key(line.annotation, is_needed=False)


def _key(annotation: ast.expr | None, *, is_needed: bool) -> MethodKey:
    """Read an annotation: a name of zo/ranges.py, ``Required[name]``, ``name | None``."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Required":
        return _key(annotation.slice, is_needed=True)
    may_be_null = isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr)
    name = annotation.left if isinstance(annotation, ast.BinOp) else annotation
    hint = getattr(ranges, name.id, None) if isinstance(name, ast.Name) else None
    metadata = getattr(hint, "__metadata__", (None,))
    return MethodKey(typing.cast(SettingType | None, metadata[0]), is_needed, may_be_null)
