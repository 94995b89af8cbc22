"""What MkDocs generates: the page of the command line, from the commands themselves."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add ``cli.md``."""
    files.append(File.generated(config, "cli.md", content=cli_page()))
    return files


def cli_page() -> str:
    """Every command with its arguments, options and examples, in Markdown."""
    import typer.main

    from kbitc.cli import app

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", group.help or "", ""]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["kbitc", name, *map(_metavar, arguments), "[OPTIONS]"])
        lines += [f"## kbitc {name}", "", f"`{usage}`", "", _plain(command.help), ""]
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| `{_cell(_metavar(p))}` | {_cell(_plain(p.help))} |" for p in arguments]
        lines += [f"| `{_cell(_option(p))}` | {_cell(_plain(p.help))} |" for p in options]
        examples = re.findall(r"\$ (.*)", command.epilog or "")
        lines += ["", "```console", *(f"$ {line}" for line in examples), "```", ""]
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    return " ".join([", ".join(parameter.opts), *([parameter.metavar] if parameter.metavar else [])])


def _cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(text: str | None) -> str:
    """Help without rich's markup."""
    return re.sub(r"\[/?(?:bold|dim)?\]", "", text or "").strip()
