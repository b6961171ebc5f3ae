"""The layout of help texts: paragraphs wrapped to the terminal, indented lines as they are."""

import argparse
import re
import textwrap

COLUMNS = 80


def wrapped(text: str, columns: int = COLUMNS) -> str:
    """Return a text with each paragraph wrapped; indented lines stay as they are, or wrap under their second column.

    Args:
      text: paragraphs, with blank lines between them.
      columns: the width of the result.
    """
    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*text.strip().splitlines(), ""]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        lines += textwrap.wrap(" ".join(paragraph), columns, break_on_hyphens=False, break_long_words=False)
        paragraph = []
        second = re.match(r"\s*(\S+\s{2,})?", line)  # the indent, or all before the second column
        indent = " " * (second.end() if second else 0)
        lines += textwrap.wrap(line, columns, subsequent_indent=indent, break_on_hyphens=False) or [line]
    return "\n".join(lines).rstrip()


class Paragraphs(argparse.HelpFormatter):
    """Format the help of a command whose description has several paragraphs."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(wrapped(text, min(width, COLUMNS)), indent)
