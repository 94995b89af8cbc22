"""Examples of zero-shot tasks, from JSON-lines files that lie on disk.

The one thing to know: whichever published form a file has, a row becomes one of three kinds: a continuation
of a context (LAMBADA), one of several choices after a query (PIQA), or one text after several contexts
(Winogrande). ``kbitc/evaluation/tasks`` says how lm-evaluation-harness prompts with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitc.errors import SourceError, UsageError, did_you_mean
from kbitc.system import files
from kbitc.system.json_file import parse, read_limited

Row = Mapping[str, Any]
FOLDER = Path(__file__).parent / "tasks"
"""Of the definitions that lm-evaluation-harness reads, ``--include_path`` of its command."""


@dataclass(frozen=True)
class TaskFile:
    """Where a task's examples are.

    Attributes:
        stems: of the file, in the order in which they are looked for.
        read: one row as published to the row that the task's definition reads.
    """

    stems: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]


def task_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """The examples of a task, in the order of its file.

    Raises:
        UsageError: no such task, no such file, or a row of another form; says which.
    """
    path = task_path(name, folder)
    try:
        raw = read_limited(path)
    except SourceError as error:
        raise UsageError(f"--data: {error}") from error
    rows = []
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(TASKS[name].read(parse(line, "the line")))
        except (LookupError, TypeError, ValueError, AttributeError, SourceError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(
                f"--data: {path}, line {number}: is no example of {name} ({said}); docs/evaluating.md shows "
                "the forms that are read"
            ) from error
    if not rows:
        raise UsageError(f"--data: {path}: holds no examples")
    return rows


def task_path(name: str, folder: Path) -> Path:
    """The file of a task's examples.

    Raises:
        UsageError: no such task or file.
    """
    if name not in TASKS:
        raise UsageError(
            f"--tasks: {did_you_mean('task', name, TASKS)}; all others of lm-evaluation-harness run as "
            "'lm_eval --model kbitc --model_args pretrained=OUT --tasks NAME'"
        )
    paths = [folder.absolute() / f"{stem}.jsonl" for stem in TASKS[name].stems]
    found = [path for path in paths if files.exists(path)]
    if not found:
        raise UsageError(
            f"--tasks {name}: its examples are not there: {' or '.join(map(str, paths))}; put the file "
            "there, or give its folder by --data"
        )
    return found[0]


def harness_dataset(task: str, data: str | None = None, **_: object) -> Any:
    """What lm-evaluation-harness calls for a task of ours.

    Args:
        task: its name, from its definition.
        data: folder of the files, from ``--metadata data=DIR`` or ``kbitc eval --data DIR``.

    Raises:
        UsageError: no folder, or what `task_rows` says.
    """
    import datasets

    if data is None:
        raise UsageError(f"{task}: where are its examples? Give their folder by --metadata data=DIR")
    return {"test": datasets.Dataset.from_list(task_rows(task, Path(data)))}


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"'{key}' is no text: {value!r:.60}")
    return value


def _texts(row: Row, key: str) -> list[str]:
    values = row[key]
    if not isinstance(values, list) or len(values) < 2:
        raise TypeError(f"'{key}' is no list of choices: {values!r:.60}")
    return [_text({key: value}, key) for value in values]


def _index(value: object, count: int) -> int:
    """Of the right choice; some files have numbers as texts."""
    number = int(value) if isinstance(value, str) else value
    if type(number) is not int or not 0 <= number < count:
        raise ValueError(f"there is no choice {value!r:.60} among {count}")
    return number


def _continued(row: Row) -> dict[str, Any]:
    return {"context": _text(row, "context"), "continuation": _text(row, "continuation").strip()}


def _chosen(row: Row) -> dict[str, Any]:
    choices = _texts(row, "choices")
    return {"query": _text(row, "query"), "choices": choices, "gold": _index(row["gold"], len(choices))}


def _hellaswag(row: Row) -> dict[str, Any]:
    if "choices" in row:
        return _chosen(row)
    endings = _texts(row, "endings")
    context = f"{_text(row, 'ctx_a')} {str(row['ctx_b']).capitalize()}"
    return {
        "query": _without_wikihow(f"{_text(row, 'activity_label')}: {context}"),
        "choices": [_without_wikihow(ending) for ending in endings],
        "gold": _index(row["label"], len(endings)),
    }


def _without_wikihow(text: str) -> str:
    """Without the marks in brackets of the part of HellaSwag that is from WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: Row) -> dict[str, Any]:
    if "context_options" in row:
        contexts, rest = _texts(row, "context_options"), _text(row, "continuation")
        gold = _index(row["gold"], len(contexts))
    else:
        before, gap, rest = _text(row, "sentence").partition("_")
        if not gap:
            raise ValueError("'sentence' has no '_' to fill")
        contexts = [before + _text(row, f"option{i}") for i in (1, 2)]
        gold = _index(row["answer"], 3) - 1
        if gold < 0:
            raise ValueError(f"there is no option {row['answer']!r:.60}")
    return {"contexts": contexts, "continuation": rest.strip(), "gold": gold}


TASKS: dict[str, TaskFile] = {
    "lambada_openai": TaskFile(("lambada_openai",), _continued),
    "piqa": TaskFile(("piqa",), _chosen),
    "arc_easy": TaskFile(("arc_easy",), _chosen),
    "copa": TaskFile(("copa",), _chosen),
    "openbookqa": TaskFile(("openbookqa", "openbook_qa"), _chosen),
    "winogrande": TaskFile(("winogrande",), _winogrande),
    "hellaswag": TaskFile(("hellaswag", "hellaswag_val"), _hellaswag),
}
"""By lm-evaluation-harness' own names."""
