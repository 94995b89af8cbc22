"""Packed weights under torch.compile: no import of kbitc, no change of the model's code.

python examples/torch_compile.py kbitc/demo_model ['{"bits": 4}']
"""

from __future__ import annotations

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

source, *rest = sys.argv[1:]
options = json.loads(rest[0]) if rest else {"bits": 4}

model = AutoModelForCausalLM.from_pretrained(source).eval()
model.compile(backend="kbit", options={"free_source": True, **options}, fullgraph=True)

tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer("Python is a programming language that", return_tensors="pt")
tokens = model.generate(**ids, max_new_tokens=24, do_sample=False, cache_implementation="static")
print(tokenizer.decode(tokens[0]))

kept = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
print(f"16-bit weights left: {kept / 1e6:.2f} MB of {2 * model.num_parameters() / 1e6:.2f} MB")
