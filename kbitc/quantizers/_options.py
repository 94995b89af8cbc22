"""Options of a quantizer in its name: ``feedback(no-target, polish=1)``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from kbitc.errors import UsageError, did_you_mean

NAMED = re.compile(r"\s*([\w.-]+?)\s*(?:\((.*)\)\s*)?")
NUMBERS = {int: "a whole number", float: "a number"}


def split_name(text: str) -> tuple[str, str]:
    """``(name, what stands between its brackets)``.

    Raises:
        UsageError: neither a name nor a name with options.

    >>> split_name("feedback(no-target, polish=1)")
    ('feedback', 'no-target, polish=1')
    """
    match = NAMED.fullmatch(text)
    if match is None:
        raise UsageError(
            f"quantizer '{text}': expected a name, or a name with options in brackets such as "
            "feedback(no-target, polish=1)"
        )
    return match[1], match[2] or ""


def options_of(kind: type[Any], name: str, text: str) -> Mapping[str, Any]:
    """The fields that options set: ``x`` and ``no-x`` a switch, ``x=1`` a number.

    Args:
        kind: a quantizer, a dataclass.
        name: of it, for errors.
        text: see :func:`split_name`.

    Raises:
        UsageError: no such option, or a value that it cannot have.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)} if text else {}
    chosen: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        option, _, value = (each.strip() for each in part.partition("="))
        option = option.removeprefix("no-") if not value else option
        default = defaults.get(option)
        if option not in defaults:
            raise UsageError(f"quantizer '{name}': {did_you_mean('option', option, defaults)}")
        if isinstance(default, bool) != (not value):
            how = f"'{option}' or 'no-{option}'" if isinstance(default, bool) else f"'{option}=...'"
            raise UsageError(f"quantizer '{name}': write {how}, not '{part}'")
        chosen[option] = _number(type(default), name, part, value) if value else not part.startswith("no-")
    return chosen


def _number(kind: type[Any], name: str, part: str, value: str) -> Any:
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise UsageError(f"quantizer '{name}': '{part}' must be {NUMBERS[kind]}, and not negative")
    return number
