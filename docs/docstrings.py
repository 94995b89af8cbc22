"""A griffe extension: what docstrings align by hand, equations and doctests, stays as it is written.

before:  a paragraph of "name   text" lines, or of ">>>", which Markdown would run together
after:   a fenced block of it
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ALIGNED = re.compile(r"\s*[^\s:=]+(?:: {2,}| += )\S")


class Fences(griffe.Extension):
    """Fences such paragraphs."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Doctests stand anywhere, equations in the docstrings of modules."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value, with_equations=obj.is_module)


def fenced(text: str, *, with_equations: bool) -> str:
    """``text`` with its doctests, and its equations if asked, between fences."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith(">>>"):
            paragraphs[i] = f"```python\n{paragraph}\n```"
        elif with_equations and ALIGNED.match(paragraph):
            paragraphs[i] = f"```\n{paragraph}\n```"
    return "\n\n".join(paragraphs)
