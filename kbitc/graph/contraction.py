"""A matmul with any view of a parameter, as a linear map of the whole parameter: which one, and why not.

    linear(x, W[:n])              linear(x, W)[..., :n]
    einsum(ibh,hnd->ibnd, x, W)   linear(x, W as (n d, h)).unflatten(-1, (n, d))
    matmul(x, W * s)              linear(x, W) * s

The one thing to know: dimensions have names, as in einsum. Those that only the view has are rows of a matrix,
those that the output does not have are its columns, those that all three have are groups; they must lie in
the parameter one kind after another.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from kbitc.graph.matching import Miss, bound, count_of
from kbitc.graph.weight_reads import op_name, value_of
from kbitc.graph.weight_views import ViewRead, scale_of

ROW, COLUMN, GROUP = "row", "column", "group"


@dataclass(frozen=True)
class Product:
    """A call as an einsum of two operands, of which the second is the weight.

    Attributes:
        x: the other operand.
        of_x, of_weight, of_out: the names of their dimensions.
        addend: added to the product.
        alpha, beta: what the product and the addend are multiplied by.
    """

    x: fx.Node
    of_x: str
    of_weight: str
    of_out: str
    addend: fx.Node | None = None
    alpha: Any = 1
    beta: Any = 1


@dataclass(frozen=True)
class Span:
    """A range of one dimension of the matrix, and the names of the view's dimensions that make it.

    Attributes:
        names: outermost first, with their sizes.
        start, total: the range begins there, in so many.
    """

    names: dict[str, int] = field(default_factory=dict)
    start: int = 0
    total: int = 1

    @property
    def length(self) -> int:
        """Elements of the range."""
        return math.prod(self.names.values())


@dataclass(frozen=True)
class Contraction:
    """A product as a linear map of the whole parameter.

    Attributes:
        product: the call.
        read: how it sees the parameter.
        matrix: ``(*lead, rows, in)``, or ``(*lead, in, rows)`` if transposed, as the parameter is stored.
        is_transposed: which of the two.
        rows, columns: what of the matrix is read.
        groups: of a batch of matrices; None for a single one.
        repeated: names of the weight's dimensions that index nothing.
        meets_input: of what the view is multiplied by, which factors meet the input and not the output.
    """

    product: Product
    read: ViewRead
    matrix: tuple[int, ...]
    is_transposed: bool
    rows: Span
    columns: Span
    groups: Span | None
    repeated: frozenset[str]
    meets_input: tuple[bool, ...] = ()

    @property
    def kind(self) -> str:
        """Of the canonical call."""
        return "linear" if self.groups is None else "grouped_linear"


def contraction(read: ViewRead) -> Contraction | Miss:
    """What a read of a view is."""
    product = _product(read)
    if isinstance(product, Miss):
        return product
    placed = _placed(read, product)
    return placed if isinstance(placed, Miss) or not read.steps else _scaled(placed)


def varying(of_weight: str, factor: Tensor) -> str:
    """The names of the dimensions that a factor of a view varies along."""
    dims = zip(of_weight, factor.shape, factor.stride(), strict=True)
    return "".join(name for name, size, stride in dims if size > 1 and stride != 0)


def _scaled(placed: Contraction) -> Contraction | Miss:
    """With what the view is multiplied by on one side of the product or the other."""
    product = placed.product
    scale = scale_of(placed.read, lambda target, *args, **kwargs: target(*args, **kwargs), value_of)
    meets_input = []
    for factor in scale.factors:
        names = set(varying(product.of_weight, factor))
        if not names <= set(product.of_out) and not names <= set(product.of_x):
            return Miss(f"scaled in two dimensions before {op_name(placed.read.node)}", is_matmul=True)
        meets_input.append(not names <= set(product.of_out))
    return replace(placed, meets_input=tuple(meets_input))


# Calls as einsums.


def _product(read: ViewRead) -> Product | Miss:
    node, name = read.node, op_name(read.node)
    if node.op != "call_function" or name not in _PRODUCTS:
        return Miss(f"read by {name}" if node.op != "output" else "returned by the model")
    args = bound(node)
    if node.all_input_nodes.count(read.view) != 1 or count_of(node, read.view) > 1:
        return Miss(f"both operands of {name}", is_matmul=True)
    if name == "aten.linear":
        if args["weight"] is not read.view:
            return Miss(f"the {'input' if args['input'] is read.view else 'bias'} of aten.linear")
        batch = _letters(value_of(args["input"]).dim() - 1)
        return Product(args["input"], batch + "y", "zy", batch + "z", args["bias"])
    if name == "aten.einsum":
        return _einsum(read, args)
    left, right = _operands(args)
    if read.view not in (left, right):
        return Miss(f"added by {name}")
    of_left, of_right, of_out = _matmul_names(value_of(left).dim(), value_of(right).dim())
    is_left = left is read.view
    x, of_x, of_weight = (right, of_right, of_left) if is_left else (left, of_left, of_right)
    addend = args["self"] if name in ("aten.addmm", "aten.baddbmm") else None
    return Product(x, of_x, of_weight, of_out, addend, args.get("alpha", 1), args.get("beta", 1))


_PRODUCTS = (
    *("aten.linear", "aten.einsum", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"),
)


def _operands(args: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    for names in (("mat1", "mat2"), ("batch1", "batch2"), ("self", "other"), ("self", "mat2")):
        if all(name in args for name in names):
            return args[names[0]], args[names[1]]
    raise AssertionError(args)


def _letters(count: int) -> str:
    return string.ascii_uppercase[26 - count :] if count else ""


def _matmul_names(left: int, right: int) -> tuple[str, str, str]:
    """Names of the dimensions of ``left @ right`` by how many they are."""
    of_left = "y" if left == 1 else _letters(left - 2) + "xy"
    of_right = "y" if right == 1 else _letters(right - 2) + "yz"
    batch = _letters(max(left, right, 2) - 2)
    return of_left, of_right, batch + ("x" if left > 1 else "") + ("z" if right > 1 else "")


def _einsum(read: ViewRead, args: dict[str, Any]) -> Product | Miss:
    equation, operands = args["equation"].replace(" ", ""), list(args["tensors"])
    inputs, arrow, out = equation.partition("->")
    names = inputs.split(",")
    miss = Miss(f"einsum '{equation}' is not a linear map by its weight", is_matmul=True)
    if len(names) != 2:
        return miss
    at = operands.index(read.view)
    of_weight, of_x = names[at], names[1 - at]
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    rest = value_of(operands[1 - at]).dim() - len(of_x.replace("...", ""))
    dots = "".join(free[:rest]) if "..." in of_x else ""
    if "..." in of_weight:
        return miss
    of_x, out = of_x.replace("...", dots), out.replace("...", dots)
    if not arrow:
        both = of_x + of_weight
        out = dots + "".join(sorted(c for c in set(both) - set(dots) if both.count(c) == 1))
    is_simple = all(len(set(part)) == len(part) for part in (of_x, of_weight, out))
    return Product(operands[1 - at], of_x, of_weight, out) if is_simple else miss


# Where the dimensions lie.


def _placed(read: ViewRead, product: Product) -> Contraction | Miss:
    name = op_name(read.node)
    size, stride, offset = read.geometry
    x_size = dict(zip(product.of_x, value_of(product.x).shape, strict=True))
    dims: list[tuple[str, str, int, int]] = []  # kind, name, size, stride
    repeated: set[str] = set()
    for letter, length, step in zip(product.of_weight, size, stride, strict=True):
        if length == 1 or (step == 0 and (letter in x_size or letter in product.of_out)):
            repeated.add(letter)
            continue
        in_x = letter in x_size and not (isinstance(x_size[letter], int) and x_size[letter] == 1)
        in_out = letter in product.of_out
        if not in_x and not in_out:
            return Miss(f"{name} sums over a dimension of the weight", is_matmul=True)
        dims.append((GROUP if in_x and in_out else ROW if in_out else COLUMN, letter, length, step))
    if any(c not in product.of_out and c not in product.of_weight for c in product.of_x):
        return Miss(f"{name} sums over a dimension of its input", is_matmul=True)
    dims.sort(key=lambda dim: -dim[3])
    parts = _parts(dims)
    shape = tuple(value_of(read.parameter).shape)
    split = None if parts is None else _split(parts, offset, shape)
    if split is None:
        where = f"{name} of {tuple(size)} with strides {tuple(stride)}"
        return Miss(f"{where} does not read rows and columns of one matrix", is_matmul=True)
    return Contraction(product, read, *split, frozenset(repeated))


@dataclass
class _Part:
    kind: str
    names: dict[str, int]
    step: int  # between its innermost elements


def _parts(dims: Sequence[tuple[str, str, int, int]]) -> list[_Part] | None:
    """Neighbours of one kind together; None if they do not lie one after another."""
    parts: list[_Part] = []
    for kind, name, size, stride in dims:
        if parts and parts[-1].kind == kind and parts[-1].step == stride * size:
            parts[-1].names[name] = size
            parts[-1].step = stride
        else:
            parts.append(_Part(kind, {name: size}, stride))
    kinds = [part.kind for part in parts]
    is_known = len(set(kinds)) == len(kinds) and kinds[1:].count(GROUP) == 0
    return parts if is_known else None


def _split(
    parts: list[_Part], offset: int, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], bool, Span, Span, Span | None] | None:
    """The matrix that a view is of, and its ranges: ``(matrix, is_transposed, rows, columns, groups)``."""
    count = math.prod(shape)
    group = parts[0] if parts and parts[0].kind == GROUP else None
    inner = parts[1:] if group else parts
    last = inner[-1] if inner and inner[-1].step == 1 else None
    first = inner[0] if inner and inner[0] is not last else None
    if first is not None:
        width = first.step
    else:
        needed = math.prod(last.names.values()) if last else 1
        width = next(n for n in _suffixes(shape) if n >= needed)
    is_batch = group is not None or (len(shape) == 3 and _is_expert(first, offset, width, shape))
    if group is not None:
        height = group.step // width if group.step % width == 0 else 0
    else:
        height = shape[-2] if is_batch else count // width
    if width * height == 0 or count % (width * height):
        return None
    outer = Span(first.names if first else {}, offset // width % height, height)
    within = Span(last.names if last else {}, offset % width, width)
    if any(span.start + span.length > span.total for span in (outer, within)):
        return None
    last_kind = last.kind if last else (ROW if first and first.kind == COLUMN else COLUMN)
    if first is None and last is None:
        last_kind = COLUMN
    is_transposed = last_kind == ROW
    rows, columns = (within, outer) if is_transposed else (outer, within)
    matrix: tuple[int, ...] = (height, width)
    if not is_batch:
        return matrix, is_transposed, rows, columns, None
    total = count // (height * width)
    groups = Span(group.names if group else {}, offset // (height * width), total)
    return (total, *matrix), is_transposed, rows, columns, groups


def _is_expert(first: _Part | None, offset: int, width: int, shape: tuple[int, ...]) -> bool:
    """Whether a view stays in one matrix of a batch, as the parameter has them."""
    length = math.prod(first.names.values()) if first else 1
    return width == shape[-1] and offset // width % shape[-2] + length <= shape[-2]


def _suffixes(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i:]) for i in reversed(range(len(shape) + 1))]
