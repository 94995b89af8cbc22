r"""Train the demo model of kbitc: a small LLaMA with its own byte-level BPE tokenizer.

A source is NAME=PATH[,PATH...]; a folder stands for all *.txt files below it. The documents named
by --holdout are never trained on; a source without such a document holds out its last 5 %. The
held-out text of the first source becomes heldout.txt. At the end the model is compared, token for
token, with interpolated modified Kneser-Ney n-gram models of the same training tokens.

Examples:
  python train_demo_model.py poems=poems.txt --out demo --steps 200
  python train_demo_model.py docs=html/_sources/faq,html/_sources/howto books=a.txt,b.txt \
      --holdout faq/design.rst.txt howto/sockets.rst.txt --out demo
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOT = "<|endoftext|>"
ARTICLE = r"\n(?= = [^=\n]+ = \n)"  # where WikiText goes on to its next article
RST = [  # markup -> plain words, in this order
    (r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^>`]*>)?`", r"\1"),  # roles: :func:`~a.b`
    (r"`([^`<]+?)\s*<[^>`]*>`__?", r"\1"),  # links: `text <address>`_
    (r"``(.+?)``", r"\1"),
    (r"`([^`]+)`_{0,2}", r"\1"),
    (r"(?<!\w)\*\*?([^*\n]+)\*\*?(?!\w)", r"\1"),
    (r"\\(.)", r"\1"),
    (r"::(\s)", r":\1"),
]
WIKI = [  # the spaced-out tokens of WikiText -> ordinary typography
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?)\]%]|'s\b|n't\b)", r"\1"),
    (r"([(\[]) ", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
]


def clean(path: Path) -> str:
    """Return a document as plain text; of reStructuredText only its paragraphs of prose."""
    text = path.read_text(encoding="utf-8")
    rst = path.name.endswith(".rst.txt")
    rules = RST if rst else WIKI if " @-@ " in text else []
    for pattern, plain in rules:
        text = re.sub(pattern, plain, text)
    if not rst:
        return text.strip()
    kept = []
    for block in re.split(r"\n\s*\n", text):
        words = re.sub(r"^(?:[*-]|#\.|\d+\.) ", "", " ".join(block.split()))
        share = sum(c.isalpha() or c == " " for c in words) / max(len(words), 1)
        markup = words.startswith(("..", ">>>", ":", "|", "+-", "#"))
        if len(words) >= 60 and share >= 0.9 and words[-1] in ".:?!)" and not markup:
            kept.append(words)
    return "\n\n".join(kept)


def load_sources(specs: list[str], holdout: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the training documents and, for every source, its held-out text."""
    train: list[str] = []
    held: dict[str, str] = {}
    for name, _, paths in (spec.partition("=") for spec in specs):
        roots = [Path(p) for p in paths.split(",")]
        files = [f for r in roots for f in (sorted(r.rglob("*.txt")) if r.is_dir() else [r])]
        kept = [f for f in files if f.as_posix().endswith(tuple(holdout))] if holdout else []
        docs = [doc for f in files if f not in kept for doc in re.split(ARTICLE, clean(f))]
        if kept:
            held[name] = "\n\n".join(clean(f) for f in kept) + "\n"
        else:
            text = "\n\n".join(docs)
            cut = text.index("\n", int(0.95 * len(text)))
            docs, held[name] = re.split(ARTICLE, text[:cut]), text[cut:].strip() + "\n"
        train += [doc for doc in docs if doc]
    return train, held


def train_tokenizer(docs: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can spell every text and needs no unknown token."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(docs, trainer)
    return tok


def ngram_loss(train: np.ndarray, test: np.ndarray, vocab: int, order: int) -> float:
    """Return nats a token of test[1:] under an interpolated modified Kneser-Ney n-gram model.

    Chen and Goodman's three discounts an order, estimated on the training tokens alone; below the
    highest order, an n-gram counts the distinct tokens seen before it; the floor is uniform.
    """

    def codes(ids: np.ndarray, n: int) -> np.ndarray:
        """Number every window of n tokens; ids is padded in front with end-of-text tokens."""
        padded = np.concatenate([np.zeros(n - 1, np.int64), ids.astype(np.int64)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, n)
        return windows @ (vocab ** np.arange(n - 1, -1, -1))

    prob = np.full(len(test), 1.0 / vocab)
    for n in range(1, order + 1):
        wider = codes(train, n) if n == order else np.unique(codes(train, n + 1)) % vocab**n
        keys, counts = np.unique(wider, return_counts=True)
        n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        steps = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        discount = np.clip([0.0, *steps], 0, [0, 1, 2, 3])[np.minimum(counts, 3)]
        heads, head = np.unique(keys // vocab, return_inverse=True)
        total, freed = np.bincount(head, counts), np.bincount(head, discount)
        wanted = codes(test, n)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        own = np.where(keys[at] == wanted, (counts - discount)[at], 0.0)
        at = np.minimum(np.searchsorted(heads, wanted // vocab), len(heads) - 1)
        known = heads[at] == wanted // vocab
        prob = np.where(known, (own + freed[at] * prob) / total[at], prob)
    return float(-np.log(prob[1:]).mean())


@torch.no_grad()
def model_loss(model: LlamaForCausalLM, test: np.ndarray, context: int) -> float:
    """Return nats a token of test[1:], in windows that do not overlap (no help across them)."""
    total, ids = 0.0, torch.from_numpy(test.astype(np.int64)).to(model.device)
    for i in range(0, len(ids) - 1, context):
        window = ids[i : i + context + 1]
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def train_model(
    model: LlamaForCausalLM, ids: np.ndarray, held: dict[str, np.ndarray], args: argparse.Namespace
) -> None:
    """Train with AdamW, warm-up and a cosine schedule; go on from the checkpoint if there is one.

    The batch of a step depends on the seed and the step alone, so that an interrupted run ends
    where an uninterrupted one does.
    """
    groups = [
        {
            "params": [p for p in model.parameters() if (p.dim() > 1) == matrix],
            "weight_decay": decay,
        }
        for matrix, decay in ((True, args.decay), (False, 0.0))
    ]
    opt = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    first = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True, map_location=model.device)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
    data, per_epoch = torch.from_numpy(ids.astype(np.int64)), (len(ids) - 1) // args.context - 1
    forward = torch.compile(model) if args.compile else model
    start = time.monotonic()
    for step in range(first, args.steps):
        warm, done = args.steps // 30 + 1, step / args.steps
        rate = min((step + 1) / warm, 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in opt.param_groups:
            group["lr"] = args.lr * rate
        rows = []
        for i in range(step * args.batch, (step + 1) * args.batch):
            rng = np.random.default_rng([args.seed, i // per_epoch])  # an order for every epoch
            shift, perm = rng.integers(args.context), rng.permutation(per_epoch)
            at = int(shift + perm[i % per_epoch] * args.context)
            rows.append(data[at : at + args.context + 1])
        x = torch.stack(rows).to(model.device)
        logits = forward(input_ids=x[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * args.batch * args.context / (time.monotonic() - start)
            line = f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s"
            print(line, flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}
            part = args.checkpoint.with_suffix(".part")  # an interruption spoils no checkpoint
            torch.save(state, part)
            part.replace(args.checkpoint)
            for name, test in held.items():
                print(f"  held-out {name}: {model_loss(model, test[:8193], args.context):.4f}")


def main() -> None:
    """Read the sources, train the tokenizer and the model, save them, and report the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="NAME=PATH[,PATH...]", help="texts to learn from")
    add("--holdout", nargs="+", default=[], metavar="FILE", help="documents never trained on")
    add("--out", type=Path, required=True, help="folder for the model, tokenizer and heldout.txt")
    add("--checkpoint", type=Path, default=Path("train_demo_model.ckpt"), help="to go on from")
    add("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    add("--steps", type=int, default=6000, help="optimizer steps (%(default)s)")
    add("--batch", type=int, default=8, help="windows a step (%(default)s)")
    add("--context", type=int, default=256, help="tokens a window (%(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--decay", type=float, default=0.1, help="weight decay (%(default)s)")
    add("--vocab", type=int, default=2048, help="tokens of the vocabulary (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the batches (%(default)s)")
    add("--compile", action="store_true", help="torch.compile (needs a C++ compiler; faster)")
    add("--threads", type=int, default=2, help="processor threads (%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    docs, held_text = load_sources(args.sources, args.holdout)
    bpe = train_tokenizer(docs, args.vocab)
    marks: dict[str, Any] = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **marks)
    held = {name: np.array(bpe.encode(text).ids) for name, text in held_text.items()}
    ids = np.array([i for e in bpe.encode_batch(docs) for i in (0, *e.ids)] + [0], np.int32)

    mark_ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=args.context,
        **mark_ids,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(docs)} documents, {len(ids):,} tokens")
    train_model(model, ids, held, args)

    model = model.half()
    model.generation_config = GenerationConfig(max_new_tokens=64, do_sample=False, **mark_ids)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "heldout.txt").write_text(next(iter(held_text.values())), encoding="utf-8")
    model = model.float()  # the numbers below are those of the saved fp16 weights
    for name, test in held.items():
        losses = {"model": model_loss(model, test, args.context)}
        losses |= {f"{n}-gram": ngram_loss(ids, test, args.vocab, n) for n in (3, 4, 5)}
        print(f"{name}: {len(test)} tokens ", *(f" {k} {v:.4f}" for k, v in losses.items()))


if __name__ == "__main__":
    main()
