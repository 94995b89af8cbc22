"""The campaign over architectures: shrunk configs build, matmul weights are found, records become a table."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import transformers
from torch import nn

from benchmarks.architectures import report
from benchmarks.architectures.__main__ import line, main
from benchmarks.architectures.classes import SPECIAL, TABLES, model_classes, spread
from benchmarks.architectures.fields import HIDDEN, VOCABULARY
from benchmarks.architectures.inputs import inputs_for
from benchmarks.architectures.measure import difference, matmul_weights
from benchmarks.architectures.selections import Selections
from benchmarks.architectures.shrink import shrink
from benchmarks.processes import Job, run_jobs

KINDS = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "JambaForCausalLM", "DeepseekV3ForCausalLM", "Gemma3ForCausalLM",
    "MambaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM", "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC", "SwinForImageClassification", "CLIPModel", "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "PatchTSTForPrediction", "ResNetForImageClassification",
    "RecurrentGemmaForCausalLM", "FalconH1ForCausalLM", "LlavaNextForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration", "InstructBlipForConditionalGeneration", "RTDetrV2ForObjectDetection",
    "PvtForImageClassification", "ClapModel",
]  # fmt: skip


def tiny(name):
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    data = shrink(config_class().to_dict(), SPECIAL.get(config_class.model_type))
    return model_class, config_class.from_dict(data)


@pytest.mark.parametrize("name", KINDS)
def test_shrunk_models_of_every_kind_are_tiny_and_run(name):
    model_class, config = tiny(name)
    model = model_class._from_config(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    label, feed = inputs_for(model)
    assert feed
    if any(word in name for word in ("Llava", "VL", "Audio", "Blip", "Clap")):
        assert label.startswith("tokens and")


def test_hidden_sizes_are_one_all_over_the_tree():
    small = shrink(transformers.LlavaConfig().to_dict())
    assert small["text_config"]["hidden_size"] == small["vision_config"]["hidden_size"] == HIDDEN


def test_one_layer_of_each_kind_stays():
    layers = ["linear", "linear", "linear", "full"] * 4
    small = shrink(
        {"num_hidden_layers": 16, "hidden_size": 256, "layer_types": layers, "mlp_bias": [True] * 16}
    )
    assert small["layer_types"] == ["linear", "full"]
    assert small["num_hidden_layers"] == 2
    assert small["mlp_bias"] == [True, True]


def test_tokens_stay_apart_and_in_the_vocabulary():
    big = {"vocab_size": 32000, "pad_token_id": 0, "image_token_id": 31999, "eos_token_id": [31998, 31999]}
    small = shrink(big)
    assert small["vocab_size"] == VOCABULARY
    assert small["pad_token_id"] == 0
    assert small["eos_token_id"][1] == small["image_token_id"] < VOCABULARY
    assert small["eos_token_id"][0] not in (small["image_token_id"], 0)


def test_heads_divide_and_groups_stay_groups():
    small = shrink(
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    )
    assert small["num_attention_heads"] * small["head_dim"] == small["hidden_size"]
    assert small["num_attention_heads"] % small["num_key_value_heads"] == 0
    assert 1 < small["num_key_value_heads"] < small["num_attention_heads"]


def test_stages_keep_their_ratios_and_rotary_sections_their_sum():
    small = shrink(
        {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "num_attention_heads": [1, 2, 5, 8]}
    )
    assert small["hidden_sizes"] == [16, 32, 80, 128]
    assert small["depths"] == [1, 1, 1, 1]
    sections = shrink({"rope_scaling": {"mrope_section": [16, 24, 24]}, "head_dim": 128})
    assert sum(sections["rope_scaling"]["mrope_section"]) == sections["head_dim"] // 2


def test_widths_of_stages_have_one_ratio_all_over_the_tree():
    small = shrink(
        {
            "d_model": 256,
            "encoder_in_channels": [512, 1024, 2048],
            "backbone_config": {"hidden_sizes": [256, 512, 1024, 2048], "stem_channels": [3, 32, 48]},
        }
    )
    assert small["d_model"] == HIDDEN
    assert small["backbone_config"]["hidden_sizes"] == [64, 128, 256, 512]
    assert small["encoder_in_channels"] == [128, 256, 512]
    assert small["backbone_config"]["stem_channels"][0] == 3
    blocks = [[[3, 16, 32, 1]], [[3, 32, 64, 2]]]
    listed = shrink({"block_configs": blocks, "stem_channels": [3, 48, 96]})
    assert listed == {"block_configs": blocks, "stem_channels": [3, 48, 96]}


def test_patterns_of_layers_stay_whole_and_experts_enough():
    small = shrink(
        {
            "num_hidden_layers": 26,
            "block_types": ["recurrent", "recurrent", "attention"],
            "moe_k": 6,
            "moe_num_experts": 64,
        }
    )
    assert small["num_hidden_layers"] == 3
    assert small["moe_k"] <= small["moe_num_experts"]


def test_what_defaults_leave_open_is_set():
    sliding = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert shrink({**sliding, "sliding_window": None})["sliding_window"]
    assert shrink({"num_hidden_layers": 4, "sliding_window": None})["sliding_window"] is None
    text = transformers.Qwen2VLConfig().to_dict()["text_config"]
    assert sum(shrink(text)["rope_parameters"]["mrope_section"]) == 8


def test_special_fields_are_set_last():
    small = shrink(
        {"hidden_size": 768, "text_config": {"hidden_size": 4096}}, {"text_config.hidden_size": 80}
    )
    assert small["text_config"]["hidden_size"] == 80


def test_classes_are_of_every_kind():
    classes = model_classes()
    assert {each.kind for each in classes} == {*TABLES, "backbone"} - {"classifier"}
    assert len(classes) > 500
    assert len(model_classes(every_head=True)) > len(classes)
    few = spread(classes, 20)
    assert len(few) == 20
    assert len({each.kind for each in few}) > 5
    assert spread(classes, 0) == []


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.unread = nn.Linear(8, 8)
        self.read, self.query = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.sliced = nn.Parameter(torch.randn(16, 8))
        self.scale = nn.Parameter(torch.randn(2, 8))
        self.point = nn.Conv1d(8, 8, 1)
        self.patch = nn.Conv1d(8, 8, 2, stride=2)
        self.overlapping = nn.Conv1d(8, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids) * self.scale[0]
        x = x @ self.sliced[:8].T
        y = self.patch(self.overlapping(self.point(x.mT)))
        return self.lstm(y.mT)[0] + self.read(self.query.expand(len(x), -1, -1))


def test_matmul_weights_are_found_by_class_and_by_what_matmuls_read():
    found = matmul_weights(Mixed().eval(), {"ids": torch.arange(6)[None]})
    assert set(found) == {
        "unread.weight", "read.weight", "sliced", "point.weight", "patch.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"
    }  # fmt: skip
    assert found["sliced"] == 128


def test_a_difference_is_relative_and_sees_shapes_and_infinities():
    x = torch.tensor([1.0, -2.0])
    assert difference([x], [x]) == 0
    assert difference([x + torch.tensor([0.5, 0])], [x]) == pytest.approx(0.25)
    assert difference([x[:1]], [x]) == float("inf")
    assert difference([x / 0], [x]) == float("inf")
    assert difference([x / 0], [x / 0]) == 0


def record(**fields):
    good = {
        "class": "A", "model_type": "a", "kind": "causal", "inputs": "tokens", "compiles": True, "strict": True,
        "packed_share": 1.0, "unpacked_count": 0, "unpacked": [], "error": 1e-4, "bit_equal": True, "bits": True,
        "bits_per_param": 4.0, "stage": "done",
    }  # fmt: skip
    return good | fields


def test_bars_and_page():
    good = [record(**{"class": f"A{i}"}) for i in range(120)]
    text, is_met = report.summary(good)
    assert is_met
    assert "MISS" not in text
    loose = record(strict=True, unpacked_count=1, unpacked=["w: why | not"], packed_share=0.5)
    assert not report.is_honest(loose)
    assert not report.summary([*good, loose])[1]
    assert not report.summary([*good, record(error=1e-3)])[1]
    assert not report.summary(good[:100])[1]
    unknown = {"class": "B", "model_type": "b", "kind": "causal", "stage": "build", "message": "no inputs"}
    page = report.page([*good, loose, unknown], "nf4:32")
    assert "`A7` | tokens | 100.0 % | yes | 1.0e-04 = | yes |" in page
    assert "why \\| not" in page
    assert "`B`" in page.partition("## Not tried")[2]


def test_from_class_to_record(tmp_path, capsys):
    """One class, from the command line to its line and its row."""
    log, page = tmp_path / "a.jsonl", tmp_path / "a.md"
    command = ["--only", "LlamaForCausalLM", "--limit", "1", "--bits", "0", "--jsonl", str(log)]
    assert main([*command, "--markdown", str(page)]) == 1  # one class is not enough
    assert "packed 100.0 %" in capsys.readouterr().out
    assert "`LlamaForCausalLM`" in page.read_text()
    assert main(command) == 1
    assert "0 to run" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 1


def fates(word):
    def work(tell):
        tell({"word": word, "told": True})
        match word:
            case "late":
                time.sleep(60)
            case "killed":
                os.kill(os.getpid(), signal.SIGABRT)
            case "greedy":
                bytearray(2**40)

    return work


def test_processes_keep_last_words():
    words = ["fine", "late", "killed", "greedy"]
    jobs = [Job(fates(word), {"word": word}, 1.5, 2**40) for word in words]
    ended = {each["word"]: each for each in run_jobs(jobs, 2)}
    assert set(ended) == set(words)
    assert "message" not in ended["fine"]
    assert ended["fine"]["told"]
    assert ended["late"]["message"] == "took over 1.5 s"
    assert ended["late"]["told"]
    assert ended["killed"]["message"] == "killed by SIGABRT"
    assert "MemoryError" in ended["greedy"]["message"]


def test_a_budget_below_what_stays_unpacked_has_a_line():
    record = {"kind": "vision", "class": "Tiny", "stage": "done", "bits": True, "budget": "cannot be met"}
    assert line(record) == "vision: Tiny, no budget: what is not packed weighs more"
    assert line(record | {"bits_per_param": 3.999}) == "vision: Tiny, 4.00 bits"


def test_a_choice_among_equals_is_held_and_what_it_is_worth_is_told():
    scores = torch.tensor([[0.5, 0.5 + 1e-6, 0.1, -2.0]])
    rows = torch.arange(4.0)
    with Selections() as chosen:
        first = rows[scores.topk(1).indices]
    other = scores + torch.tensor([[2e-6, 0, 0, 0]])
    assert rows[other.topk(1).indices] != first
    with Selections(chosen.made) as held:
        assert rows[other.topk(1).indices] == first
    assert held.gap == pytest.approx(2e-6, rel=0.1)  # in 0.5
    with Selections(chosen.made) as held:
        assert rows[scores.flip(1).topk(1).indices] == first
    assert held.gap == pytest.approx(0.8, rel=1e-3)
    with Selections(chosen.made) as held:
        scores.topk(2)
    assert held.gap == float("inf")


def test_addends_and_queries_that_are_learned_are_no_matmul_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.added, self.query, self.key = (
                nn.Parameter(torch.randn(size)) for size in ((2, 3, 4), (2, 1, 4), (5, 3), (3, 5))
            )

        def forward(self, x):
            return torch.baddbmm(self.added, x, self.heads), self.query @ self.key

    assert matmul_weights(Model(), {"x": torch.randn(2, 6, 3)}) == {"heads": 24, "key": 15}


def test_weights_that_are_computed_of_parameters_alone_are_matmul_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"positions": (9, 4), "looked_up": (9, 4), "scaled": (4, 6), "scale": (1, 6)}
            for name, size in sizes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(size)))
            self.register_buffer("places", torch.arange(6))

        def forward(self, x, ids):
            places = self.places[:, None] - self.places + 4
            biases = torch.einsum("bqc,qkc->bqk", x, self.positions[places.clamp(0, 8)])
            chosen = x @ self.looked_up[ids].mT
            mask = torch.zeros(6, 6)
            mask[0] = x[0, 0, 0]  # no longer a constant
            return biases + chosen + mask, x @ (self.scaled * self.scale)

    inputs = {"x": torch.randn(1, 6, 4), "ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
    assert matmul_weights(Model(), inputs) == {"positions": 36, "scaled": 24}
