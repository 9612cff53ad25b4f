"""A digest of everything that decides what the compilers make of the kernels.

`.ci/kernels` compiles every configuration with the oldest and the newest Triton, which takes tens of minutes, and
records this digest in `docs/kernels.digest`. While the digest is the recorded one, one configuration of each kernel is
enough.

The digest covers, for each spec, the syntax tree of the kernel and of every `@triton.jit` function that the kernel
calls, the values of the globals they read, and what a launch fixes; besides, how kernels are compiled, and what reads
and judges the machine code. Comments, docstrings, formatting, imports, the names of files and of specs, and the Python
around the kernels do not count. Neither do the versions of Python and Triton: `.ci/kernels` records Triton's beside it.
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

JUDGES = (compiling, gate, occupancy, sass)  # how kernels are compiled, what reads the machine code, what judges it


def digest(specs: Iterable[compiling.KernelSpec]) -> str:
    """SHA-256 in hexadecimal, whatever the order of `specs`, their names, and how often one occurs.

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
    """What of `spec` decides the machine code, where it is compiled, and what the gate asks of it."""
    fixed = sorted((name, repr(value)) for name, value in spec.constexprs.items())
    launched = [spec.num_warps, spec.num_stages, spec.targets, spec.matrix, spec.wide_access]
    return [list(spec.types.items()), fixed, spec.aligned, *launched]


def kernel_parts(kernel: Any) -> list[tuple[str, Any]]:
    """The syntax trees of `kernel`, of the kernels that it calls and of its tuples, and the values of their constants.

    Raises:
        TypeError: a global that is read is neither a constant, a module, a class nor a `@triton.jit` function.
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
        if isinstance(source, type):  # a named tuple; what its fields are is in the tree
            continue
        for name, value in _read(source, tree):
            value = getattr(value, "fn", value)
            if isinstance(value, (FunctionType, type)):
                pending.append(value)
                continue
            constant = getattr(value, "value", value)  # of a tl.constexpr
            if not isinstance(constant, (bool, int, float, str)):
                raise TypeError(f"{source.__name__}: expected {name} to be a constant, got {value!r}")
            found.append((name, repr(constant)))
    return sorted(found, key=repr)


def _read(function: FunctionType, tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of what `function` reads from outside; Python's and Triton's own functions are left out."""
    outside = inspect.getclosurevars(function)
    values = {**outside.globals, **outside.nonlocals}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        name, *attributes = ast.unparse(node).split(".")
        value = values.get(name)
        for attribute in attributes if isinstance(value, ModuleType) else ():
            value = getattr(value, attribute, None)
        if value is None or isinstance(value, ModuleType) or _is_triton_s(value):
            continue
        yield name, value


def _is_triton_s(value: Any) -> bool:
    """Whether `value` is a part of Triton's language; a constant of ours is of a type of Triton's."""
    module = getattr(getattr(value, "fn", value), "__module__", "")
    return module.partition(".")[0] == "triton" and not isinstance(value, triton.language.constexpr)


def _tree(node: Any) -> Any:
    """A syntax tree as nested lists, without positions, docstrings, imports and empty fields; equal in every Python."""
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
