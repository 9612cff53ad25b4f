"""A digest of everything that determines how the kernels are compiled.

`.ci/kernels` compiles every configuration with the oldest and the newest Triton, which takes tens of minutes, and
records this digest in `docs/kernels.digest`. As long as the digest matches the recorded one, CI compiles only one
configuration of each kernel.

For each spec, the digest covers the syntax trees of the kernel and of every `@triton.jit` function that it calls, the
values of the globals they read, and what a launch fixes. It also covers the code that compiles kernels, and reads and
judges the machine code. It ignores comments, docstrings, formatting, imports, the names of files and specs, and the
Python around the kernels, as well as the versions of Python and Triton; `.ci/kernels` records Triton's beside it.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import triton

from lion_kernels.aot import compile as compiling
from lion_kernels.aot import gate, occupancy, sass
from lion_kernels.core.backend import LAUNCH
from lion_kernels.core.tuned_sizes import COMPACT_BELOW

JUDGES = (compiling, gate, occupancy, sass)  # how kernels are compiled, and the machine code read and judged


def digest(specs: Iterable[compiling.KernelSpec]) -> str:
    """Return a SHA-256 in hexadecimal, independent of the order, names and repetitions of `specs`.

    Kernels may be interpreted in this process; the digest is the same.

    Raises:
        TypeError: a kernel reads a global that is neither a constant, a module, a class nor a `@triton.jit` function.
    """
    specs = list(specs)
    kernels = {id(kernel): _hash(kernel_parts(kernel)) for kernel in {id(s.kernel): s.kernel for s in specs}.values()}
    parts = {_hash(kernels[id(spec.kernel)], launch_parts(spec)) for spec in specs}
    judges = [_tree(ast.parse(inspect.getsource(module))) for module in JUDGES]
    return _hash(sorted(parts), judges, LAUNCH, COMPACT_BELOW)


def launch_parts(spec: compiling.KernelSpec) -> list[Any]:
    """Return the parts of `spec` that determine the machine code, its targets and the checks of the gate."""
    fixed = sorted((name, repr(value)) for name, value in spec.constexprs.items())
    launched = [spec.num_warps, spec.num_stages, spec.targets, spec.matrix, spec.wide_access]
    return [list(spec.types.items()), fixed, spec.aligned, *launched]


def kernel_parts(kernel: Any) -> list[tuple[str, Any]]:
    """Return the syntax trees of `kernel`, of the kernels it calls and of its tuples, and their constants' values.

    Raises:
        TypeError: a kernel reads a global that is neither a constant, a module, a class nor a `@triton.jit` function.
    """
    found: list[tuple[str, Any]] = []
    met: set[Any] = set()
    pending = [kernel.fn]
    while pending:
        source = pending.pop()
        if source in met:
            continue
        met.add(source)
        tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
        found.append((source.__name__, _tree(tree)))
        if isinstance(source, type):  # a named tuple; the tree contains its fields
            continue
        for name, value in _read(source, tree):
            value = getattr(value, "fn", value)
            if isinstance(value, (FunctionType, type)):
                pending.append(value)
                continue
            constant = getattr(value, "value", value)  # unwraps a tl.constexpr
            if not isinstance(constant, (bool, int, float, str)):
                raise TypeError(f"{source.__name__}: expected {name} to be a constant, got {value!r}")
            found.append((name, repr(constant)))
    return sorted(found, key=repr)


def _read(function: FunctionType, tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for the globals that `function` reads, except for Python's and Triton's own functions."""
    outside = inspect.getclosurevars(function)
    values = {**outside.globals, **outside.nonlocals}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        name, *attributes = ast.unparse(node).split(".")
        value = values.get(name)
        for attribute in attributes if isinstance(value, ModuleType) else ():
            value = getattr(value, attribute, None)
        if value is None or isinstance(value, ModuleType) or _is_part_of_triton(value):
            continue
        yield name, value


def _is_part_of_triton(value: Any) -> bool:
    """Return whether `value` is part of Triton's language; our constants only have a type of Triton's."""
    module = getattr(getattr(value, "fn", value), "__module__", "")
    return module.partition(".")[0] == "triton" and not isinstance(value, triton.language.constexpr)


def _tree(node: Any) -> Any:
    """Return a syntax tree as nested lists, without positions, docstrings, imports and empty fields."""
    if isinstance(node, list):
        return [_tree(entry) for entry in node if not isinstance(entry, (ast.Import, ast.ImportFrom))]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
        node.body = node.body[1:]
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
