"""The page of a model that is not compiled yet: what can be known from its shapes and weights.

The one thing to know: sizes are exact, since a spec and a shape give every byte; losses are not known before
something was scored, so none are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kbitc.artifact.plan_file import LeftAlone
from kbitc.formats.layout import weight_bytes
from kbitc.formats.spec import parse
from kbitc.graph.program import Program
from kbitc.graph.stored import rest_bytes
from kbitc.report.charts import HeatCell
from kbitc.report.outlier_map import outlier_map
from kbitc.report.page import Cell, Section, code, count, number, page, render, table
from kbitc.report.parts import layer_map, left_alone, shape_text
from kbitc.sensitivity.outliers import OutlierFeatures

SPECS = ("int8:64+dq", "nf6:64+dq", "nf5:64+dq", "nf4:32", "nf4:64", "nf4:64+dq", "nf3:64+dq", "nf2:64+dq")
"""Uniform formats whose sizes the page tells."""

MOST_FEATURES = 12
"""Outlier features that the table lists of a weight."""


def model_page(
    label: str, program: Program, outliers: Mapping[str, OutlierFeatures], sections: Sequence[Section] = ()
) -> str:
    """The page of a canonical program.

    Args:
        label: the model as the user named it.
        program: its weights are listed and sized.
        outliers: features that stand out, by weight name.
        sections: of those who know more.
    """
    packable = sum(weight.numel for weight in program.weights.values())
    matmuls = sum(rest.is_matmul for rest in program.rest.values())
    facts = {
        "parameters, tied ones counted once": f"{program.parameter_count:,}",
        "tensors, with weights at 16 bits": f"{(2 * packable + rest_bytes(program)) / 1e6:,.2f} MB",
        f"of the parameters, in {len(program.weights)} weights, can be packed": (
            f"{100 * packable / max(1, program.parameter_count):.2f} %"
        ),
        "weights of matmuls that cannot be packed": str(matmuls),
    }
    left = {name: LeftAlone(rest.description, rest.shape) for name, rest in program.rest.items()}
    parts = [
        Section("What uniform formats would take", _sizes(program)),
        Section("Parameters by layer", _by_layer(program)),
        Section("Weights", _weights(program, outliers)),
        Section("Outlier features", outlier_map({name: own.to_json() for name, own in outliers.items()})),
        *sections,
        Section("Not packed", left_alone(left)),
    ]
    return page(label, "not compiled yet: losses are known once 'kbitc compile' has scored it", facts, parts)


def _sizes(program: Program) -> Markup:
    fixed = rest_bytes(program)
    rows = []
    for text in SPECS:
        spec = parse(text)
        nbytes = fixed + sum(
            weight_bytes(spec, w.oriented_shape[:-1], w.in_features) for w in program.weights.values()
        )
        bits = 8 * nbytes / program.parameter_count
        rows.append([code(text), number(bits, ".4f"), Cell(f"{nbytes / 1e6:,.2f} MB", nbytes)])
    return render("sizes", table=table(("spec", "stored bits per parameter", "stored tensors"), rows))


def _by_layer(program: Program) -> Markup:
    cells = {
        name: HeatCell(weight.numel, f"{weight.numel / 1e6:.2f}M", f"{name}: {weight.numel:,} parameters")
        for name, weight in program.weights.items()
    }
    return layer_map(cells, "parameters")


def _weights(program: Program, outliers: Mapping[str, OutlierFeatures]) -> Markup:
    rows: list[list[Cell | str]] = []
    for name, weight in program.weights.items():
        features = outliers[name].index if name in outliers else ()
        more = " …" if len(features) > MOST_FEATURES else ""
        rows.append(
            [
                Cell(code=name, wraps=True),
                Cell(shape_text(weight.shape), weight.numel),
                ", ".join(weight.kinds),
                ", ".join(weight.aliases),
                count(len(features)),
                ", ".join(map(str, features[:MOST_FEATURES])) + more,
            ]
        )
    columns = ("weight", "shape", "read by", "tied to", "outlier features", "which")
    return table(columns, rows, name="weights")
