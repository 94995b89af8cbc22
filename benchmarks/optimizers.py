"""8-bit optimizers and SwitchBack against torch and bitsandbytes, on a CPU.

    python -m benchmarks.optimizers                                  # all but training
    python -m benchmarks.optimizers --only training --text FILE      # the demo architecture from scratch
    python -m benchmarks.optimizers --model DIR --markdown FILE

step      one step of the shapes of --model, torch's fused AdamW, ours and bitsandbytes' in turn (the last in
          an environment of its own, benchmarks/peer_environment.py); and bytes of states a parameter
paged     steps under `prlimit`, with states twice what may still be mapped
layer     forward and backward of a wide layer, fp32 and SwitchBack in turn
training  held-out loss after --steps of the demo architecture, each optimizer with --seeds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.peer_environment import environment
from benchmarks.tables import Section, markdown, print_section
from kbitc import optim
from kbitc.cache import cache_folder
from kbitc.checkpoint import demo
from kbitc.kernels.cpu.build import load
from kbitc.nn import SwitchBackLinear
from kbitc.training import switchback

PINS = ("bitsandbytes==0.50.2",)
SECTIONS = ("step", "paged", "layer", "training")
WINDOW, BATCH, HELD_WINDOWS = 128, 4, 128
RATE, WARM = 1e-3, 30


# ---- a step -----------------------------------------------------------------------------------------------

PEER = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
import bitsandbytes as bnb
shapes = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)
params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
for param in params:
    param.grad = torch.randn(param.shape, generator=generator) * 1e-3
optimizer = bnb.optim.AdamW8bit(params)
optimizer.step()
print("ready", flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.step()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall time, and of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def peer_timer(python: Path, shapes: list[tuple[int, ...]]) -> Callable[[], tuple[float, float]]:
    """What has bitsandbytes make a step, and gives the seconds.

    Raises:
        RuntimeError: it does not work on this machine; the last line of what it said.
    """
    command = [str(python), "-c", PEER, json.dumps(shapes), str(torch.get_num_threads())]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    if stdout.readline().strip() != "ready":
        lines = process.communicate()[1].strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "bitsandbytes said nothing")

    def step() -> tuple[float, float]:
        stdin.write("step\n")
        stdin.flush()
        wall, cpu = json.loads(stdout.readline())
        return wall, cpu

    return step


def shapes_of(model: Path | None) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters, tied ones once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model or demo.folder(), trust_remote_code=False)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return [tuple(param.shape) for param in made.parameters()]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all states, but for the counts of steps."""
    states = optimizer.state_dict()["state"].values()
    return sum(t.nbytes for own in states for key, t in own.items() if key != "step")


def in_turn(timers: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> list[dict[str, Any]]:
    """Medians and bests of each, and what they are in the first one's."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        for name, timer in timers.items():
            samples[name].append(timer())
    rows: list[dict[str, Any]] = []
    for name, own in samples.items():
        walls, cpus = zip(*own, strict=True)
        rows.append(
            {
                "name": name,
                "median": statistics.median(walls) * 1e3,
                "best": min(walls) * 1e3,
                "cpu": statistics.median(cpus) * 1e3,
            }
        )
    first = next(iter(samples.values()))
    for row, own in zip(rows, samples.values(), strict=True):
        # Of neighbours in time: what else the machine does slows both.
        row["ratio"] = statistics.median(a[0] / b[0] for a, b in zip(own, first, strict=True))
        row["best_ratio"] = row["best"] / rows[0]["best"]
        row["cpu_ratio"] = row["cpu"] / rows[0]["cpu"]
    return rows


TIMES = (
    ("name", "name", ""),
    ("median", "median ms", ".1f"),
    ("best", "best ms", ".1f"),
    ("cpu", "CPU ms", ".1f"),
    ("ratio", "ratio", ".2f"),
    ("best_ratio", "ratio of bests", ".2f"),
    ("cpu_ratio", "ratio of CPU times", ".2f"),
)


def step_section(args: argparse.Namespace) -> Section:
    """A step of a model's shapes, and what states take."""
    shapes = shapes_of(args.model)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    count = sum(param.numel() for param in params)
    made: dict[str, torch.optim.Optimizer] = {
        "torch AdamW, fused": torch.optim.AdamW(params, fused=True),
        "kbitc AdamW8bit": optim.AdamW8bit(params),
        "kbitc AdamW8bit, 4 bits": optim.AdamW8bit(params, bits=4),
        "kbitc Lion8bit": optim.Lion8bit(params),
    }
    for optimizer in made.values():
        optimizer.step()
    timers: dict[str, Any] = {name: lambda own=own: timed(own.step) for name, own in made.items()}
    notes = []
    try:
        python = environment(
            args.peer_python, torch.__version__, pins=PINS, folder=cache_folder() / "optimizer-peers"
        )
        timers["bitsandbytes AdamW8bit"] = peer_timer(python, shapes)
    except RuntimeError as error:
        notes.append(f"bitsandbytes AdamW8bit: not measured: {error}")
    rows = in_turn(timers, args.rounds)
    for row in rows:
        if row["name"] in made:
            row["bytes"] = state_bytes(made[row["name"]]) / count
    columns = (*TIMES, ("bytes", "state bytes/param", ".4f"))
    return Section(f"A step of {count / 1e6:.1f} million parameters", columns, rows, notes)


# ---- paged states -----------------------------------------------------------------------------------------


def steps_digest(count: int, paged: bool, limit_share: float) -> str:
    """Of parameters after three steps; with a limit, mapped memory may grow by this share of the states."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(part, dtype=torch.bfloat16)) for part in (count // 2, count // 4, count // 4)
    ]
    warm = nn.Parameter(torch.randn(1 << 20))  # threads, and the library
    warm.grad = torch.randn_like(warm)
    optim.AdamW8bit([warm]).step()
    for param in params:
        param.grad = torch.empty_like(param).normal_() * 1e-3
    optimizer = optim.AdamW8bit(params, paged=paged)
    if limit_share:
        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit = mapped + int(limit_share * 2.03 * count)
        resource.prlimit(0, resource.RLIMIT_AS, (limit, limit))
    for _ in range(3):
        optimizer.step()
    digest = hashlib.sha256()
    for param in params:
        digest.update(param.detach().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def paged_section(args: argparse.Namespace) -> Section:
    """Steps with and without paged states, each in a process of its own."""
    rows = []
    for name, paged, share in (
        ("in memory", False, 0.0),
        ("paged", True, 0.0),
        ("paged, limit of half the states", True, 0.5),
        ("in memory, the same limit", False, 0.5),
    ):
        call = f"steps_digest({args.paged_count}, {paged}, {share})"
        code = f"from benchmarks.optimizers import steps_digest; print({call})"
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        said = done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:90]
        rows.append({"name": name, "seconds": time.perf_counter() - started, "wanted": said})
    columns = (
        ("name", "states", ""),
        ("seconds", "s", ".1f"),
        ("wanted", "digest of the parameters, or error", ""),
    )
    title = f"Three steps of {args.paged_count / 1e6:.0f} million bfloat16 parameters"
    return Section(title, columns, rows, ["The limit is prlimit's on mapped memory (RLIMIT_AS)."])


# ---- a wide layer -----------------------------------------------------------------------------------------


def layer_section(args: argparse.Namespace) -> Section:
    """Forward and backward."""
    dense = nn.Linear(args.width, args.width)
    layers: dict[str, nn.Module] = {
        "torch.nn.Linear, fp32": dense,
        "SwitchBackLinear": SwitchBackLinear.of(dense),
    }
    x = torch.randn(args.batch, args.width, requires_grad=True)
    grad = torch.randn(args.batch, args.width)

    def run(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    for layer in layers.values():
        run(layer)
    rows = in_turn(
        {name: lambda own=own: timed(lambda: run(own)) for name, own in layers.items()}, args.rounds
    )
    return Section(f"Forward and backward, {args.width} wide, batch {args.batch}", TIMES, rows)


# ---- training from scratch --------------------------------------------------------------------------------

RUNS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], bool]] = {
    "torch AdamW": (lambda params: torch.optim.AdamW(params, lr=RATE), False),
    "kbitc AdamW8bit": (lambda params: optim.AdamW8bit(params, lr=RATE), False),
    "kbitc AdamW8bit, 4 bits": (lambda params: optim.AdamW8bit(params, lr=RATE, bits=4, block=128), False),
    "SwitchBack, torch AdamW": (lambda params: torch.optim.AdamW(params, lr=RATE), True),
    "SwitchBack, AdamW8bit": (lambda params: optim.AdamW8bit(params, lr=RATE), True),
    "kbitc StableAdamW": (lambda params: optim.StableAdamW(params, lr=RATE), False),
}


def windows_of(text: Path) -> tuple[Tensor, Tensor]:
    """Token windows to learn from and to judge by, ``(windows, WINDOW)``: the text's last tenth."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(demo.folder(), trust_remote_code=False)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:][:HELD_WINDOWS]


def train(name: str, seed: int, steps: int, learned: Tensor, held: Tensor) -> float:
    """The held-out loss in nats a token, after training the demo architecture from scratch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make, is_int8 = RUNS[name]
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(demo.folder(), trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    if is_int8:
        switchback(model)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM))
    generator, console = torch.Generator().manual_seed(seed), Console(stderr=True)
    for _ in track(range(steps), description=f"{name}, seed {seed}", console=console):
        batch = learned[torch.randint(len(learned), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        losses = [model(input_ids=part, labels=part).loss.item() for part in held.split(BATCH)]
    console.print(f"{name}, seed {seed}: {statistics.fmean(losses):.4f}", highlight=False)
    return statistics.fmean(losses)


def training_section(args: argparse.Namespace) -> Section:
    """Held-out losses."""
    learned, held = windows_of(args.text)
    rows: list[dict[str, Any]] = []
    for name in args.runs:
        losses = [train(name, seed, args.steps, learned, held) for seed in range(args.seeds)]
        row: dict[str, Any] = {"name": name, **{f"seed{i}": loss for i, loss in enumerate(losses)}}
        row["mean"] = statistics.fmean(losses)
        row["more"] = (row["mean"] / rows[0]["mean"] - 1) * 100 if rows else 0.0
        rows.append(row)
    seeds = [(f"seed{i}", f"seed {i}", ".4f") for i in range(args.seeds)]
    columns = (
        ("name", "name", ""),
        *seeds,
        ("mean", "mean", ".4f"),
        ("more", "more than the first, %", "+.2f"),
    )
    title = (
        f"The demo architecture from scratch: held-out loss after {args.steps} steps of {BATCH} x {WINDOW}"
    )
    return Section(title, columns, rows)


# ---- all of it --------------------------------------------------------------------------------------------


def sections(args: argparse.Namespace) -> Iterator[Section]:
    """What was asked for, one after another."""
    makers = {
        "step": step_section,
        "paged": paged_section,
        "layer": layer_section,
        "training": training_section,
    }
    asked = args.only or (SECTIONS if args.text else SECTIONS[:-1])
    for name in asked:
        yield makers[name](args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; by default all that can be")
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder whose shapes a step moves; the demo model"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text to train on")
    parser.add_argument("--rounds", type=int, default=9, help="of what is timed in turn")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="what is trained")
    parser.add_argument("--width", type=int, default=4096, help="features of the layer")
    parser.add_argument("--batch", type=int, default=512, help="rows that the layer takes")
    parser.add_argument("--paged-count", type=int, default=1 << 27, help="parameters of the paged steps")
    parser.add_argument(
        "--peer-python", type=Path, help="a Python that has bitsandbytes; by default one is made"
    )
    parser.add_argument("--markdown", type=Path, help="file to write the tables to")
    args = parser.parse_args(argv)
    if args.only and "training" in args.only and not args.text:
        parser.error("--only training needs --text FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    args = parse(argv)
    load()
    console, done = Console(), []
    for section in sections(args):
        print_section(console, section)
        done.append(section)
        if args.markdown:
            kernels = torch.ops.kbit.cpu_kernels()
            facts = f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels {kernels}"
            head = ["# 8-bit optimizers and SwitchBack", f"{facts}; `python -m benchmarks.optimizers`"]
            args.markdown.write_text(markdown(head, done), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
