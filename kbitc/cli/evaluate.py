"""``kbitc eval``: perplexity on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Dtype, Json, Kv, app, examples, named_dtype
from kbitc.errors import UsageError


@app.command(
    "eval",
    epilog=examples(
        "kbitc eval demo-4bit",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --context 512 --limit-tokens 5120",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --against ./SmolLM2-135M --record",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --kv int8:64",
    ),
)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|OUT", help="A model, or a compiled artifact.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to score. [default: the demo model's held-out text]")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    limit_tokens: Annotated[int | None, typer.Option(min=2, help="Score the first N tokens only.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also the KL divergence from this model.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the result beside the artifact, for 'inspect --html'.")
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="float|int8",
            help="'int8': linears in integers, LLM.int8(), where the format allows it. [default: as each "
            "weight's format says: int8 of +a8]",
        ),
    ] = None,
    kv: Kv = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity on a text.

    With --kv the tokens go through the decode step and its cache, so that what the cache loses counts.
    """
    from kbitc.artifact.evaluations import Evaluation, keep_evaluation
    from kbitc.artifact.folders import is_artifact
    from kbitc.backends import make_decoder
    from kbitc.checkpoint import demo
    from kbitc.evaluation.causality import check_causal
    from kbitc.evaluation.opening import need_tokenizer, open_model
    from kbitc.evaluation.perplexity import perplexity, read_text, windows
    from kbitc.tensor.activations import use_activations, used_activations

    if record and not is_artifact(Path(model)):
        raise UsageError(f"--record: {model} is no artifact to keep the result beside; use --json > FILE")
    wanted = named_dtype(dtype)
    body = read_text(demo.heldout() if text is None else text)
    with console.progress("loading") as update:
        loaded = open_model(model, wanted)
        tokenizer = need_tokenizer(loaded, model)
        check_causal(loaded.model, model)
        left = {} if activations is None else use_activations(loaded.model, activations)
        reference = open_model(against, wanted).model if against else None
        if reference is not None:
            check_causal(reference, f"--against {against}")
        context = min(context, demo.CONTEXT) if text is None else context
        ids = windows(loaded.model, tokenizer, body, context, limit_tokens)
        decoder = None if kv is None else make_decoder(loaded.model, kv=kv)
        score = perplexity(loaded.model, ids, reference=reference, decoder=decoder, on_progress=update)
    evaluation = Evaluation(
        model=model,
        text="the demo model's held-out text" if text is None else text.name,
        context=context,
        tokens=score.tokens,
        bits_per_param=loaded.bits_per_param,
        loss=score.loss,
        nbytes=loaded.nbytes,
        activations=used_activations(loaded.model),
        kv=kv,
        float_activations=left,
        reference_loss=score.reference_loss,
        divergence=score.divergence,
    )
    if record:
        keep_evaluation(Path(model), evaluation)
    if as_json:
        console.print_json(evaluation.to_json())
        return
    line = f"perplexity [bold]{score.perplexity:.4f}[/] over {score.tokens:,} tokens (windows of {context})"
    line += "" if kv is None else f", keys and values as {kv}"
    console.out.print(
        f"{line}; {loaded.bits_per_param:.4f} bits per parameter, {loaded.nbytes / 1e6:,.2f} MB"
    )
    if score.divergence is not None:
        console.out.print(f"KL divergence from {against}: [bold]{score.divergence:.6f}[/] nats per token")
