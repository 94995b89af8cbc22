"""Packed weights under torch.compile: the model's code stays, and so does the call that compiles it.

python examples/torch_compile.py ['{"spec": "nf4:64"}']
"""

from __future__ import annotations

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from kbitc import demo  # for the model's folder alone: torch finds the backend without an import

model = AutoModelForCausalLM.from_pretrained(demo.folder()).eval()
tokenizer = AutoTokenizer.from_pretrained(demo.folder())
options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {"bits": 4}
model.compile(backend="kbit", options={"free_source": True, **options}, fullgraph=True)

ids = tokenizer("Python is a programming language that", return_tensors="pt")
tokens = model.generate(**ids, max_new_tokens=24, do_sample=False, cache_implementation="static")
print(tokenizer.decode(tokens[0]))

kept = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
print(f"16-bit weights left: {kept / 1e6:.2f} MB of {2 * model.num_parameters() / 1e6:.2f} MB")
