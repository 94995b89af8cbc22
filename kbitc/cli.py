"""The command line: ``kbitc compile | plan | inspect | passes | run | eval | bench | export | verify ...``.

The one thing to know: results go to standard output, progress and errors to standard error; exit
code 0 is success, 1 a failure of the input or the machine, 2 bad usage. Nothing heavy is imported
before a command runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kbitc.checkpoint import demo
from kbitc.compiler import inspection
from kbitc.compiler.driver import compile_to
from kbitc.errors import KbitcError, SourceError, UsageError
from kbitc.evaluation import benchmark, onnx_verify
from kbitc.evaluation.generation import generate
from kbitc.evaluation.opening import need_tokenizer, open_model
from kbitc.evaluation.perplexity import perplexity, read_text, windows
from kbitc.kernels.cpu.build import build
from kbitc.planning.replanning import replan
from kbitc.report.measured_losses import keep_record

if TYPE_CHECKING:
    from kbitc.compiler.driver import Result

app = typer.Typer(
    name="kbitc",
    help="Compile PyTorch models to k-bit weights, k = 2 to 8.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out_console = Console()
err_console = Console(stderr=True)

Model = Annotated[
    str, typer.Argument(help="Local folder, GGUF file, hub id, or [bold]demo[/] (the model in the package).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Agree = Annotated[
    str,
    typer.Option(
        "--agree",
        metavar="input|role",
        help="Weights that get one format: those that read one value (queries, keys and values; gate and "
        "up), or those at one place of every layer.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Of the decode step: cpu (compiled, once per architecture and format), eager, or auto.",
    ),
]
MODEL_EXAMPLES = "\n\n[bold]Examples[/]\n\n"


def _examples(*lines: str) -> str:
    return MODEL_EXAMPLES + "\n\n".join(f"  $ {line}" for line in lines)


@app.command(
    epilog=_examples(
        "kbitc compile demo --bits 4",
        "kbitc compile ./SmolLM2-135M --bits 3.5 -o smol-3.5bit",
        "kbitc compile ./SmolLM2-135M --bits 3.5 --calibrate wikitext-2/valid.txt",
        "kbitc compile ./SmolLM2-135M --bits 4 --agree input",
        "kbitc compile ./SmolLM2-135M --spec nf4:64+dq --strict",
        "kbitc compile ./SmolLM2-135M --plan smol-3.5bit/kbit_plan.json -o again",
        "kbitc compile demo --dry-run --disable measure_moments --passes-html passes.html",
    )
)
def compile(  # noqa: A001  # the command's name, and its options
    model: Model,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", "-b", help="Budget: stored bits per parameter of the whole model, 2 to 8. [default: 4]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write. [default: NAME-4bit in this folder]")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="One format for every weight instead, e.g. nf4:64 or int3:128+zp.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan file instead: kbit_plan.json of an artifact, edited or not.")
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and report; write nothing.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a matmul weight would be left unquantized.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="auto|self|random|none|TEXT",
            help="What says which errors matter: text that the model samples itself (the default with --bits "
            "for language models), random inputs (for other models), a UTF-8 file, or nothing.",
        ),
    ] = "auto",
    agree: Agree = "",
    passes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME...", help="What runs between capture and pack instead; see 'kbitc passes'."
        ),
    ] = None,
    disable: Annotated[
        list[str], typer.Option(metavar="NAME", help="Leave a pass out; may be repeated.")
    ] = [],  # noqa: B006  # typer reads it, nobody writes it
    print_before: Annotated[
        list[str], typer.Option(metavar="NAME", help="Print the program before a pass, to standard error.")
    ] = [],  # noqa: B006
    print_after: Annotated[
        list[str], typer.Option(metavar="NAME", help="Print the program after a pass.")
    ] = [],  # noqa: B006
    print_diff: Annotated[
        list[str], typer.Option(metavar="NAME", help="Print what a pass changed, as a unified diff.")
    ] = [],  # noqa: B006
    passes_html: Annotated[
        Path | None, typer.Option(help="Write a page with each pass's time and changes, and the graph.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL into a folder of k-bit weights."""
    from functools import partial

    from kbitc.compiler.request import Request
    from kbitc.pipeline.manager import PassManager

    chosen = None if passes is None else [name.strip() for name in passes.split(",") if name.strip()]
    request = Request.of(
        bits, spec, plan, is_strict=strict, passes=chosen, disabled=disable, calibrate=calibrate, agree=agree
    )
    page = None
    if passes_html is not None:
        from kbitc.report.passes_page import PassesPage

        page = PassesPage(model)
    manage = partial(
        PassManager,
        observe=page,
        print_before=print_before,
        print_after=print_after,
        print_diff=print_diff,
        write=partial(err_console.print, markup=False, highlight=False, soft_wrap=True),
    )
    target = out or Path(_default_out(model, bits, spec))
    try:
        with _progress("compiling") as update:
            result = compile_to(
                model,
                target,
                request,
                is_forced=force,
                is_resumed=resume,
                is_dry=dry_run,
                on_progress=update,
                manage=manage,
            )
    except KeyboardInterrupt:
        _fail("interrupted; what was packed is kept: run the same command with --resume to go on", 1)
    if page is not None and passes_html is not None:
        _write(passes_html, page.html(result.program))
    if as_json:
        _print_json(result.to_json())
    else:
        _print_result(result)


def _default_out(model: str, bits: float | None, spec: str | None) -> str:
    name = Path(model.rstrip("/")).name.removesuffix(".gguf").partition("@")[0]
    if bits is not None:
        return f"{name}-{bits:g}bit"
    return f"{name}-{(spec or 'plan').replace(':', '-').replace('+', '-').replace('%', '')}"


def _print_result(result: Result) -> None:
    from collections import Counter, defaultdict

    program = result.program
    assert program.plan is not None
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    squared: dict[str, float] = defaultdict(float)
    for name, choice in program.plan.weights.items():
        key = str(choice.spec)
        count[key] += 1
        size[key] += program.weights[name].numel
        if choice.error is not None:
            squared[key] += choice.error**2 * program.weights[name].numel
    table = Table(title=f"{result.source}: {program.parameter_count:,} parameters", title_justify="left")
    for column, justify in (
        ("format", "left"),
        ("weights", "right"),
        ("parameters", "right"),
        ("rel. error", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # a rich literal
    for key, numel in size.most_common():
        error = f"{(squared[key] / numel) ** 0.5:.4f}" if squared[key] else ""
        table.add_row(key, str(count[key]), f"{numel:,}", error)
    rest = sum(entry.numel for entry in program.rest.values())
    table.add_row("16 bits (norms, biases, ...)", str(len(program.rest)), f"{rest:,}", "")
    out_console.print(table)
    out_console.print(
        f"[bold]{result.bits_per_param:.4f}[/] stored bits per parameter, "
        f"{result.payload_bytes / 1e6:,.2f} MB of tensors; the source: {result.source_bytes / 1e6:,.2f} MB "
        f"({result.source_bytes / result.payload_bytes:.2f} times)"
    )
    left = [(name, entry.reason) for name, entry in program.rest.items() if entry.is_matmul]
    for name, reason in left:
        out_console.print(f"[yellow]left unquantized[/]: {name}: {reason}")
    pack_seconds = result.seconds.get("pack")
    if result.out is None:
        out_console.print("dry run: nothing was written")
    else:
        speed = f", {result.source_bytes / 1e6 / pack_seconds:.0f} MB/s" if pack_seconds else ""
        out_console.print(f"written to [bold]{result.out}[/] in {sum(result.seconds.values()):.1f} s{speed}")


@app.command(
    epilog=_examples(
        "kbitc plan smol-4bit --bits 3.5 -o plan.json",
        "kbitc compile ./SmolLM2-135M --plan plan.json --calibrate self -o smol-3.5bit",
    )
)
def plan(
    artifact: Annotated[
        Path, typer.Argument(metavar="OUT", help="An artifact of 'compile --bits', or its kbit_scores.json.")
    ],
    bits: Annotated[
        float,
        typer.Option("--bits", "-b", help="Budget: stored bits per parameter of the whole model, 2 to 8."),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan file here.")] = None,
    agree: Agree = "",
    as_json: Json = False,
) -> None:
    """Solve another budget from an artifact's score table, without the model."""
    from kbitc.sensitivity.score_table import ScoreTable

    found = replan(artifact, bits, agree)
    if out is not None:
        _write(out, json.dumps(found, indent=1) + "\n")
    if as_json:
        _print_json(found)
        return
    from collections import Counter

    count = Counter(entry["spec"] for entry in found["weights"].values())
    table = Table(title=f"{found['bits_per_param']:.4f} stored bits per parameter", title_justify="left")
    table.add_column("format")
    table.add_column("weights", justify="right")
    for name, number in count.most_common():
        table.add_row(name, str(number))
    out_console.print(table)
    predicted = found["predicted"]
    out_console.print(
        f"predicted cost {predicted['cost']:.4g} ({predicted['unit']}); no plan of this size costs "
        f"{100 * predicted['gap']:.2g} % less"
    )
    out_console.print(inspection.trade_off_table(ScoreTable.open(artifact), found["bits_per_param"]))


@app.command(
    epilog=_examples(
        "kbitc inspect demo",
        "kbitc inspect demo-4bit --html demo.html --measured other.json",
        "kbitc inspect demo --dot graph.dot",
    )
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|OUT", help="A model, or a compiled artifact.")],
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.")] = None,
    dot: Annotated[Path | None, typer.Option(help="Write the canonical graph in DOT form.")] = None,
    measured: Annotated[
        list[Path],
        typer.Option(help="A result of 'eval --json' to show in an artifact's report; may be repeated."),
    ] = [],  # noqa: B006
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT|self|random|none", help="Find a model's outlier features on text.")
    ] = "none",
    as_json: Json = False,
) -> None:
    """Show the weights, their outlier features, and what an artifact made of them."""

    with _progress("reading") as update:
        # An artifact of a model that transformers does not know has no config to draw its graph from.
        with_graph = dot is not None or (html is not None and (Path(model) / "config.json").exists())
        found = inspection.inspect(
            model, update, with_graph=with_graph, measured=measured, calibrate=calibrate
        )
    if html is not None:
        _write(html, found.html())
    if dot is not None:
        _write(dot, found.dot())
    if as_json:
        _print_json(found.to_json())
    else:
        found.print(out_console)


@app.command(
    "passes", epilog=_examples("kbitc passes", "kbitc passes --json", "kbitc compile demo --disable NAME")
)
def list_passes(as_json: Json = False) -> None:
    """This package's passes and those of others installed, and where each runs.

    'compile --passes' takes those that run in compile. Those that run in lowering rewrite the graph of a
    packed model, in that order, before code is made of it.
    """
    from kbitc.pipeline import describe, pass_names
    from kbitc.pipeline.defaults import LOWERING

    lowering = {name: f"lowering {i}" for i, name in enumerate(LOWERING, start=1)}
    found = [{**describe(name), "runs": lowering.get(name, "compile")} for name in pass_names()]
    if as_json:
        _print_json(found)
        return
    table = Table(title=f"{len(found)} passes", title_justify="left")
    columns = ("name", "runs", "needs", "gives", "requires", "provides", "summary")
    for column in columns:
        table.add_column(column)
    for about in found:
        cells = (about[column] for column in columns)
        table.add_row(*(", ".join(cell) or "-" if isinstance(cell, list) else str(cell) for cell in cells))
    out_console.print(table)


@app.command(epilog=_examples('kbitc run demo-4bit "The function returns" -n 40'))
def run(
    model: Annotated[
        str, typer.Argument(metavar="OUT", help="A compiled artifact (or a model, to compare).")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to generate at most.")
    ] = 64,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    import time

    from kbitc.backends import make_decoder

    _check_backend(backend)
    with _progress("loading"):
        loaded = open_model(model)
        tokenizer = need_tokenizer(loaded, model)
    decoder = make_decoder(loaded.model, backend)
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
        _print_json(
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
    err_console.print(
        f"{len(made)} tokens, {speed:.1f} tokens/s ({decoder.name}); prompt {first - started:.2f} s",
        style="dim",
        highlight=False,
    )


def _check_backend(name: str) -> None:
    """Raises UsageError for a name that is neither "auto" nor a backend's."""
    from kbitc.backends import AUTO, find_backend

    if name != AUTO:
        find_backend(name)


@app.command(
    "eval",
    epilog=_examples(
        "kbitc eval demo-4bit",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --context 512 --limit-tokens 5120",
        "kbitc eval smol-4bit --text wikitext-2/test.txt --against ./SmolLM2-135M --record",
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
        str, typer.Option(help="'int8': linears in integers, LLM.int8(), where the format allows it.")
    ] = "float",
    as_json: Json = False,
) -> None:
    """Perplexity on a text."""
    from kbitc.artifact.folders import PLAN_FILE
    from kbitc.tensor.activations import use_activations

    if record and not (Path(model) / PLAN_FILE).exists():
        raise UsageError(f"--record: {model} is no artifact to keep the result beside; use --json > FILE")
    body = read_text(demo.heldout() if text is None else text)
    with _progress("loading") as update:
        loaded = open_model(model)
        tokenizer = need_tokenizer(loaded, model)
        left = use_activations(loaded.model, activations) if activations != "float" else {}
        reference = open_model(against).model if against else None
        context = min(context, demo.CONTEXT) if text is None else context
        ids = windows(loaded.model, tokenizer, body, context, limit_tokens)
        score = perplexity(
            loaded.model, ids, reference=reference, on_window=lambda i, n: update("scoring", i, n)
        )
    data = {
        "model": model,
        "text": "the demo model's held-out text" if text is None else text.name,
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": score.tokens,
        "context": context,
        "bits_per_param": loaded.bits_per_param,
        "bytes": loaded.nbytes,
        "activations": activations,
        "float_activations": left,
    }
    if score.divergence is not None:
        data["kl_divergence"] = score.divergence
        data["reference_loss"] = score.reference_loss
    if record:
        keep_record(Path(model), data)
    if as_json:
        _print_json(data)
        return
    line = f"perplexity [bold]{score.perplexity:.4f}[/] over {score.tokens:,} tokens (windows of {context})"
    out_console.print(
        f"{line}; {loaded.bits_per_param:.4f} bits per parameter, {loaded.nbytes / 1e6:,.2f} MB"
    )
    if score.divergence is not None:
        out_console.print(f"KL divergence from {against}: [bold]{score.divergence:.6f}[/] nats per token")


@app.command(
    epilog=_examples("kbitc bench demo-4bit", "kbitc bench demo-4bit --against demo --prompt-tokens 64")
)
def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compiled artifact.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The 16-bit model. [default: the artifact, dequantized]"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens to generate.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Runs to take the median of.")] = 3,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Prefill and decode speed and peak memory, against the 16-bit model."""

    _check_backend(backend)
    with _progress("measuring"):
        rows = benchmark.compare(model, against, prompt_tokens, new_tokens, runs, backend)
    if as_json:
        _print_json(rows)
        return
    table = Table(title=f"{prompt_tokens} prompt + {new_tokens} new tokens, batch 1", title_justify="left")
    for column in ("", "decode tok/s", "prefill tok/s", "peak memory MB", "weights MB", "bits/param"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['decode']:.2f}",
            f"{row['prefill']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_param']:.3f}",
        )
    out_console.print(table)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


class _progress:  # noqa: N801  # reads as a function
    """A progress bar on standard error; yields ``update(what, done, total)``."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=err_console,
            transient=True,
            disable=not err_console.is_terminal,
        )

    def __enter__(self) -> Callable[[str, int, int], None]:
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None)
        return self._update

    def _update(self, what: str, done: int, total: int) -> None:
        name = what if len(what) <= 48 else "…" + what[-47:]
        self.bar.update(self.task, description=f"{self.title}: {name}", completed=done, total=total or None)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


@app.command(
    epilog=_examples(
        "kbitc export demo-4bit --format onnx -o demo-onnx",
        "kbitc export demo-4bit --format onnx -o demo-onnx --storage compact --activations split",
    )
)
def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compiled artifact.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    to: Annotated[str, typer.Option("--format", metavar="onnx", help="Format to write.")] = "onnx",
    storage: Annotated[
        str,
        typer.Option(
            metavar="direct|compact",
            help="direct stores what the matmul reads; compact k bits a weight, widened at load.",
        ),
    ] = "direct",
    activations: Annotated[
        str,
        typer.Option(
            metavar="fp32|int8|split",
            help="Of packed matmuls: as they are, rounded to 8 bits a block, or two such numbers each.",
        ),
    ] = "fp32",
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write a compiled model for ONNX Runtime, its weights packed."""
    from kbitc.backends import find_backend

    if to != "onnx":
        raise UsageError(f"--format {to}: kbitc exports to onnx only")
    with _progress("exporting"):
        exporter = find_backend("onnx_export")()
        report = exporter.export(model, out, storage=storage, activations=activations, force=force)
    if as_json:
        _print_json(report)
        return
    table = Table(title=f"{out}: {report['kind']}, {storage}, {activations}", title_justify="left")
    for column in ("weight", "format", "container", "bytes", "container error", "of quantization error"):
        table.add_column(column, justify="left" if column in ("weight", "format", "container") else "right")
    for name, entry in report["weights"].items():
        table.add_row(
            name,
            entry["spec"],
            entry["container"],
            f"{entry['bytes']:,}",
            f"{entry['error']:.1e}" if entry["error"] else "exact",
            f"{100 * entry['share_of_quantization_error']:.1f} %",
        )
    out_console.print(table)
    left = sum(entry["bytes"] for entry in report["left_alone"].values())
    out_console.print(
        f"{report['file_bytes'] / 1e6:,.2f} MB, of it {left / 1e6:,.2f} MB that were left alone"
    )


@app.command(epilog=_examples("kbitc verify demo-onnx", "kbitc verify demo-onnx --against demo-4bit"))
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="An exported folder.")],
    against: Annotated[
        str | None, typer.Option(metavar="OUT", help="The artifact that it came from. [default: as recorded]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare an exported folder in ONNX Runtime with the model in PyTorch."""

    with _progress("comparing"):
        checks = onnx_verify.verify(folder, against)
    failed = [check for check in checks if not check.is_passed]
    if as_json:
        rows = [{"name": c.name, "value": c.value, "limit": c.limit, "passed": c.is_passed} for c in checks]
        _print_json({"passed": not failed, "checks": rows})
    else:
        table = Table(title=folder, title_justify="left")
        for column in ("check", "found", "limit", ""):
            table.add_column(column, justify="left" if column == "check" else "right")
        for check in checks:
            verdict = "ok" if check.is_passed else "[bold red]FAILED[/]"
            table.add_row(check.name, f"{check.value:.6g}", f"{check.limit:.6g}", verdict)
        out_console.print(table)
    if failed:
        raise SourceError(f"{folder}: {len(failed)} of {len(checks)} checks failed, first: {failed[0].name}")


@app.command(
    "build-kernels", epilog=_examples("kbitc build-kernels", "CXX=clang++ kbitc build-kernels --force")
)
def build_kernels(
    force: Annotated[bool, typer.Option("--force", help="Compile even if the cache holds them.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the CPU kernels now; the first packed matmul would do it otherwise."""
    import torch

    from kbitc.kernels import ops  # noqa: F401  # the ops that the library's kernels belong to

    library = build(force=force)
    torch.ops.load_library(str(library))
    chosen = torch.ops.kbit.cpu_kernels()
    if as_json:
        _print_json({"library": str(library), "kernels": chosen})
    else:
        out_console.print(f"{library}\nthis machine runs the [bold]{chosen}[/] kernels", soft_wrap=True)


def main() -> NoReturn:
    """Entry point: run a command, turn errors into one paragraph and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except KbitcError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    err_console.print(f"[bold red]error[/]: {_escaped(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)


if __name__ == "__main__":
    main()
