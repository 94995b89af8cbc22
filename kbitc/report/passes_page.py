"""One self-contained HTML page about a run of passes: times, what changed, diffs, the planned graph.

The one thing to know: the graph is a folded list by module, and neighbours that differ in their number
alone are drawn once, so that thirty layers take the room of one. The page loads nothing.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from torch import fx

from kbitc.graph import queries
from kbitc.graph.program import CANONICAL, Program
from kbitc.graph.text import program_diff, value_text
from kbitc.graph.weight_reads import op_name
from kbitc.pipeline.manager import STEPS, Step
from kbitc.report.page import Section, join, style

MOST_LINES = 4000
"""Of one diff: 100 layers' worth; a page of more is slow to open."""


@dataclass
class PassesPage:
    """Observes a `PassManager`, then renders what it saw.

    Attributes:
        title: of the page, the model's name.
        runs: for each pass what the manager measured, and the diff of the program's text.
    """

    title: str
    runs: list[tuple[Step, str]] = field(default_factory=list)

    def __call__(self, name: str, before: Program, after: Program, seconds: float) -> None:
        """See `kbitc.pipeline.manager.Observer`."""
        del name, seconds  # both are in the step
        self.runs.append((after.known(STEPS)[-1], program_diff(before, after)))

    def html(self, program: Program) -> str:
        """The page; ``program`` is what the last pass returned."""
        title = html.escape(self.title)
        shared = (f"<p><code>{html.escape(' · '.join(g))}</code>" for g in queries.shared_inputs(program))
        parts = [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>kbitc: passes of {title}</title>",
            f"<meta name=viewport content='width=device-width'><style>{style()}</style>",
            f"<h1>Passes of {title}</h1>",
            _steps([step for step, _ in self.runs]),
            *(_diff(step, diff) for step, diff in self.runs),
            "<h2>Graph</h2>",
            *_modules([_tree(program)]),
            "<h2>Weights that read the same input</h2>",
            f"<details><summary>groups</summary>{''.join(shared)}</details>",
            "</html>\n",
        ]
        return "\n".join(parts)


def graph_section(captured: Program, planned: Program) -> Section:
    """The graph before and after the passes, folded by module."""
    fold = Markup("<details{}><summary>{} ({:,} nodes)</summary>{}</details>")
    shown = (
        fold.format(
            is_open,
            title,
            len(program.graph.graph.nodes),
            Markup("\n".join(_modules([_tree(program)]))),  # noqa: S704  # escaped piece by piece
        )
        for program, title, is_open in (
            (captured, "before the passes, as captured", Markup("")),
            (planned, "after the passes", Markup(" open")),
        )
    )
    return Section("Graph", join(shown))


def _steps(steps: Sequence[Step]) -> str:
    rows = (
        f"<tr><td><code>{html.escape(step.name)}</code><td class=n>{1000 * step.seconds:,.1f} ms"
        f"<td class=n>{step.nodes_before:,}<td class=n>{step.nodes_after:,}<td>{html.escape(str(step))}"
        for step in steps
    )
    head = "<tr><th>pass<th>time<th>nodes before<th>after<th>what changed"
    return f"<table>{head}{''.join(rows)}</table>"


def _diff(step: Step, diff: str) -> str:
    lines = diff.splitlines()[2:]  # without the two file names
    shown = [_marked(line) for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"... and {len(lines) - MOST_LINES:,} lines more; --print-diff prints them all")
    body = "\n".join(shown) or "the program's text is the same"
    name = html.escape(step.name)
    return f"<details><summary>changes of <code>{name}</code></summary><pre>{body}</pre></details>"


def _marked(line: str) -> str:
    tag = {"+": "ins", "-": "del"}.get(line[:1])
    text = html.escape(line)
    return text if tag is None else f"<{tag}>{text}</{tag}>"


@dataclass
class _Call:
    """A call of the graph: what it is, and for a canonical one its weight and the weight's spec."""

    label: str
    value: str
    weight: str = ""
    shape: str = ""
    spec: str = ""

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

    def signature(self) -> object:
        """Equal for modules that draw the same, but for names and specs."""
        name = "#" if self.name.isdigit() else self.name
        return name, tuple(item.signature() for item in self.items)


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
            call.weight, call.shape = weight.name, "×".join(map(str, weight.shape))
            call.spec = "no spec yet" if choice is None else str(choice.spec)
        module.items.append(call)
    return root


def _path(node: fx.Node) -> list[str]:
    """Names of the modules around a call, from the outermost; none for the model's own."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).partition("@")[0] if stack else ""
    return path.split(".") if path else []


def _modules(alike: Sequence[_Module]) -> list[str]:
    """Modules of one signature, drawn as the first of them."""
    first, last = alike[0], alike[-1]
    is_group = first.name != last.name
    name = f"{first.name} … {last.name} ({len(alike)} alike)" if is_group else first.name
    is_open = is_group or not first.name.isdigit()  # layers that all differ would be a long list
    lines = [f"<details{' open' if is_open else ''}><summary><code>{html.escape(name)}</code></summary>"]
    plain: list[str] = []
    i = 0
    while i < len(first.items):
        item = first.items[i]
        if isinstance(item, _Call) and not item.weight:
            plain.append(item.label)
            i += 1
            continue
        lines += _plain(plain)
        plain = []
        column = [module.items[i] for module in alike]
        if isinstance(item, _Call):
            lines.append(_calls([call for call in column if isinstance(call, _Call)]))
            i += 1
            continue
        count = _run_length(first.items, i) if len(alike) == 1 else 1
        group = first.items[i : i + count] if len(alike) == 1 else column
        lines += _modules([module for module in group if isinstance(module, _Module)])
        i += count
    return [*lines, *_plain(plain), "</details>"]


def _run_length(items: Sequence[_Call | _Module], start: int) -> int:
    """How many items from ``start`` on are numbered modules that draw the same."""
    first = items[start]
    if not isinstance(first, _Module) or not first.name.isdigit():
        return 1
    signature = first.signature()
    end = start + 1
    while end < len(items) and items[end].signature() == signature:
        end += 1
    return end - start


def _plain(labels: Sequence[str]) -> list[str]:
    return [f"<div class=ops>{html.escape(', '.join(labels))}</div>"] if labels else []


def _calls(alike: Sequence[_Call]) -> str:
    """One line for the same call of modules alike: the first one's weight, and all their specs."""
    first = alike[0]
    specs = Counter(call.spec for call in alike)
    listed = ", ".join(
        spec if len(alike) == 1 else f"{count} × {spec}" for spec, count in specs.most_common()
    )
    return (
        f"<div class=call><b>{html.escape(first.label)}</b> <code>{html.escape(first.weight)}</code> "
        f"{first.shape} → {html.escape(first.value)} · <b>{html.escape(listed)}</b></div>"
    )
