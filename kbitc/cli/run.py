"""``kbitc run``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Adapter, Backend, Dtype, Json, Kv, app, check_backend, examples, named_dtype


@app.command(
    epilog=examples(
        'kbitc run demo-4bit "The function returns" -n 40',
        'kbitc run smol-4bit "Once upon a time" -n 400 --kv int8:64',
        'kbitc run smol-4bit "ROMEO:" --adapter smol-adapter',
    )
)
def run(
    model: Annotated[
        str, typer.Argument(metavar="OUT", help="A compiled artifact (or a model, to compare).")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to generate at most.")
    ] = 64,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    kv: Kv = None,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    import time

    from kbitc.backends import make_decoder
    from kbitc.evaluation.causality import check_causal
    from kbitc.evaluation.generation import generate
    from kbitc.evaluation.opening import need_tokenizer, open_model

    check_backend(backend)
    wanted = named_dtype(dtype)
    with console.progress("loading"):
        loaded = open_model(model, wanted, adapter)
        tokenizer = need_tokenizer(loaded, model)
        check_causal(loaded.model, model)
    decoder = make_decoder(loaded.model, backend, kv)
    pieces = generate(decoder, tokenizer, prompt, new_tokens)
    made: list[str] = []
    started = first = time.perf_counter()
    for piece in pieces:
        if not made:
            first = time.perf_counter()
            if not as_json:
                sys.stdout.write(prompt)
        made.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    # The first token comes with the prompt; the others are decoded.
    seconds = time.perf_counter() - first
    speed = (len(made) - 1) / seconds if len(made) > 1 else 0.0
    if as_json:
        console.print_json(
            {
                "prompt": prompt,
                "text": "".join(made),
                "tokens": len(made),
                "prompt_seconds": first - started,
                "tokens_per_second": speed,
                "backend": decoder.name,
            }
        )
        return
    sys.stdout.write("\n" if made else f"{prompt}\n")
    sys.stdout.flush()
    console.err.print(
        f"{len(made)} tokens, {speed:.1f} tokens/s ({decoder.name}); prompt {first - started:.2f} s",
        style="dim",
        highlight=False,
    )
