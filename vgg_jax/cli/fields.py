"""The fields of the configuration, read from the source of its dataclasses, and their description for --help."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from vgg_jax import config
from vgg_jax.cli.paragraphs import COLUMNS

# The groups of fields: the title, the prefix of the names, the dataclass.
GROUPS = (
    ("model", "model.", config.ModelConfig),
    ("data", "data.", config.DataConfig),
    ("optimizer", "optimizer.", config.OptimizerConfig),
    ("run", "", config.Config),
)


def described_fields(source_class: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and comment of each field of a dataclass, except of fields that are dataclasses."""
    source = inspect.getsource(source_class)
    for statement in ast.parse(source).body[0].body:  # type: ignore[attr-defined] # a class has a body
        if isinstance(statement, ast.AnnAssign) and "default_factory" not in ast.unparse(statement):
            assert isinstance(statement.target, ast.Name) and statement.value and statement.end_lineno
            text = comment(source.splitlines(), statement.lineno, statement.end_lineno)
            yield statement.target.id, ast.unparse(statement.annotation), ast.unparse(statement.value), text


def comment(lines: list[str], first: int, last: int) -> str:
    """Return the comment of the statement on lines `first` to `last`, counted from 1; "" if it has none.

    Args:
      lines: the source's lines.
      first: the statement's first line.
      last: its last line.

    Returns:
      The comment on the first line, or on the lines directly above, or on the last line.
    """
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    beside = [match.group(1) for n in {first, last} if (match := re.search(r"\s{2}# (.*)$", lines[n - 1]))]
    return " ".join([*above, *beside])


def help_text(values: Any = None) -> str:
    """Return all fields with their types, values and meanings, at most 80 columns wide.

    Args:
      values: the configuration whose values to show; by default the defaults of the dataclasses.
    """
    values = values or config.Config()
    lines: list[str] = []
    for title, prefix, source_class in GROUPS:
        lines += ["", f"{title}:"]
        node = getattr(values, title) if prefix else values
        assert dataclasses.is_dataclass(node)
        for name, annotation, _, text in described_fields(source_class):
            value = getattr(node, name)
            lines += entry(f"--config.{prefix}{name}={_argument(value)}", f"({annotation}) {text}")
    return "\n".join(lines[1:])


def entry(flag: str, meaning: str) -> list[str]:
    """Return the lines of one flag in a help text."""
    wrapped = textwrap.wrap(meaning, COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6)
    name = textwrap.wrap(flag, COLUMNS, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    return [*name, *wrapped]


def _argument(value: Any) -> str:
    """Return a value as a user types it."""
    if isinstance(value, tuple):
        return f'"{value!r}"'
    return str(value) if value != "" else '""'
