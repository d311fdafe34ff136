"""The generated pages of the documentation: docs/commands.md and docs/keys.md, from the command line and the recipe."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from pydantic import BaseModel

from emogen.cli.__main__ import app
from emogen.task.recipe import Recipe, SelectBest

NOTE = "<!-- Generated: python tools/check_docs.py --write -->"


def all_commands() -> Iterator[tuple[str, Any]]:
    """All commands and groups, with their full names (`emogen prompts show`), in the order of the help."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for child, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {child}", inner)

    yield from walk("emogen", typer.main.get_command(app))


def commands_page() -> str:
    """docs/commands.md."""
    parts = [
        "# Commands",
        NOTE,
        "Every command has `--help`. Exit codes: 0 success, 1 external failure (disk, network), 2 invalid input, "
        "130 interrupted.",
    ]
    for name, command in all_commands():
        if name == "emogen":
            continue
        parts.append(f"## {name}")
        if not hasattr(command, "commands"):
            parts.append(f"```text\n{_usage(name, command)}\n```")
        parts += [_text(" ".join(paragraph.split())) for paragraph in command.help.split("\n\n")]
        if rows := [_row(parameter) for parameter in command.params]:
            parts.append(_table(("argument, option", "meaning", "default"), rows))
    return "\n\n".join(parts) + "\n"


def _usage(name: str, command: Any) -> str:
    arguments = [_metavar(parameter) for parameter in command.params if parameter.param_type_name == "argument"]
    options = ["[OPTIONS]"] if len(arguments) < len(command.params) else []
    return " ".join([name, *arguments, *options])


def _metavar(argument: Any) -> str:
    """How an argument is written: `RECIPE`, `PRED...`, `[KEY=VALUE]...`."""
    return str(argument.metavar or argument.name.upper() + ("..." if argument.nargs == -1 else ""))


def _row(parameter: Any) -> tuple[str, str, str]:
    """An argument or an option, its meaning, its default."""
    meaning = _text(parameter.help or "")
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`", meaning, ""
    name = ", ".join(f"`{word}`" for word in parameter.opts)
    if parameter.is_flag:
        return name, meaning, ""
    name += f" `{parameter.metavar or parameter.name.upper()}`" + (", repeatable" if parameter.multiple else "")
    return name, meaning, "" if parameter.default is None else f"`{parameter.default}`"


def keys_page() -> str:
    """docs/keys.md."""
    return "\n\n".join(
        [
            "# Recipe keys",
            NOTE,
            "A recipe is a flat YAML file. These are emogen's own keys. All fields of TRL's `SFTConfig` and "
            "`ModelConfig` are keys, too; `emogen keys` lists their names.",
            _keys_table(Recipe),
            "## select_best",
            "A mapping with these keys; [Training](training.md#evaluation-during-training) explains them.",
            _keys_table(SelectBest),
        ]
    ) + "\n"  # fmt: skip


def _keys_table(model: type[BaseModel]) -> str:
    fields = {name: field for name, field in model.model_fields.items() if not field.exclude}
    described = any(field.description for field in fields.values())
    rows = []
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default).strip(chr(34))}`"
        rows.append((f"`{name}`", default, *([_text(field.description or "")] if described else [])))
    return _table(("key", "default", *(["meaning"] if described else [])), rows)


def _text(plain: str) -> str:
    """Plain text for Markdown: what is in angle brackets is no HTML."""
    return plain.replace("<", "&lt;").replace("*", "\\*")


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
