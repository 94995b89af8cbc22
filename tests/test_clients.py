"""An artifact in libraries that know nothing of kbitc: in a fresh process that never imports it by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoTokenizer

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
    "peft": """
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
    """,
    "sentence_transformers": """
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
    """,
}


EACH = """
    for name, body in json.loads(sys.argv[2]).items():
        print("client", name)
        torch.manual_seed(0)
        exec(body, dict(globals()))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "demo"
    kbitc.compile("demo", spec="nf4:64", out=folder)
    return folder


def test_clients(artifact, installed, tmp_path):
    """All in one process: most of the time of a fresh one is that of the imports."""
    here = [name for name in CLIENTS if importlib.util.find_spec(name)]
    bodies = json.dumps({name: textwrap.dedent(CLIENTS[name]) for name in here})
    env = {
        **os.environ,
        "PYTHONPATH": installed,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GIVEN) + textwrap.dedent(EACH), str(artifact), bodies],
        env=env, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    _, *parts = done.stdout.split("client ")
    printed = {part.split("\n")[0]: json.loads(part.splitlines()[-1]) for part in parts}
    assert list(printed) == here
    for name, found in printed.items():
        CHECKS.get(name, check_logits)(artifact, *found)


def check_logits(artifact, kind, logits):
    given = AutoTokenizer.from_pretrained(artifact)("The house of the", return_tensors="pt")
    with torch.no_grad():
        wanted = kbitc.load(artifact)(**given).logits[0, -1].float()
    assert kind == "KbitTensor"
    assert torch.allclose(torch.tensor(logits), wanted, rtol=0, atol=2e-2)  # float16 logits of about 10


def check_adapter(_, kind, losses, apart, moved):
    """Losses of four steps fall, and a saved adapter on the artifact gives the numbers that were trained."""
    assert kind == "KbitTensor"
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    assert apart == 0
    assert moved > 1


def check_embeddings(_, kind, again, apart, error):
    assert (kind, again) == ("KbitTensor", "KbitTensor")
    assert apart == 0
    assert error < 1e-2


CHECKS = {"peft": check_adapter, "sentence_transformers": check_embeddings}
