"""`report.html`: one self-contained page that shows what was stored, how well, and why.

The one thing to know: it is made of the plan file alone, so any artifact can be reported again.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from typing import Any

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}
.facts{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.fact{background:#f2f5fa;border-radius:.5rem;padding:.6rem 1rem;min-width:8rem}
.fact b{display:block;font-size:1.3rem}
table{border-collapse:collapse;width:100%;font-size:13px}
th{position:sticky;top:0;background:#fff;text-align:left;border-bottom:2px solid #c9d3e3}
td,th{padding:.25rem .6rem}tr:nth-child(even){background:#f8fafd}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{background:#e3e9f3;border-radius:2px;width:9rem;height:.7rem}
.bar i{display:block;height:100%;border-radius:2px;background:#3567c4}.bar.e i{background:#c4643f}
code{font-size:12px}.why{color:#5a667a}
@media(prefers-color-scheme:dark){body{background:#12161d;color:#dbe2ee}.fact,tr:nth-child(even){background:#1b212c}
th{background:#12161d;border-color:#35405a}.bar{background:#2a3344}.why{color:#93a0b8}}
"""


def render(plan: Mapping[str, Any]) -> str:
    """The page for a plan file's contents."""
    name = html.escape(str(plan["source"]["name"]))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>kbitc: {name}</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{name}</h1><p class=why>compiled by kbitc {html.escape(str(plan['kbitc']))}</p>",
        _facts(plan),
        "<h2>Formats</h2>",
        _formats(plan),
        "<h2>Packed weights</h2>",
        _weights(plan),
        "<h2>Left at 16 bits</h2>",
        _left(plan),
        "</html>\n",
    ]
    return "\n".join(parts)


def _facts(plan: Mapping[str, Any]) -> str:
    ratio = plan["source_bytes"] / plan["bytes"]
    budget = "" if plan["budget"] is None else f" of a budget of {plan['budget']:g}"
    facts = {
        "stored bits per parameter": f"{plan['bits_per_param']:.4f}{budget}",
        "stored": f"{plan['bytes'] / 1e6:,.2f} MB",
        "source": f"{plan['source_bytes'] / 1e6:,.2f} MB ({ratio:.2f} times larger)",
        "parameters": f"{plan['parameters']:,}",
    }
    cells = (f"<div class=fact><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in facts.items())
    return f"<div class=facts>{''.join(cells)}</div>"


def _formats(plan: Mapping[str, Any]) -> str:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for entry in plan["weights"].values():
        count[entry["spec"]] += 1
        size[entry["spec"]] += _numel(entry["shape"])
    rows = (
        f"<tr><td><code>{html.escape(spec)}</code><td class=n>{count[spec]}<td class=n>{numel:,}"
        f"<td>{_bar(numel / max(size.values()))}"
        for spec, numel in size.most_common()
    )
    head = "<tr><th>spec<th>weights<th>parameters<th>"
    return f"<table>{head}{''.join(rows)}</table>"


def _weights(plan: Mapping[str, Any]) -> str:
    errors = [entry.get("error") or 0.0 for entry in plan["weights"].values()]
    worst = max(errors, default=0.0) or 1.0
    rows = []
    for name, entry in plan["weights"].items():
        error = entry.get("error")
        bits = entry.get("bits")
        rows.append(
            f"<tr><td><code>{html.escape(name)}</code><td class=n>{'×'.join(map(str, entry['shape']))}"
            f"<td><code>{html.escape(entry['spec'])}</code>"
            f"<td class=n>{'' if bits is None else f'{bits:.3f}'}<td>{_bar((bits or 0) / 16)}"
            f"<td class=n>{'' if error is None else f'{error:.4f}'}<td>{_bar((error or 0) / worst, 'bar e')}"
            f"<td class=why>{html.escape(entry['reason'])}"
        )
    head = "<tr><th>weight<th>shape<th>spec<th>bits<th><th>relative error<th><th>reason"
    return f"<table>{head}{''.join(rows)}</table>"


def _left(plan: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td><code>{html.escape(name)}</code><td class=n>{'×'.join(map(str, entry['shape']))}"
        f"<td class=why>{html.escape(entry['reason'])}"
        for name, entry in plan["left_alone"].items()
    )
    return f"<table><tr><th>tensor<th>shape<th>reason{''.join(rows)}</table>"


def _bar(share: float, kind: str = "bar") -> str:
    return f"<div class='{kind}'><i style='width:{100 * min(max(share, 0.0), 1.0):.1f}%'></i></div>"


def _numel(shape: list[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
