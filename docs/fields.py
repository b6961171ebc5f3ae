"""Generate the field reference in docs/training.md.

    python docs/fields.py

The text comes from the dataclasses of vgg_jax/config.py. A field's comment is on its line, or directly above it.
"""

import pathlib

from vgg_jax.cli.fields import GROUPS, described_fields

PAGE = pathlib.Path(__file__).parent / "training.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"


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
    for _, prefix, config_class in (GROUPS[-1], *GROUPS[:-1]):
        lines += rows(prefix, config_class)
    return "\n".join(lines)


def updated(page: str) -> str:
    """Return the page with the current field reference between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
