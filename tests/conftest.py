"""Fixtures that several test files need; tests import nothing from each other."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The models are tiny, and two workers share two cores: one thread each is faster than two.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

VOCABULARY = 101  # odd, so that no block size divides anything by luck


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=33,
            n_embd=36,
            n_layer=2,
            n_head=3,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            ffn_dim=75,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=33,
            word_embed_proj_dim=20,  # projected to the hidden size and back, as in OPT-350m
        )
    )


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=36, n_layer=2, n_head=3))


def _gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=75,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=33,
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=75,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=36,
            intermediate_size=75,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=35,
            type_vocab_size=1,
        )
    )


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=36,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=75,
            decoder_ffn_dim=50,
            max_position_embeddings=33,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=36,
            d_kv=10,
            d_ff=75,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"intermediate_size": 75, "num_hidden_layers": 2, "num_attention_heads": 3}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": 17, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(
        CLIPConfig(
            text_config={"hidden_size": 36, **tokens, **sizes},
            vision_config={"hidden_size": 48, "image_size": 21, "patch_size": 7, **sizes},
            projection_dim=20,
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mixtral": _mixtral,
    "roberta": _roberta,
    "bart": _bart,
    "t5": _t5,
    "clip": _clip,
}


@pytest.fixture(scope="session", autouse=True)
def _short_calibration() -> Iterator[None]:
    """A few tokens say what a model of random weights has to say, also in what files and sessions share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kbitc.compiler.calibrator.COUNT", 2)
        patch.setattr("kbitc.compiler.calibrator.LENGTH", 16)
        patch.setattr("kbitc.replay.ordered.FITTED", 3)
        patch.setattr("kbitc.replay.ordered.HELD_OUT", 1)
        yield


@pytest.fixture
def impatient() -> Iterator[None]:
    """What waits for a pipe fails after some seconds."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """``tiny_model(family, is_meta=False)``: two layers, about 30k weights, tied as the family ties."""

    def build(family: str, *, is_meta: bool = False) -> nn.Module:
        if is_meta:
            with torch.device("meta"):
                model = FAMILIES[family]()
            model.tie_weights()
            return model.eval()
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for tensor in (
                *model.parameters(),
                *(b for n, b in model.named_buffers() if n.endswith("logits_bias")),
            ):
                # Not the initial ones and zeros: a lost bias or norm must show.
                tensor.add_(torch.randn_like(tensor) * 0.1)
        return model

    return build


@pytest.fixture
def installed(tmp_path):
    """What PYTHONPATH is where kbitc is installed: its entry points are in metadata that is made here."""
    root = Path(__file__).parent.parent
    info = tmp_path / "kbitc-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kbitc\nVersion: 0\n")
    declared = (
        (root / "pyproject.toml")
        .read_text()
        .split('[project.entry-points."torch.backends"]\n')[1]
        .splitlines()[0]
    )
    name, value = declared.split(" = ")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {value.strip(chr(34))}\n")
    return os.pathsep.join([str(tmp_path), str(root)])
