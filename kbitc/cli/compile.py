"""``kbitc compile``: a model into a folder of k-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kbitc.cli import console
from kbitc.cli.app import Address, Agree, EngineName, Json, Model, app, examples
from kbitc.cli.tune import print_tuning

if TYPE_CHECKING:
    from kbitc.compiler.driver import Result
    from kbitc.compiler.request import Request


@app.command(
    epilog=examples(
        "kbitc compile demo --bits 4",
        "kbitc compile ./SmolLM2-135M --bits 3.5 -o smol-3.5bit",
        "kbitc compile ./SmolLM2-135M --bits 3.5 --calibrate wikitext-2/valid.txt",
        "kbitc compile ./SmolLM2-135M --bits 3 --tune",
        "kbitc compile ./SmolLM2-135M --bits 4 --agree input",
        "kbitc compile ./SmolLM2-135M --bits 4.25 --for onnx -o smol-onnx-plan",
        "kbitc compile ./SmolLM2-135M --spec nf4:64+dq --strict",
        "kbitc compile ./SmolLM2-135M --bits 4 --quantizer weighted",
        "kbitc compile ./SmolLM2-135M --bits 3 --quantizer 'feedback(no-target)'",
        "kbitc compile ./SmolLM2-135M --bits 3 --equalize on",
        "kbitc compile ./SmolLM2-135M --plan smol-3.5bit/kbit_plan.json -o again",
        "kbitc compile ./SmolLM2-135M --bits 4 --quantizer weighted --engine ray",
        "kbitc compile ./whisper-tiny --bits 4 --example-inputs sound.safetensors",
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
    tune: Annotated[
        bool, typer.Option("--tune", help="Then tune it to the 16-bit model's outputs, see 'kbitc tune'.")
    ] = False,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="auto|self|random|none|TEXT",
            help="What says which errors matter: text that the model samples itself (the default with --bits "
            "for language models), random inputs (for other models), a UTF-8 file (for every model with a "
            "tokenizer: encoders and encoder-decoders, too), or nothing.",
        ),
    ] = "auto",
    agree: Agree = "",
    target: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="cpu|triton|onnx|gguf|vllm",
            help="What will hold the weights. For onnx, gguf and vllm the budget is in bytes of the exported "
            "file, and the formats are those that it holds as they are; kbitc's own kernels hold all.",
        ),
    ] = "cpu",
    types: Annotated[
        str, typer.Option(metavar="NAME,NAME...", help="Data types that --bits chooses from, e.g. int,nf.")
    ] = "",
    quantizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What chooses scales and codes, see 'kbitc quantizers'. auto: what the plan says, or "
            "weighted where something was measured and absmax elsewhere.",
        ),
    ] = "auto",
    equalize: Annotated[
        str,
        typer.Option(
            metavar="off|on|auto",
            help="Scale features between weights, which changes no function and costs nothing at run time. "
            "auto: if inputs that are held out say that it helps.",
        ),
    ] = "off",
    rotate: Annotated[
        str,
        typer.Option(
            metavar="off|on|auto",
            help="The same of turning the residual stream, where the head is not tied to the embedding.",
        ),
    ] = "off",
    example_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Inputs to trace and measure the model on, by the names of its forward's parameters, where "
            "they cannot be made from its config.",
        ),
    ] = None,
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
    engine: EngineName = "process",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL into a folder of k-bit weights."""
    from functools import partial

    from kbitc.backends import find_target
    from kbitc.compiler.driver import compile_to
    from kbitc.compiler.request import Request
    from kbitc.graph.given_inputs import read_inputs
    from kbitc.pipeline.manager import PassManager
    from kbitc.system.engine import engine_of

    chosen = None if passes is None else [name.strip() for name in passes.split(",") if name.strip()]
    request = Request.of(
        bits,
        spec,
        plan,
        is_strict=strict,
        passes=chosen,
        disabled=disable,
        calibrate=calibrate,
        agree=agree,
        quantizer=quantizer,
        equalize=equalize,
        rotate=rotate,
        target=find_target(target),
        types=tuple(name.strip() for name in types.split(",") if name.strip()),
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
        write=partial(console.err.print, markup=False, highlight=False, soft_wrap=True),
    )
    folder, tuned = out or Path(_default_out(model, request)), None
    with engine_of(engine, address) as runs, console.progress("compiling") as update:
        options: dict[str, Any] = {
            "is_forced": force,
            "is_resumed": resume,
            "example_inputs": None if example_inputs is None else read_inputs(example_inputs),
            "on_progress": update,
            "manage": manage,
            "engine": runs,
        }
        if tune and not dry_run:
            from kbitc.training.compiling import compile_tuned_to

            result, tuned = compile_tuned_to(model, folder, request, **options)
        else:
            result = compile_to(model, folder, request, is_dry=dry_run, **options)
    if page is not None and passes_html is not None:
        console.write_file(passes_html, page.html(result.program))
    if as_json:
        console.print_json(result.to_json() | ({"tuning": tuned.to_json()} if tuned else {}))
    else:
        _print_result(result)
        if engine != "process" and result.in_order:
            console.out.print(
                f"[yellow]packed by this process[/]: {len(result.in_order)} weights, in the order of the "
                "graph; feedback needs those before each. --quantizer weighted packs all on the cluster"
            )
        if tuned is not None:
            print_tuning(tuned)


def _default_out(model: str, request: Request) -> str:
    name = Path(model.rstrip("/")).name.removesuffix(".gguf").partition("@")[0]
    if request.bits is not None:
        return f"{name}-{request.bits:g}bit"
    return f"{name}-{(request.spec or 'plan').replace(':', '-').replace('+', '-').replace('%', '')}"


def _print_result(result: Result) -> None:
    from collections import Counter, defaultdict

    from kbitc.compiler.checks import by_class_alone, untraced_note

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
    wide = [entry.numel for entry in program.rest.values() if entry.is_kept_wide]
    rest = sum(entry.numel for entry in program.rest.values()) - sum(wide)
    table.add_row("16 bits (norms, biases, ...)", str(len(program.rest) - len(wide)), f"{rest:,}", "")
    if wide:
        table.add_row("32 bits (what 16 bits would lose)", str(len(wide)), f"{sum(wide):,}", "")
    console.out.print(table)
    console.out.print(
        f"[bold]{result.bits_per_param:.4f}[/] stored bits per parameter, "
        f"{result.payload_bytes / 1e6:,.2f} MB of tensors; the source: {result.source_bytes / 1e6:,.2f} MB "
        f"({result.source_bytes / result.payload_bytes:.2f} times)"
    )
    exported = result.to_json().get("for")
    if exported is not None:
        console.out.print(
            f"exported to {exported['target']}: {exported['bits_per_param']:.4f} bits per parameter, "
            f"{exported['bytes'] / 1e6:,.2f} MB of tensors"
        )
    for trial in result.trials:
        passes = " and ".join(trial.transforms) or "no change"
        console.out.print(f"tried with {passes}: {trial.divergence:.4g} from the source on held-out inputs")
    note = untraced_note(program, result.skipped)
    if note:
        console.out.print(f"[yellow]not traced[/]: {escape(note)}", highlight=False)
    unread = by_class_alone(program)
    if unread and not note:
        console.out.print(
            f"{len(unread)} weights that the graph does not reach are packed by the class of their module, "
            f"the first is {unread[0]}",
            highlight=False,
        )
    left = [(name, entry.reason) for name, entry in program.rest.items() if entry.is_matmul]
    for name, reason in left:
        console.out.print(f"[yellow]left unquantized[/]: {name}: {reason}")
    pack_seconds = result.seconds.get("pack")
    if result.out is None:
        console.out.print("dry run: nothing was written")
    else:
        speed = f", {result.source_bytes / 1e6 / pack_seconds:.0f} MB/s" if pack_seconds else ""
        console.out.print(f"written to [bold]{result.out}[/] in {sum(result.seconds.values()):.1f} s{speed}")
