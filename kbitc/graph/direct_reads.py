"""What a model's code says of its weights: which it reads past their module, only adds, or never multiplies.

before:  x + self.positions.weight[:n]    in a method of a module that has ``positions``
after:   {"weight"} of "positions"

The one thing to know: byte code is read, nothing is run. What only asks for a weight's dtype or shape, or
makes and ties weights, reads none.

Byte code and not the source, which classes made by ``exec``, in a console or without their files lack. Of it
counts only what `dis` shows alike from Python 3.11 to 3.14: an attribute is one step whose ``argval`` is its
name (3.12 took LOAD_METHOD into LOAD_ATTR, as a bit of the argument that ``argval`` leaves out), and a sum is
BINARY_OP right after it. How locals are loaded and functions called, which versions changed, is not asked.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import logging
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from torch import nn

from kbitc.graph.matching import MATMULS

_OF_A_TENSOR = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"}
_MAKERS = {"__init__", "_init_weights", "_tie_weights", "tie_weights"}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_PREFIXES = ("EXTENDED_ARG", "CACHE")  # of a step, no steps
_PRODUCTS = {name.rpartition(".")[2] for name in MATMULS} | {
    *("multi_dot", "einsum", "grouped_mm", "cdist", "conv1d", "conv2d", "conv3d"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
}
_SILENT = (ModuleType, BuiltinFunctionType, type, str, int, float, tuple, type(None), logging.Logger)
_BASES = ("torch.", "transformers.modeling_utils", "transformers.generation")


def read_directly(model: nn.Module, path: str) -> bool:
    """Whether a module above the one at ``path`` reads the latter's weight itself."""
    above, _, leaf = path.rpartition(".")
    while path:
        if any(leaf in _weights_read(each) for each in type(model.get_submodule(above)).__mro__):
            return True
        path, (above, _, _) = above, above.rpartition(".")
    return False


@functools.cache
def added_biases(owner: type) -> frozenset[str]:
    """Parameters of a class, biases by name, that its methods only add: ``x + self.bias_u``."""
    added: set[str] = set()
    otherwise: set[str] = set()
    for code in (code for each in owner.__mro__ if _is_own(each) for code in _codes(each)):
        for step, after in itertools.pairwise(_steps(code)):
            if step.opname in _ATTRIBUTES and after.argval not in _OF_A_TENSOR:
                is_added = after.opname == "BINARY_OP" and after.argrepr in ("+", "+=")
                (added if is_added else otherwise).add(step.argval)
    return frozenset(name for name in added - otherwise if "bias" in name)


def never_multiplied(model: nn.Module, path: str) -> set[str]:
    """Parameters of the module at ``path`` that no code takes for a product of matrices.

    Its class' methods, the functions that they name and the modules below hold none, and no module above
    reads the parameter.
    """
    module = model.get_submodule(path)
    names = set(module._parameters)
    owner: type = type(module)
    if not names or not _is_own(owner) or any(_may_multiply(each) for each in module.modules()):
        return set()
    while path:
        path = path.rpartition(".")[0]
        above: type = type(model.get_submodule(path))
        names -= _attributes_read(above)
    return names


def _may_multiply(module: nn.Module) -> bool:
    """Whether a module of the model's has code that multiplies, or functions of its own that nobody knows."""
    owner: type = type(module)
    return _is_own(owner) and (any(map(callable, vars(module).values())) or _multiplies(owner))


@functools.cache
def _multiplies(owner: type) -> bool:
    layers = [base for base in owner.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    if layers != [nn.Module]:
        return True  # for all that this class' own code says
    seen: set[CodeType] = set()
    stack = [f for each in owner.__mro__ if _is_own(each) for f in _functions(each)]
    while stack:
        function = stack.pop()
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for step in (step for code in _nested(function.__code__) for step in _steps(code)):
            if _is_product(step):
                return True
            if step.opname == "LOAD_GLOBAL":
                named = inspect.unwrap(function.__globals__.get(step.argval, len))
                if not isinstance(named, FunctionType):
                    if not isinstance(named, _SILENT):
                        return True  # it may hold functions, as transformers' table of attentions does
                elif not named.__module__.startswith("torch."):
                    stack.append(named)
    return False


def _is_product(step: dis.Instruction) -> bool:
    if step.opname == "BINARY_OP":
        return step.argrepr in ("@", "@=")
    return step.opname in (*_ATTRIBUTES, "LOAD_GLOBAL") and step.argval in _PRODUCTS


@functools.cache
def _attributes_read(owner: type) -> frozenset[str]:
    outer = (code for each in owner.__mro__ if _is_own(each) for code in _codes(each))
    codes = (code for each in outer for code in _nested(each))
    return frozenset(step.argval for code in codes for step in _steps(code) if step.opname in _ATTRIBUTES)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """A code, and those of its lambdas and inner functions."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _nested(inner)


@functools.cache
def _weights_read(owner: type) -> frozenset[str]:
    """Names of modules whose weights the methods of one class take."""
    if not _is_own(owner):
        return frozenset()
    return frozenset(name for code in _codes(owner) for name in _in_code(code))


def _is_own(owner: type) -> bool:
    """Whether a class is a model's, not torch's or transformers' base of all."""
    return issubclass(owner, nn.Module) and not owner.__module__.startswith(_BASES)


def _functions(owner: type) -> list[FunctionType]:
    methods = [method for name, method in vars(owner).items() if name not in _MAKERS and callable(method)]
    return [each for each in map(inspect.unwrap, methods) if isinstance(each, FunctionType)]


def _codes(owner: type) -> list[CodeType]:
    return [function.__code__ for function in _functions(owner)]


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _PREFIXES]


def _in_code(code: CodeType) -> Iterator[str]:
    for each in _nested(code):
        names = [step.argval if step.opname in _ATTRIBUTES else None for step in _steps(each)]
        for module, weight, of_it in zip(names, names[1:], [*names[2:], None], strict=False):
            if weight == "weight" and module is not None and of_it not in _OF_A_TENSOR:
                yield module
