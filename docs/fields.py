"""Generate the field reference in docs/training.md.

    python docs/fields.py

The text comes from the dataclasses of vgg_jax/config.py. A field's comment is on its line, or directly above it.
"""

import ast
import inspect
import pathlib
import re
from collections.abc import Iterator

from vgg_jax import config

PAGE = pathlib.Path(__file__).parent / "training.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
CLASSES = (("", config.Config), ("model.", config.ModelConfig), ("data.", config.DataConfig),
           ("optimizer.", config.OptimizerConfig))  # fmt: skip


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


def described_fields(source_class: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and comment of each field of a dataclass, except of fields that are dataclasses."""
    source = inspect.getsource(source_class)
    for statement in ast.parse(source).body[0].body:  # type: ignore[attr-defined] # a class has a body
        if isinstance(statement, ast.AnnAssign) and "default_factory" not in ast.unparse(statement):
            assert isinstance(statement.target, ast.Name) and statement.value and statement.end_lineno
            text = comment(source.splitlines(), statement.lineno, statement.end_lineno)
            yield statement.target.id, ast.unparse(statement.annotation), ast.unparse(statement.value), text


def rows(prefix: str, config_class: type) -> list[str]:
    """Return one row of a Markdown table for each field of a dataclass."""
    result = []
    for name, annotation, default, text in described_fields(config_class):
        cells = (f"`{prefix}{name}`", annotation, f"`{default}`", text)
        result.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return result


def table() -> str:
    """Return the whole field reference as Markdown."""
    lines = ["| `--config.` | type | default | meaning |", "|---|---|---|---|"]
    for prefix, config_class in CLASSES:
        lines += rows(prefix, config_class)
    return "\n".join(lines)


def updated(page: str) -> str:
    """Return the page with the current field reference between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
