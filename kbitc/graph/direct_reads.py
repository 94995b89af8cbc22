"""Which weights the code of a model reads itself, past the forward of the module that has them.

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
from collections.abc import Iterator
from types import CodeType

from torch import nn

_OF_A_TENSOR = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"}
_MAKERS = {"__init__", "_init_weights", "_tie_weights", "tie_weights"}
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_PREFIXES = ("EXTENDED_ARG", "CACHE")  # of a step, no steps
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


@functools.cache
def _weights_read(owner: type) -> frozenset[str]:
    """Names of modules whose weights the methods of one class take."""
    if not _is_own(owner):
        return frozenset()
    return frozenset(name for code in _codes(owner) for name in _in_code(code))


def _is_own(owner: type) -> bool:
    """Whether a class is a model's, not torch's or transformers' base of all."""
    return issubclass(owner, nn.Module) and not owner.__module__.startswith(_BASES)


def _codes(owner: type) -> list[CodeType]:
    methods = (method for name, method in vars(owner).items() if name not in _MAKERS)
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in methods if callable(each))
    return [code for code in codes if code is not None]


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _PREFIXES]


def _in_code(code: CodeType) -> Iterator[str]:
    names = [step.argval if step.opname in _ATTRIBUTES else None for step in _steps(code)]
    for module, weight, of_it in zip(names, names[1:], [*names[2:], None], strict=False):
        if weight == "weight" and module is not None and of_it not in _OF_A_TENSOR:
            yield module
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _in_code(inner)
