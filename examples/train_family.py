r"""Train a family of small LLaMAs on one text with one tokenizer, for `kbitc sweep` and `kbitc scaling`.

Every size sees the same number of tokens for each of its parameters (--tokens-per-parameter; embeddings
count), in the same order, with the same schedule and a peak learning rate of 0.03 / sqrt(width). The last
5 % of the text are not trained on: OUT/heldout.txt is what to score. Each size is one folder OUT/NAME that
`kbitc` and transformers load. The same command goes on where an interrupted one stopped: a size that is
there is not trained again, and one that is half way goes on from its checkpoint in OUT/checkpoints. A GPU is
used where there is one.

Examples:
  python examples/train_family.py text.txt --out ~/family
  python examples/train_family.py text.txt --out ~/family --sizes 40k,75k,130k --tokens-per-parameter 20
  kbitc sweep ~/family/* --bits 3-8 --text ~/family/heldout.txt -o results.parquet
"""

from __future__ import annotations

import argparse
import hashlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from train_demo_model import EOT, load_sources, model_loss, train_model, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {  # name: width, layers, width of the feed-forward layers; about twice the parameters each
    "20k": (16, 3, 64),
    "40k": (32, 2, 88),
    "75k": (48, 2, 112),
    "130k": (64, 2, 176),
    "240k": (80, 3, 176),
    "470k": (112, 3, 256),
    "880k": (144, 4, 272),
    "1.7M": (192, 4, 384),
    "3.3M": (256, 4, 640),
    "6.6M": (320, 5, 880),
}
HEAD = 16  # width of an attention head
MARKS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def check_settings(args: Namespace) -> None:
    """Refuse to go on in a folder whose family is of another text or of other settings."""
    names = ("tokens_per_parameter", "batch", "context", "vocab", "seed")
    own = {name: getattr(args, name) for name in names}
    own["text_sha256"] = hashlib.sha256(args.text.read_bytes()).hexdigest()
    path = args.out / "family.json"
    if not path.exists():
        path.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    known = json.loads(path.read_text(encoding="utf-8"))
    if known != own:
        other = ", ".join(name for name in own if own[name] != known.get(name))
        raise SystemExit(
            f"{args.out}: holds a family with another {other}; choose another --out, or remove it"
        )


def new_model(name: str, args: Namespace) -> LlamaForCausalLM:
    """Return the untrained model of one size."""
    width, layers, inner = SIZES[name]
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        head_dim=HEAD,
        tie_word_embeddings=True,
        max_position_embeddings=args.context,
        **MARKS,
    )
    return LlamaForCausalLM(config)


def prepared_text(args: Namespace) -> tuple[Tokenizer, np.ndarray, str]:
    """Return the tokenizer, the training tokens and the held-out text; made once, then read."""
    stored, tokens, held = (args.out / n for n in ("tokenizer.json", "tokens.npy", "heldout.txt"))
    if tokens.exists():  # written last
        return Tokenizer.from_file(str(stored)), np.load(tokens), held.read_text(encoding="utf-8")
    docs, texts = load_sources([f"text={args.text}"], [])
    bpe = train_tokenizer(docs, args.vocab)
    pieces = [piece for doc in docs for piece in doc.split("\n\n") if piece]
    ids = np.array([i for e in bpe.encode_batch_fast(pieces) for i in (0, *e.ids)] + [0], np.int32)
    bpe.save(str(stored))
    held.write_text(texts["text"], encoding="utf-8")
    part = tokens.with_name("part.npy")
    np.save(part, ids)
    part.replace(tokens)
    return bpe, ids, texts["text"]


def train_size(
    name: str, bpe: Tokenizer, ids: np.ndarray, held: np.ndarray, args: Namespace
) -> dict[str, Any]:
    """Train one size, save its folder, and return what is known of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = new_model(name, args).to(device)
    parameters = model.num_parameters()
    steps = round(args.tokens_per_parameter * parameters / (args.batch * args.context))
    tokens = steps * args.batch * args.context
    rate = 0.03 / SIZES[name][0] ** 0.5
    print(f"{name}: {parameters:,} parameters, {tokens:,} tokens of {len(ids):,}, {device}", flush=True)
    settings = Namespace(**vars(args) | {"steps": steps, "lr": rate, "decay": 0.1, "compile": False})
    settings.checkpoint = args.out / "checkpoints" / f"{name}.ckpt"
    train_model(model, ids, {}, settings)
    model = model.half().float()  # as it is stored
    loss = model_loss(model, held, args.context)
    model.generation_config = GenerationConfig(max_new_tokens=64, do_sample=False, **MARKS)
    folder, part = args.out / name, args.out / f".{name}.part"
    model.half().save_pretrained(part)
    marks: dict[str, Any] = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, **marks
    ).save_pretrained(part)
    about = {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "epochs": tokens / len(ids),
        "peak_learning_rate": rate,
        "heldout_loss": loss,
        "settings": {"seed": args.seed, "batch": args.batch, "context": args.context, "vocab": args.vocab},
    }
    (part / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    part.rename(folder)
    settings.checkpoint.unlink(missing_ok=True)
    return about


def main() -> None:
    """Train every size that is not there yet, the smallest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", type=Path, help="UTF-8 text to learn from")
    add("--out", type=Path, required=True, help="folder for the family, outside the repository")
    add("--sizes", default=",".join(list(SIZES)[:7]), help=f"of {', '.join(SIZES)} (default: %(default)s)")
    add("--tokens-per-parameter", type=float, default=10, help="of every size (%(default)s)")
    add("--batch", type=int, default=8, help="windows a step (%(default)s)")
    add("--context", type=int, default=128, help="tokens a window (%(default)s)")
    add("--vocab", type=int, default=512, help="tokens of the vocabulary (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the batches (%(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    add("--threads", type=int, default=2, help="processor threads (%(default)s)")
    args = parser.parse_args()
    names = args.sizes.split(",")
    unknown = sorted(set(names) - set(SIZES))
    if unknown:
        parser.error(f"no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    torch.set_num_threads(args.threads)
    (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    check_settings(args)
    bpe, ids, text = prepared_text(args)
    held = np.array(bpe.encode(text[:40_000]).ids[:8193])
    for name in sorted(names, key=list(SIZES).index):
        known = args.out / name / "training.json"
        about = (
            json.loads(known.read_text("utf-8")) if known.exists() else train_size(name, bpe, ids, held, args)
        )
        print(
            f"{name}: {about['parameters']:,} parameters, held-out loss {about['heldout_loss']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
