"""A program's graph as a folded list by module.

The one thing to know: neighbours that differ in their number alone are drawn once, so that thirty layers take
the room of one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from torch import fx

from kbitc.graph.program import CANONICAL, Program
from kbitc.graph.text import value_text
from kbitc.graph.weight_reads import op_name
from kbitc.report.page import Section, render
from kbitc.report.parts import shape_text


def graph_section(captured: Program, planned: Program) -> Section:
    """The graph before and after the passes, folded by module."""
    graphs = [
        (title, len(program.graph.graph.nodes), program is planned, module_tree(program))
        for program, title in ((captured, "before the passes, as captured"), (planned, "after the passes"))
    ]
    return Section("Graph", render("graphs", graphs=graphs))


def module_tree(program: Program) -> Markup:
    """The calls of a program, by the module that they are of."""
    return render("module", module=_folded([_tree(program)]))


@dataclass
class _Call:
    """A call of the graph: what it is, and for a canonical one its weight and the weight's spec."""

    label: str
    value: str
    weight: str = ""
    shape: str = ""
    spec: str = ""

    @property
    def signature(self) -> object:
        return self.label, self.value, self.shape


@dataclass
class _Module:
    """A module of the model: its calls and submodules, in the order of the graph."""

    name: str
    items: list[_Call | _Module] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    def child(self, name: str) -> _Module:
        if name not in self.children:
            self.children[name] = _Module(name)
            self.items.append(self.children[name])
        return self.children[name]

    @functools.cached_property
    def signature(self) -> object:
        """Equal for modules that draw the same, but for names and specs. The items are there by then."""
        name = "#" if self.name.isdigit() else self.name
        return name, tuple(item.signature for item in self.items)


def _tree(program: Program) -> _Module:
    weight_at = {use.node: weight for weight in program.weights.values() for use in weight.uses}
    root = _Module("the whole model")
    for node in program.graph.graph.nodes:
        if node.op != "call_function":
            continue
        module = root
        for part in _path(node):
            module = module.child(part)
        value = value_text(node.meta["val"]) if "val" in node.meta else ""
        call = _Call(CANONICAL.get(node.target) or op_name(node).removeprefix("aten."), value)
        weight = weight_at.get(node.name)
        if weight is not None:
            choice = None if program.plan is None else program.plan.weights.get(weight.name)
            call.weight, call.shape = weight.name, shape_text(weight.shape)
            call.spec = "no spec yet" if choice is None else str(choice.spec)
        module.items.append(call)
    return root


def _path(node: fx.Node) -> list[str]:
    """Names of the modules around a call, from the outermost; none for the model's own."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).partition("@")[0] if stack else ""
    return path.split(".") if path else []


@dataclass(frozen=True)
class _Plain:
    """Calls without a weight, one after the other, on one line."""

    labels: Sequence[str]
    kind = "plain"


@dataclass(frozen=True)
class _Line:
    """A call with a weight, of one module or of several alike."""

    label: str
    weight: str
    shape: str
    value: str
    specs: str
    kind = "weight"


@dataclass(frozen=True)
class _Fold:
    """A module, or several alike, as it is drawn."""

    name: str
    is_open: bool
    items: Sequence[_Plain | _Line | _Fold]
    kind = "fold"


def _folded(alike: Sequence[_Module]) -> _Fold:
    """Modules of one signature, drawn as the first of them."""
    first, last = alike[0], alike[-1]
    is_group = first.name != last.name
    name = f"{first.name} … {last.name} ({len(alike)} alike)" if is_group else first.name
    is_open = is_group or not first.name.isdigit()  # layers that all differ would be a long list
    items: list[_Plain | _Line | _Fold] = []
    plain: list[str] = []
    i = 0
    while i < len(first.items):
        item = first.items[i]
        if isinstance(item, _Call) and not item.weight:
            plain.append(item.label)
            i += 1
            continue
        items += [_Plain(plain)] if plain else []
        plain = []
        column = [module.items[i] for module in alike]
        if isinstance(item, _Call):
            items.append(_line([call for call in column if isinstance(call, _Call)]))
            i += 1
            continue
        length = _run_length(first.items, i) if len(alike) == 1 else 1
        group = first.items[i : i + length] if len(alike) == 1 else column
        items.append(_folded([module for module in group if isinstance(module, _Module)]))
        i += length
    items += [_Plain(plain)] if plain else []
    return _Fold(name, is_open, items)


def _run_length(items: Sequence[_Call | _Module], start: int) -> int:
    """How many items from ``start`` on are numbered modules that draw the same."""
    first = items[start]
    if not isinstance(first, _Module) or not first.name.isdigit():
        return 1
    signature = first.signature
    end = start + 1
    while end < len(items) and items[end].signature == signature:
        end += 1
    return end - start


def _line(alike: Sequence[_Call]) -> _Line:
    """The same call of modules alike: the first one's weight, and all their specs."""
    first = alike[0]
    specs = Counter(call.spec for call in alike)
    single = len(alike) == 1
    listed = ", ".join(spec if single else f"{times} × {spec}" for spec, times in specs.most_common())
    return _Line(first.label, first.weight, first.shape, first.value, listed)
