"""Pages that MkDocs makes: the command line, of its commands, and the passes, of their folder."""

from __future__ import annotations

import re
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add ``cli.md`` and ``reference/passes.md``."""
    from mkdocs.structure.files import File

    for name, content in (("cli.md", cli_page()), ("reference/passes.md", passes_page())):
        files.append(File.generated(config, name, content=content))
    return files


def passes_page() -> str:
    """Every pass of the package, with its equation."""
    from kbitc.pipeline.registry import pass_names

    return "\n".join(["# kbitc.passes", "", *(f"::: kbitc.passes.{name}" for name in pass_names())])


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
        lines += ["| argument or option | |", "| --- | --- |"]
        lines += [f"| `{_metavar(p)}` | {_cell(_plain(p.help))} |" for p in arguments]
        lines += [f"| `{_option(p)}` | {_cell(_about(p))} |" for p in options]
        examples = re.findall(r"\$ (.*)", command.epilog or "")
        lines += ["", "```console", *(f"$ {line}" for line in examples), "```", ""]
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    value = "" if parameter.is_flag else parameter.metavar or "VALUE"
    return f"{', '.join(parameter.opts)} {value}".strip()


def _about(parameter: Any) -> str:
    """An option's help, and its default where that says something and the help does not."""
    text = _plain(parameter.help)
    if parameter.is_flag or parameter.default in (None, "", []) or "[default:" in text:
        return text
    return f"{text} [default: {parameter.default}]"


def _cell(text: str) -> str:
    """Text inside a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(text: str | None) -> str:
    """Help without rich's markup."""
    return re.sub(r"\[/?(?:bold|dim)?\]", "", text or "").strip()
