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
        usage = " ".join(
            f"{'' if p.required else '['}{p.metavar or p.name.upper()}{'' if p.required else ']'}"
            for p in arguments
        )
        lines += [f"## kbitc {name}", "", f"`kbitc {name} {usage} [OPTIONS]`".replace("  ", " "), ""]
        lines += [_plain(command.help), "", "| option | what it does |", "| --- | --- |"]
        for parameter in (*arguments, *options):
            shown = (
                ", ".join(parameter.opts)
                if parameter in options
                else parameter.metavar or parameter.name.upper()
            )
            value = f" {parameter.metavar}" if parameter in options and parameter.metavar else ""
            text = _plain(parameter.help).replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{shown}{value}`".replace("|", "\\|").replace("\\|", "|", 1) + f" | {text} |")
        examples = re.findall(r"\$ (.*)", command.epilog or "")
        lines += ["", "```console", *(f"$ {line}" for line in examples), "```", ""]
    return "\n".join(lines)


def _plain(text: str | None) -> str:
    """Help without rich's markup."""
    return re.sub(r"\[/?(?:bold|dim)?\]", "", text or "").strip()
