"""``kbitc eval``: what a model scores, as the kind of model that it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbitc.cli import console
from kbitc.cli.app import Adapter, Dtype, Json, Kv, app, examples, named_dtype
from kbitc.errors import UsageError

if TYPE_CHECKING:
    from kbitc.artifact.evaluations import Evaluation
    from kbitc.evaluation.opening import Loaded
    from kbitc.evaluation.scoring import Asked, Scored


@app.command(
    "eval",
    epilog=examples(
        "kbitc eval demo-4bit",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --context 512 --limit-tokens 5120",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --against ./SmolLM2-135M --record",
        "kbitc eval smol-4bit --tasks lambada_openai,piqa --data zero_shot --against ./SmolLM2-135M",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --kv int8:64",
        "kbitc eval t5-4bit --pairs translations.tsv --against ./t5-small",
        "kbitc eval minilm-4bit --text sentences.txt --against ./minilm",
    ),
)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|OUT", help="A model, or a compiled artifact.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to score; of embedding models, a text a line; by default the demo "
            "model's held-out text, where --tasks does not ask for something else."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    limit_tokens: Annotated[int | None, typer.Option(min=2, help="Score the first N tokens only.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Also the difference from this model, item by item, with its interval."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Zero-shot accuracy, by lm-evaluation-harness: lambada_openai, piqa, arc_easy, copa, "
            "openbookqa, winogrande, hellaswag.",
        ),
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with a file NAME.jsonl for each task.")
    ] = Path(),
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each one of a task.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first N examples of each task, pairs, or texts only.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of tasks that run at once.")] = 8,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Sources and targets of an encoder-decoder: .jsonl, or .tsv of two columns."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images of an image-text model (CLIP), beside --text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of shots, and of masks.")] = 1234,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the perplexity beside the artifact, for 'inspect --html'.")
    ] = False,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="float|int8",
            help="'int8': linears in integers, LLM.int8(), where the format allows it; by default as "
            "each weight's format says: int8 of +a8.",
        ),
    ] = None,
    kv: Kv = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """What a model scores, by its kind: perplexity, zero-shot accuracy, loss, or agreement of embeddings."""
    from kbitc.artifact.evaluations import keep_evaluation
    from kbitc.artifact.folders import is_artifact
    from kbitc.cli.scores import print_scores
    from kbitc.evaluation.kinds import Kind, kind_of
    from kbitc.evaluation.opening import open_model
    from kbitc.evaluation.scoring import Asked, score
    from kbitc.tensor.activations import use_activations, used_activations

    asked = Asked(
        text=text,
        context=context,
        limit_tokens=limit_tokens,
        tasks=None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip()),
        data=data,
        shots=shots,
        limit=limit,
        seed=seed,
        batch=batch,
        pairs=pairs,
        images=images,
        kv=kv,
    )
    if record and not is_artifact(Path(model)):
        raise UsageError(f"--record: {model} is no artifact to keep the result beside; use --json > FILE")
    if record and adapter is not None:
        raise UsageError("--record: keeps what the artifact scores by itself, without --adapter")
    wanted = named_dtype(dtype)
    asked.check()
    with console.progress("loading") as update:
        loaded = open_model(model, wanted, adapter)
        kind = kind_of(loaded.model, model)
        asked.check_kind(kind, model, has_reference=against is not None)
        if record and not (kind == Kind.CAUSAL and asked.wants_perplexity):
            raise UsageError("--record: keeps perplexities, and none is asked for; use --json > FILE")
        left = {} if activations is None else use_activations(loaded.model, activations)
        reference = open_model(against, wanted) if against else None
        if reference is not None and (other := kind_of(reference.model, f"--against {against}")) != kind:
            raise UsageError(
                f"--against {against}: is scored as {other}, and {model} as {kind}; compare like with like"
            )
        scored = score(model, kind, loaded, reference, asked, update)
    used = used_activations(loaded.model)
    evaluation = _evaluation(model, loaded, scored, asked, used, left)
    if record and evaluation is not None:
        keep_evaluation(Path(model), evaluation)
    if as_json:
        about = {
            "model": model,
            "bits_per_param": loaded.bits_per_param,
            "bytes": loaded.nbytes,
            "activations": used,
            "float_activations": dict(left),
            "against": against,
            **({} if adapter is None else {"adapter": str(adapter)}),
        }
        console.print_json(
            about | ({} if evaluation is None else evaluation.to_json()) | scored.to_json(asked)
        )
        return
    print_scores(scored, asked, loaded, against)


def _evaluation(
    model: str,
    loaded: Loaded,
    scored: Scored,
    asked: Asked,
    activations: str,
    left: Mapping[str, str],
) -> Evaluation | None:
    """The perplexity as it is kept; None where none was measured."""
    from kbitc.artifact.evaluations import Evaluation

    if scored.text is None:
        return None
    return Evaluation(
        model=model,
        text=asked.text_label,
        context=asked.windows_context,
        tokens=scored.text.tokens,
        bits_per_param=loaded.bits_per_param,
        loss=scored.text.loss,
        nbytes=loaded.nbytes,
        activations=activations,
        kv=asked.kv,
        float_activations=left,
        reference_loss=scored.text.reference_loss,
        divergence=scored.text.divergence,
    )
