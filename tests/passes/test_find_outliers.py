"""Outlier features: found exactly where planted, kept when packed, shown."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch

import kbitc
from kbitc.checkpoint import demo, open_checkpoint
from kbitc.compiler.calibration_text import all_windows, spread
from kbitc.compiler.calibrator import Calibrator
from kbitc.compiler.driver import compile_to
from kbitc.compiler.inspection import inspect
from kbitc.compiler.request import Request, pipeline_of, unmeasured
from kbitc.errors import UsageError
from kbitc.evaluation.opening import open_model
from kbitc.evaluation.perplexity import perplexity
from kbitc.formats.spec import Spec, parse, parse_wish
from kbitc.graph.capture import capture
from kbitc.graph.context import Context
from kbitc.graph.queries import previous_weights
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.find_outliers import FindOutliers
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.passes.score_sensitivity import ScoreSensitivity
from kbitc.pipeline.manager import PassManager
from kbitc.report.outlier_map import outlier_map, summary
from kbitc.sensitivity.moments import MOMENTS, Moments, Reach
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures, share_of
from kbitc.sensitivity.score_table import SCORES
from kbitc.tensor.activations import use_activations

PLANTED = [11, 100, 201]
MAGNITUDE = 20.0
READS_PLANTED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)


@pytest.fixture(scope="module")
def planted():
    """The demo model, the same function, with three features of magnitude 20 where no other exceeds 1.

    A feature after a norm is scaled by the norm's gain, and its column of the next weights by the inverse.
    """
    loaded = open_model(str(demo.folder()), torch.float32)
    model = loaded.model
    tokens = spread(all_windows(loaded.tokenizer, demo.heldout().read_text(), 64), 8)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            seen = []
            handle = norm.register_forward_hook(lambda *given, seen=seen: seen.append(given[2].detach()))
            with torch.no_grad():
                model(input_ids=tokens)
            handle.remove()
            values = seen[0].flatten(0, -2)
            factor = torch.full((values.shape[1],), 1.0 / float(values.abs().max()))
            factor[PLANTED] = MAGNITUDE / values[:, PLANTED].square().mean(0).sqrt()
            with torch.no_grad():
                norm.weight.mul_(factor)
                for reader in readers:
                    reader.weight.div_(factor)
    return model, tokens


def found_on_text(model, tokens, **options):
    with open_checkpoint(model) as checkpoint:
        context = Context(checkpoint.read, Calibrator(checkpoint, tokens))
        program = capture(checkpoint.skeleton(), context=context)
        return PassManager([Canonicalize(), MeasureMoments(), FindOutliers(**options)]).run(program)


def found_on_weights(model, **options):
    with open_checkpoint(model) as checkpoint:
        program = capture(checkpoint.skeleton(), context=Context(checkpoint.read))
        return PassManager([Canonicalize(), FindOutliers(**options)]).run(program)


def test_planted_features_are_found_exactly(planted):
    model, tokens = planted
    found = found_on_text(model, tokens[:2]).facts[OUTLIERS]
    for name, own in found.items():
        if any(reader in name for reader in READS_PLANTED):
            assert list(own.index) == PLANTED, name
            assert all(share == 1.0 for share in own.figures["layers"])
            assert all(share > 0.5 for share in own.figures["positions"])
            assert all(15 < peak < 200 for peak in own.figures["magnitude"])
        else:
            assert not set(own.index) & set(PLANTED), name


def test_kept_outliers_recover_the_loss_that_int8_adds(planted):
    """LLM.int8(): without its outlier features, rounding the rest to 8 bits costs next to nothing."""
    model, tokens = planted
    text = tokens[2:]

    def score(spec):
        plan = {"weights": {"model.embed_tokens.weight": "fp16", "*": spec}}
        compiled = kbitc.compile(model, plan=plan, calibrate=tokens[:2])
        assert use_activations(compiled, "int8") == {}
        return perplexity(compiled, text, reference=model), compiled

    plain, _ = score("int8:384")
    kept, compiled = score("int8:384+out")
    dense = perplexity(model, text).loss
    assert compiled.model.layers[2].mlp.up_proj.weight.packed.outlier_index.tolist() == PLANTED
    assert plain.loss - dense > 0.02
    assert kept.divergence < 0.01 * plain.divergence
    assert abs(kept.loss - dense) < 0.01 * (plain.loss - dense)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "mixtral", "bart", "t5"])
def test_the_weight_before_has_as_many_output_units(family, tiny_model):
    program = PassManager([Canonicalize()]).run(capture(tiny_model(family)))
    before = previous_weights(program)
    assert before
    for name, (source, kind) in before.items():
        weight = program.weights[source]
        lead = weight.shape[0] if len(weight.shape) == 3 else 1
        made = weight.in_features if kind == "embedding" else weight.rows // lead
        assert made == program.weights[name].in_features


def test_the_weight_before_in_a_llama(tiny_model):
    before = previous_weights(PassManager([Canonicalize()]).run(capture(tiny_model("llama"))))
    layer = "model.layers.1."
    down = "model.layers.0.mlp.down_proj.weight"
    assert before[layer + "self_attn.q_proj.weight"] == (down, "linear")
    assert before["model.layers.0.self_attn.q_proj.weight"] == ("model.embed_tokens.weight", "embedding")
    assert before[layer + "mlp.up_proj.weight"] == (layer + "self_attn.o_proj.weight", "linear")
    assert before[layer + "mlp.down_proj.weight"] == (layer + "mlp.up_proj.weight", "linear")
    # Two heads of values for four of queries: no output unit is an input feature, and scores are none.
    assert layer + "self_attn.o_proj.weight" not in before


def test_attention_carries_the_features_of_the_values(tiny_model):
    before = previous_weights(PassManager([Canonicalize()]).run(capture(tiny_model("opt"))))
    layer = "model.decoder.layers.1.self_attn."
    assert before[layer + "out_proj.weight"] == (layer + "v_proj.weight", "linear")


def test_without_text_the_output_units_before_tell(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[[5, 31]] *= 20
    found = found_on_weights(model).facts[OUTLIERS]
    for reader in ("q_proj", "k_proj", "v_proj"):
        own = found[f"model.layers.1.self_attn.{reader}.weight"]
        assert own.index == (5, 31)
        assert "model.layers.0.mlp.down_proj.weight" in own.reason
    assert found["model.layers.1.mlp.up_proj.weight"].index == ()
    assert found["model.layers.1.mlp.up_proj.weight"].reason.startswith("none: ")
    assert (
        found["model.layers.0.self_attn.o_proj.weight"].ranking.tolist()
        == torch.sort(
            model.model.layers[0].self_attn.o_proj.weight.std(0, correction=0), descending=True, stable=True
        ).indices.tolist()
    )


def test_criterion_counts_layers_and_positions(tiny_model):
    """Six layers would be clearer, but two do: thresholds stand between one layer and both."""
    program = PassManager([Canonicalize()]).run(capture(tiny_model("llama")))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    in_features = program.weights[names[0]].in_features
    peaks, positions = torch.ones(2, in_features), torch.zeros(2, in_features)
    for feature, peak, share in [
        (3, (20.0, 20.0), (0.10, 0.02)),  # both layers, 6 % of all positions
        (4, (20.0, 20.0), (0.09, 0.02)),  # 5.5 %
        (7, (20.0, 5.9), (0.50, 0.0)),  # one layer of two
        (9, (6.0, 6.0), (1.0, 1.0)),
    ]:
        peaks[:, feature], positions[:, feature] = torch.tensor(peak), torch.tensor(share)
    moments = {name: Moments((), Reach(peaks[i], positions[i], 6.0)) for i, name in enumerate(names)}
    program = program.with_fact(MOMENTS, moments)

    def index(**options):
        facts = FindOutliers(**options).run(program).facts[OUTLIERS]
        return [list(facts[name].index) for name in names]

    # What does not reach 6 in a layer is not kept there.
    assert index() == [[3, 7, 9], [3, 9]]
    assert index(layers=0.51) == [[3, 9], [3, 9]]
    assert index(positions=0.05) == [[3, 4, 7, 9], [3, 4, 9]]
    assert index(positions=1.0) == [[9], [9]]
    found = FindOutliers(positions=0.9, layers=0.6).run(program).facts[OUTLIERS]
    assert found[names[0]].ranking[0] == 9
    assert found["model.layers.0.mlp.down_proj.weight"].index == ()


def test_a_number_of_features_has_a_share():
    for in_features in (2, 7, 48, 576, 1536, 11008, 50257):
        for count in {n for n in (1, 2, 3, in_features // 2, in_features - 1) if 0 < n < in_features}:
            spec = Spec("nf", 4, outliers=share_of(count, in_features))
            assert parse(str(spec)).outlier_count(in_features) == count
    with pytest.raises(ValueError, match="share"):
        share_of(7, 7)


def test_found_features_are_candidates_and_are_packed(planted, tmp_path):
    model, tokens = planted
    program = found_on_text(model, tokens[:2])
    with open_checkpoint(model) as checkpoint:
        names = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight")
        few = {name: program.weights[name] for name in names}
        program = replace(program, weights=few, context=Context(checkpoint.read))
        scores = ScoreSensitivity().run(program).facts[SCORES]
    options = {str(o.spec): o for o in scores.options["model.layers.0.mlp.up_proj.weight"]}
    share = f"+out{share_of(3, 256):g}%"
    assert options["nf4:64+dq" + share].cost <= options["nf4:64+dq"].cost
    assert f"int8:256{share}" in options
    without = {str(o.spec) for o in scores.options["model.layers.0.self_attn.o_proj.weight"]}
    assert not any("+out" in spec for spec in without)

    # A spec of the user's takes the found ones first, and a share of more than were found adds others.
    result = compile_to(model, tmp_path / "out", Request(spec="int8:384+out2%", calibrate=tokens[:2]))
    artifact = kbitc.Artifact.open(tmp_path / "out")
    kept = artifact.state()["model.layers.3.mlp.gate_proj.weight"].packed.outlier_index.tolist()
    assert len(kept) == 5
    assert set(kept) > set(PLANTED)
    entry = artifact.plan.weights["model.layers.3.mlp.gate_proj.weight"].outlier_features
    assert (entry["index"], entry["kept"]) == (PLANTED, 5)
    assert "of positions" in entry["reason"]
    assert "3: 11, 100, 201 (|x| up to" in summary(entry)
    assert result.payload_bytes == artifact.payload_bytes


def test_plus_out_means_what_was_found():
    assert str(parse_wish("int8:64+out+dq")) == "int8:64+dq+out"
    found = OutlierFeatures((1, 5), {}, "two", torch.tensor([5, 1, 0, 2, 3, 4]))
    spec = found.kept_under(parse("nf4:32"))
    assert found.picked(spec).tolist() == [1, 5]
    assert str(OutlierFeatures(ranking=torch.arange(4)).kept_under(parse("nf4:32"))) == "nf4:32"
    with pytest.raises(UsageError, match="name a share"):
        kbitc.quantize(torch.ones(2, 8), "int8:8+out")
    with pytest.raises(UsageError, match="twice|with a share"):
        parse_wish("int8:8+out+out1%")


def test_pipelines(tiny_model):
    def names(**request):
        asked = Request(**request)
        manager = PassManager(pipeline_of(asked)).without(unmeasured(asked))
        return [type(pass_).__name__ for pass_ in manager.passes]

    assert "FindOutliers" not in names(bits=4)  # no text, so nobody waits for it
    assert "FindOutliers" not in names(spec="nf4:64")
    assert "FindOutliers" in names(spec="nf4:64+out")
    assert "FindOutliers" in names(plan={"weights": {"*": "nf4:64+out1%"}})
    with pytest.raises(UsageError, match="find_outliers"):
        kbitc.compile(tiny_model("llama"), spec="int8:64+out", passes=["canonicalize", "apply_plan"])
    program = PassManager([Canonicalize()]).run(capture(tiny_model("llama")))
    with pytest.raises(UsageError, match="neither text nor weights"):
        FindOutliers().run(replace(program, context=Context()))


def test_two_runs_agree_also_from_the_cache(tiny_model):
    tokens = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(tiny_model("mixtral"))
    first, second = (found_on_text(model, tokens).facts[OUTLIERS] for _ in range(2))
    assert first.keys() == second.keys()
    for name, own in first.items():
        assert own.to_json() == second[name].to_json()


def test_shown_as_a_table_and_a_map(tiny_model):
    data = inspect("demo").to_json()
    features = {name: entry["outlier_features"] for name, entry in data["weights"].items()}
    json.dumps(features)
    page = outlier_map(features)
    cells = re.findall(r"<title>layer (\d*), feature (\d+)", page)
    # q, k and v have one map: each of its cells is drawn once.
    expected = {
        (re.search(r"\d+", name)[0], str(i))
        for name, entry in features.items()
        if "q_proj" in name
        for i in entry["index"]
    }
    assert expected
    assert expected <= set(cells)
    assert page.count("q_proj") == 1
    assert "http" not in page
    assert "No weight" in outlier_map({"w": OutlierFeatures().to_json()})
