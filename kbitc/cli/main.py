"""The entry point: every command registered, errors as one paragraph and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from kbitc.cli import console
from kbitc.cli.app import app
from kbitc.errors import KbitcError, UsageError, first_line
from kbitc.system.stopping import Stopped, stoppable

COMMANDS = (
    "compile",
    "tune",
    "finetune",
    "merge",
    "plan",
    "inspect",
    "passes",
    "quantizers",
    "run",
    "evaluate",
    "bench",
    "sweep",
    "scaling",
    "advise",
    "export",
    "verify",
    "build_kernels",
)
"""Files of this folder, in the order of ``kbitc --help``; importing one registers its command."""

for _name in COMMANDS:
    importlib.import_module(f"kbitc.cli.{_name}")


def main() -> NoReturn:
    """Entry point: run a command, turn errors and signals into one paragraph and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with stoppable():
            app()
    except Stopped as stopped:
        notes = getattr(stopped, "__notes__", [])
        console.fail("; ".join([f"stopped by {stopped.name}", *notes]), stopped.code)
    except UsageError as error:
        console.fail(str(error), 2)
    except KbitcError as error:
        console.fail(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()
    except Exception as error:
        if os.environ.get("KBITC_DEBUG"):
            raise
        console.fail(
            f"a fault of kbitc, or a damaged file that it does not know: {type(error).__name__}: "
            f"{first_line(error)}. KBITC_DEBUG=1 shows where",
            1,
        )
    sys.exit(0)
