"""Text that a language model samples itself, through its own ``generate``.

The one thing to know: what a cache is, which mask a token needs and where its position lies are the model's
business, so nothing here steps through tokens. Only the words are drawn here: from the model's whole
distribution, at temperature 1, an end of text among them, after which the next text begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.errors import KbitcError, SourceError, first_line, is_shortage
from kbitc.graph.context import Progress, silent
from kbitc.graph.example_inputs import as_text, tokens_of_media

SEED = 0
PROBED = 3  # tokens on which the ways of sampling are compared
CLOSE = 1e-2  # of the logits' own spread: a state that is wrong is off by about 1
TOGETHER = 16  # windows that are sampled at once, whatever memory their states take
STATES = 1 << 30  # bytes of the states of more windows than these, of which each step reads all weights once
INSTEAD = "calibrate on a text file (--calibrate TEXT), on random inputs (random), or not at all (none)"


class SamplingError(SourceError):
    """A model cannot sample text of its own."""


@torch.no_grad()  # not inference_mode: autograd will look at what was sampled
def sample_windows(
    model: nn.Module, length: int, count: int, seed: int = SEED, on_progress: Progress = silent
) -> Tensor:
    """``(count, length)`` int64 token ids that the model samples at temperature 1, from random first tokens.

    Tokens that stand for images and sounds are none of them: nobody gives as many of those.

    Args:
        model: a causal language model of transformers, in eval mode; unchanged afterwards.
        length: tokens a window.
        count: windows.
        seed: of the draws; the global random state is as before afterwards.
        on_progress: told of each token.

    Raises:
        SamplingError: the model cannot generate, or its logits are not finite.
    """
    from transformers import GenerationConfig

    config: Any = model.config
    special = tokens_of_media(model)
    chosen = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length - 1,
        pad_token_id=0,
        suppress_tokens=special or None,
    )
    generator: Any = model
    own = generator.generation_config
    generator.generation_config = chosen  # its own may stop, forbid and penalize tokens
    label = type(model).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vocabulary = config.get_text_config().vocab_size
            first = as_text(torch.randint(vocabulary, (count, 1)), special, vocabulary)
            size, chosen.use_cache = _trusted(generator, first, length)
            ids = torch.cat(
                [
                    generator.generate(
                        input_ids=part,
                        attention_mask=torch.ones_like(part),
                        generation_config=chosen,
                        logits_processor=[_Watched(label, on_progress, i * size * length, count * length)],
                    )
                    for i, part in enumerate(first.split(size))
                ]
            )
    except KbitcError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if is_shortage(error):
            raise
        raise SamplingError(
            f"{label}: its 'generate' fails ({type(error).__name__}: {first_line(error)}), so it cannot be "
            f"calibrated on text of its own; {INSTEAD}"
        ) from error
    finally:
        generator.generation_config = own
    if ids.shape != (count, length):
        raise SamplingError(
            f"{label}: its 'generate' made {tuple(ids.shape)} tokens, not {(count, length)}; {INSTEAD}"
        )
    sampled: Tensor = ids
    return sampled


def _trusted(model: Any, first: Tensor, length: int) -> tuple[int, bool]:
    """How many windows to sample at once, and whether with a cache.

    The quickest way that gives the logits of a whole forward, which not every model's own state does: RWKV's
    mixes up the sequences of a batch.
    """
    probe = first[:2]
    count = len(first)

    def follow(ids: Tensor, *, use_cache: bool) -> tuple[Tensor, Any]:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=PROBED,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits: Tensor = torch.stack(out.logits, dim=1).float()
        return logits, getattr(out, "past_key_values", None)

    right, _ = follow(probe, use_cache=False)
    near = CLOSE * float(right.std())
    cached, state = follow(probe, use_cache=True)
    if bool((cached - right).abs().max() <= near):
        fitting = STATES // max(1, _state_bytes(state, length) // len(probe))
        return min(count, max(TOGETHER, fitting)), True
    single = torch.cat([follow(each, use_cache=True)[0] for each in probe.split(1)])
    return (1, True) if bool((single - right).abs().max() <= near) else (count, False)


def _state_bytes(state: Any, length: int) -> int:
    """Bytes of a cache once windows are full, by what it takes of those that were probed.

    Keys and values grow with tokens, ``(windows, heads, tokens, size)``; other states stay as they are.
    """
    read = PROBED  # the first token and those that were made, of which nobody read the last
    return sum(
        each.nbytes * (length if each.dim() == 4 and each.shape[2] == read else read) // read
        for each in _tensors_in(state)
    )


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Of an object of any class: lists, dictionaries and attributes, as deep as caches are."""
    if isinstance(value, Tensor):
        yield value
        return
    inner = value if isinstance(value, (list, tuple, dict)) else getattr(value, "__dict__", ())
    parts = inner.values() if isinstance(inner, dict) else inner
    for part in parts if depth else ():
        yield from _tensors_in(part, depth - 1)


class _Watched:
    """Sees the logits of each token, and lets them pass."""

    def __init__(self, label: str, on_progress: Progress, before: int, total: int) -> None:
        self.label, self.on_progress, self.before, self.total = label, on_progress, before, total

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        done = input_ids.shape[1] + 1
        if not bool((scores.amax(-1).isfinite()).all()):
            raise SamplingError(
                f"{self.label}: the logits of token {done} are not finite although its weights are, so "
                f"nothing can be sampled from them; {INSTEAD}"
            )
        self.on_progress("sampling text", self.before + done * len(input_ids), self.total)
        return scores
