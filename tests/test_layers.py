"""Imports go one way: a module imports from its own layer's lower neighbours only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import modules of lower layers, and of its own line from left to right.
LAYERS = [
    ["kbitc.errors", "kbitc.version", "kbitc.knapsack"],
    [
        "kbitc.datatypes",
        "kbitc.spec",
        "kbitc.packing",
        "kbitc.nearest",
        "kbitc.scale_search",
        "kbitc.blockwise",
        "kbitc.slots",
    ],
    ["kbitc.kernels.reference", "kbitc.kernels.cpu.build", "kbitc.kernels.gpu", "kbitc.kernels.ops"],
    ["kbitc.tensor", "kbitc.activations", "kbitc.moments", "kbitc.outliers", "kbitc.scoring"],
    [
        "kbitc.plan",
        "kbitc.program",
        "kbitc.streaming",
        "kbitc.fisher",
        "kbitc.reads",
        "kbitc.matching",
        "kbitc.graphs",
        "kbitc.scores",
        "kbitc.tradeoff",
        "kbitc.roles",
        "kbitc.rewriting",
        "kbitc.fusions",
    ],
    ["kbitc.registry", "kbitc.pass_order", "kbitc.drawing", "kbitc.invariants", "kbitc.pipeline"],
    [
        "kbitc.passes.canonicalize",
        "kbitc.passes.fold_norms",
        "kbitc.passes.measure_moments",
        "kbitc.passes.find_outliers",
        "kbitc.passes.score_sensitivity",
        "kbitc.passes.allocate_bits",
        "kbitc.passes.apply_plan",
        "kbitc.passes.insert_dequantize",
        "kbitc.passes.fuse_dequantize",
        "kbitc.passes.fuse_epilogues",
        "kbitc.passes.merge_linears",
        "kbitc.passes.remove_dead_code",
        "kbitc.passes",
    ],
    [
        "kbitc.backends._decoder",
        "kbitc.backends._lifted",
        "kbitc.backends._decode_step",
        "kbitc.backends._dynamo_owner",
        "kbitc.backends._dynamo_graph",
        "kbitc.backends.eager",
        "kbitc.backends.cpu",
        "kbitc.backends._onnx_runtime",
        "kbitc.backends._onnx_blocks",
        "kbitc.backends._onnx_container",
        "kbitc.backends._onnx_emit",
        "kbitc.backends._onnx_stored",
        "kbitc.backends._onnx_weight",
        "kbitc.backends._onnx_trace",
        "kbitc.backends._onnx_rewrite",
        "kbitc.backends",
    ],
    [
        "kbitc.checkpoint",
        "kbitc.example_inputs",
        "kbitc.capture",
        "kbitc.artifact",
        "kbitc.huggingface",
        "kbitc.measured",
        "kbitc.page",
        "kbitc.outlier_map",
        "kbitc.charts",
        "kbitc.report",
        "kbitc.passes_page",
        "kbitc.model_page",
    ],
    ["kbitc.documents", "kbitc.pack", "kbitc.loading", "kbitc.calibration"],
    ["kbitc.request", "kbitc.driver"],
    ["kbitc.backends._onnx_package", "kbitc.backends.onnx_export"],
    [
        "kbitc.demo",
        "kbitc.evaluation",
        "kbitc.inspection",
        "kbitc.benchmark",
        "kbitc.onnx_memory",
        "kbitc.onnx_verify",
        "kbitc.backends.dynamo",
    ],
    ["kbitc.cli", "kbitc.__main__"],
]
FREE = {"kbitc"}  # the package itself, whose names are lazy: nothing below imports it
RANK = {name: (i, j) for i, layer in enumerate(LAYERS) for j, name in enumerate(layer)}


def source_files():
    files = {}
    for folder, prefix in (
        ("kbitc", "kbitc"),
        ("passes", "kbitc.passes"),
        ("kernels", "kbitc.kernels"),
        ("backends", "kbitc.backends"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "kbitc" and parts[0] in ("passes", "kernels", "backends"):
                continue
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            files[name] = path
    return files


FILES = source_files()


def rank(name):
    while name not in RANK:
        name = name.rpartition(".")[0]
        assert name, "unknown module"
    return RANK[name]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module


@pytest.mark.parametrize("name", sorted(set(FILES) - FREE))
def test_imports_point_down(name):
    for target in imports(FILES[name]):
        if not target.startswith("kbitc"):
            continue
        assert target not in FREE, f"{name} imports the package, which is above it"
        same_package = rank(target) == rank(name)
        assert same_package or rank(target) < rank(name), f"{name} imports {target}, which is not below it"


def test_every_module_has_a_layer():
    for name in set(FILES) - FREE:
        rank(name)


def test_kernels_is_no_package_at_the_root():
    """With an __init__.py there, transformers would take it for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_module_says_what_it_is():
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), name
