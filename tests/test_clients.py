"""An artifact in libraries that know nothing of kbitc: a fresh process each, which never imports it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

import kbitc

GIVEN = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    given = tokenizer("The house of the", return_tensors="pt")
    kind = lambda model: type(model.layers[0].mlp.up_proj.weight).__name__
    torch.manual_seed(0)
"""

CLIENTS = {
    "transformers": """
        model = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            print(json.dumps([kind(model.model), model(**given).logits[0, -1].tolist()]))
    """,
    "accelerate": """
        from accelerate import cpu_offload
        model = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
        model = cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            logits = model(**given).logits[0, -1].tolist()
        print(json.dumps([kind(model.model), logits]))
    """,
    "lm_eval": """
        from lm_eval.models.huggingface import HFLM
        lm = HFLM(pretrained=out, device="cpu", batch_size=2)
        with torch.no_grad():
            print(json.dumps([kind(lm.model.model), lm._model_call(given["input_ids"])[0, -1].tolist()]))
    """,
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "demo"
    kbitc.compile("demo", spec="nf4:64", out=folder)
    return folder


@pytest.fixture
def printed(artifact, installed, tmp_path):
    def printed(body):
        code = textwrap.dedent(GIVEN) + textwrap.dedent(body)
        env = {
            **os.environ,
            "PYTHONPATH": installed,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, str(artifact)],
            env=env, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return printed


@pytest.mark.parametrize("client", CLIENTS)
def test_logits_of_a_client(client, artifact, printed):
    import torch
    from transformers import AutoTokenizer

    pytest.importorskip(client)
    given = AutoTokenizer.from_pretrained(artifact)("The house of the", return_tensors="pt")
    with torch.no_grad():
        wanted = kbitc.load(artifact)(**given).logits[0, -1].float()
    kind, logits = printed(CLIENTS[client])
    assert kind == "KbitTensor"
    assert torch.allclose(torch.tensor(logits), wanted, rtol=0, atol=2e-2)  # float16 logits of about 10


def test_peft_trains_and_reads_an_adapter(printed):
    """Losses of four steps fall, and a saved adapter on the artifact gives the numbers that were trained."""
    pytest.importorskip("peft")
    kind, losses, apart, moved = printed("""
        from peft import LoraConfig, PeftModel, get_peft_model
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(out), config)
        with torch.no_grad():
            before = model(**given).logits
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(**given, labels=given["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.save_pretrained("adapter")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), "adapter").eval()
        with torch.no_grad():
            trained = model.eval()(**given).logits
            apart, moved = (again(**given).logits - trained).abs().max(), (trained - before).abs().max()
        packed = type(again.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight).__name__
        print(json.dumps([packed, losses, apart.item(), moved.item()]))
    """)
    assert kind == "KbitTensor"
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    assert apart == 0
    assert moved > 1


def test_sentence_transformers_embeds_and_saves(printed):
    pytest.importorskip("sentence_transformers")
    kind, again, apart, error = printed("""
        from sentence_transformers import SentenceTransformer
        texts = ["a house", "the dog of the king"]
        model = SentenceTransformer(out, device="cpu")
        found = model.encode(texts)
        model.save("saved")
        saved = SentenceTransformer("saved", device="cpu")
        apart = abs(saved.encode(texts) - found).max()
        with torch.no_grad():
            base = AutoModelForCausalLM.from_pretrained(out).model
            hidden = base(**tokenizer(texts[:1], return_tensors="pt")).last_hidden_state[0].float()
        error = (torch.tensor(found[0]).float() - hidden[-1]).norm() / hidden[-1].norm()  # of the last token
        print(json.dumps([kind(model[0].auto_model), kind(saved[0].auto_model), float(apart), error.item()]))
    """)
    assert (kind, again) == ("KbitTensor", "KbitTensor")
    assert apart == 0
    assert error < 1e-2
