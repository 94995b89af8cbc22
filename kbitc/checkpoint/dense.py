"""The dense model and the tokenizer of a source, and what the tokenizer does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbitc.checkpoint import Checkpoint
from kbitc.checkpoint.companions import vocabulary_names
from kbitc.checkpoint.skeletons import CODE_IS_NOT_RUN
from kbitc.checkpoint.vocabulary import vocabulary_size
from kbitc.errors import SourceError, foreign
from kbitc.system.json_file import AGAIN


def compute_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype to compute in by default: the config's, but float32 for float16.

    Raises:
        SourceError: the config names another thing.
    """
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, stored, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SourceError(f"config.json: the dtype '{stored:.40}' is none that a model computes in")
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' own progress bars and load reports off: kbitc has checked and shows its own."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def dense_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model of a source, dense, in eval mode; a copy where the source is in memory."""
    skeleton: Any = checkpoint.skeleton()
    config = skeleton.config
    wanted = dtype or compute_dtype({"dtype": str(config.dtype or torch.float32)})
    state = {name: checkpoint.read(name) for name in checkpoint.tensors()}
    with quiet_transformers(), foreign(f"{checkpoint.label}: transformers cannot load it"):
        model: nn.Module = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=wanted, trust_remote_code=False
        )
    return model.eval()


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer that lies beside a source; None if there is none."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="kbitc-") as folder:
        checkpoint.save_companions(Path(folder))
        return tokenizer_in(Path(folder))


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer that lies in a folder; None if there is none.

    Raises:
        SourceError: transformers cannot read it, or it is code that comes with a model.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in vocabulary_names()):
        return None
    with quiet_transformers(), foreign(f"{folder}: its tokenizer cannot be read", CODE_IS_NOT_RUN):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def token_ids(tokenizer: Any, text: str, model: nn.Module | None = None, *, is_bare: bool = False) -> Tensor:
    """The token ids of a text, ``(tokens,)``.

    Args:
        tokenizer: of a folder, whose files nobody vouches for.
        text: of any length.
        model: that is to read them, if it is known.
        is_bare: leave out what the tokenizer puts around a text.

    Raises:
        SourceError: the tokenizer fails, or has tokens that the model has not.
    """
    with foreign("its tokenizer cannot read the text", f"its files may be damaged; {AGAIN}"):
        # It would warn of texts longer than the model's context, which are cut by whoever asks.
        options = {"add_special_tokens": False} if is_bare else {}
        made = tokenizer(text, return_tensors="pt", verbose=False, **options)["input_ids"][0]
        ids: Tensor = made.to(torch.int64)  # of no tokens, it is a tensor of floats
        largest = int(ids.max()) if len(ids) else 0
    count = None if model is None else vocabulary_size(model)
    if count is not None and largest >= count:
        raise SourceError(
            f"the tokenizer gives token {largest}, but the model has {count}: they do not belong together; "
            "copy the model's own tokenizer files into its folder"
        )
    return ids


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones.

    Raises:
        SourceError: the tokenizer fails.
    """
    with foreign("its tokenizer cannot write text", f"its files may be damaged; {AGAIN}"):
        # Cleaning up would change what was shown before: "do n" to "don't".
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
