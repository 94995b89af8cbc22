"""JSON from files that nobody vouches for: bounded in size and depth, valid UTF-8, of the shape asked for.

The one thing to know: every file of JSON that kbitc reads comes through here, so that a damaged or hostile
one is a `SourceError` that names it, whatever is wrong with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kbitc.errors import KbitcError, SourceError, UsageError, first_line
from kbitc.system import files

MAX_BYTES = 256 * 2**20
"""Of one file; the table of scores of a model of 100 thousand weights takes a tenth of it."""
MAX_DEPTH = 64
"""Of arrays and objects in each other; configs take less than ten."""
MAX_ELEMENTS = 2**48
"""Of one tensor, zero sizes counted as one: products of its sizes fit 64 bits."""
AGAIN = "copy or download it again"

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What indexing into parsed JSON, and converting its values, raises where it is of another shape."""


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        SourceError: it cannot be read, is a pipe or device, or longer than ``limit``.
    """
    with files.reading(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise SourceError(f"{path}: has {size} bytes, more than the {limit} of any such file; {AGAIN}")
        return handle.read()


def read_any_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        SourceError: it cannot be read, or :func:`parse` refuses it.
    """
    return parse(read_limited(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SourceError: it cannot be read, :func:`parse` refuses it, or it is something else.
    """
    data = read_any_json(path)
    if not isinstance(data, dict):
        raise SourceError(f"{path}: is a JSON {type(data).__name__}, not an object; {AGAIN}")
    return data


def parse(raw: bytes, label: str, *, has_unique_keys: bool = False) -> Any:
    """The value of JSON text.

    Args:
        raw: UTF-8.
        label: of the file, for messages.
        has_unique_keys: an object that names a key twice is refused: two readers may take different ones.

    Raises:
        SourceError: not JSON, not UTF-8, or deeper than ``MAX_DEPTH``.
    """
    pairs = _unique if has_unique_keys else None
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
        _check(data)
    except RecursionError as error:
        raise SourceError(f"{label}: is nested deeper than {MAX_DEPTH} levels; {AGAIN}") from error
    except ValueError as error:
        raise SourceError(f"{label}: is not valid JSON ({error}); {AGAIN}") from error
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands there twice")
    return made


def _check(data: object) -> None:
    """No value too deep, no text that UTF-8 cannot hold (JSON can: half of a surrogate pair)."""
    level: list[object] = [data]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise RecursionError


@contextmanager
def well_formed(label: str, advice: str, raises: type[KbitcError] = SourceError) -> Iterator[None]:
    """Around what takes parsed JSON apart: values of another shape than expected are an error that says so.

    Args:
        label: of the file.
        advice: what to do about a damaged one.
        raises: class of the error; what is raised on purpose passes as it is, or as ``raises`` if that is
            a `UsageError` about a value.
    """
    try:
        yield
    except SourceError:
        raise
    except UsageError as error:
        raise raises(f"{label}: {error}") from error
    except MALFORMED as error:
        raise raises(f"{label}: damaged ({type(error).__name__}: {first_line(error)}); {advice}") from error


def strings(value: object, what: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise TypeError(f"{what} is no list of texts: {value!r:.80}")
    return tuple(value)


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """An object.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is no object: {value!r:.80}")
    return value


def sizes(value: object, what: str) -> tuple[int, ...]:
    """A list of whole numbers that are not negative.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise TypeError(f"{what} has no list of sizes, but {value!r:.80}")
    return tuple(value)


def shape(value: object, what: str) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        TypeError, ValueError: it is something else, or larger than any tensor.
    """
    dims = sizes(value, what)
    if math.prod(size or 1 for size in dims) >= MAX_ELEMENTS:
        raise ValueError(f"{what} is larger than any tensor: {value!r:.80}")
    return dims
