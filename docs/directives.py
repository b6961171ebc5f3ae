"""Sphinx directives that write the reference of the configuration and of the commands from the code.

```{config-fields} optimizer        the fields of one group of the configuration
```{command} predict                the options of one subcommand
```{subcommands}                    the list of all subcommands
```{class-fields} vgg_jax.VGG       the fields of a class and their comments
```{experiments}                    the pages of experiments/ that exist, with their first picture
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import pathlib
import re
import unittest.mock
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from vgg_jax.__main__ import SUBCOMMANDS
from vgg_jax.cli.fields import GROUPS, comment, described_fields

ROOT = pathlib.Path(__file__).parent.parent


class Found(BaseException):
    """Carry a parser out of the function that makes it."""


def parser_of(subcommand: str) -> argparse.ArgumentParser:
    """Return the argument parser of a subcommand, except of `train`, which has flags of absl.

    Args:
      subcommand: a key of `vgg_jax.__main__.SUBCOMMANDS`.
    """
    module = importlib.import_module(f"vgg_jax.cli.{SUBCOMMANDS[subcommand][0]}")
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: Any) -> None:
        found.append(parser)
        raise Found

    with unittest.mock.patch.object(argparse.ArgumentParser, "parse_args", keep), contextlib.suppress(Found):
        module.main([])
    return found[0]


def command_lines(subcommand: str) -> list[str]:
    """Return the reference of a subcommand as Markdown: its purpose, its usage and a table of its options."""
    parser = parser_of(subcommand)
    lines = paragraphs(parser.description or "")
    lines += ["", "| option | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        lines.append(f"| {flags(action)} | {escaped(text)} |")
    return lines


def flags(action: argparse.Action) -> str:
    """Return the names of an option and its values as a cell of a table."""
    value = action.metavar
    if value is None and action.choices is not None:
        value = "|".join(str(choice) for choice in action.choices)
    value = value or (action.dest.upper() if action.nargs != 0 else "")
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    names = action.option_strings or [""]
    cell = ", ".join(f"`{name} {shown}`".replace("` ", "`").replace(" `", "`") for name in names)
    return cell.replace("|", "\\|") + (" (required)" if action.required and action.option_strings else "")


def paragraphs(text: str) -> list[str]:
    """Return a module's docstring as Markdown: indented lines that follow a colon are code."""
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        if block.startswith("  "):
            lines += ["```sh", *(line.strip() for line in block.splitlines()), "```", ""]
        else:
            lines += [*block.splitlines(), ""]
    return lines


def field_lines(title: str) -> list[str]:
    """Return a table of the fields of one group of the configuration as Markdown.

    Args:
      title: a title of `vgg_jax.cli.fields.GROUPS`: model, data, optimizer or run.
    """
    ((prefix, source_class),) = [(prefix, cls) for name, prefix, cls in GROUPS if name == title]
    lines = ["| `--config.` | type | default | meaning |", "|---|---|---|---|"]
    for name, annotation, default, text in described_fields(source_class):
        cells = (f"`{prefix}{name}`", f"`{annotation}`", f"`{default}`", text)
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return lines


def class_field_lines(name: str) -> list[str]:
    """Return a table of the fields of a class, with the comments of its source, as Markdown.

    Args:
      name: the full name of the class, such as vgg_jax.VGG.
    """
    module, _, class_name = name.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), class_name))
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = comment(source.splitlines(), statement.lineno, statement.end_lineno or statement.lineno)
            default = f"`{ast.unparse(statement.value)}`" if statement.value else ""
            cells = (f"`{statement.target.id}`", f"`{ast.unparse(statement.annotation)}`", default, text)
            lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return lines


def subcommand_lines() -> list[str]:
    """Return a table of all subcommands, with links to their headings, as Markdown."""
    rows = [f"| [`vgg-jax {name}`](#{name}) | {purpose} |" for name, (_, purpose) in SUBCOMMANDS.items()]
    return ["| command | purpose |", "|---|---|", *rows]


def train_lines() -> list[str]:
    """Return the options of `train`, which are flags of absl, as Markdown."""
    from vgg_jax.cli import train  # here, because its docstring and flags need the extra `train`

    lines = [*paragraphs(train.__doc__ or ""), "", "| option | meaning |", "|---|---|"]
    values = train._define_flags([])
    for name in values.flags_by_module_dict().get("vgg_jax.cli.train", values):
        flag = values[getattr(name, "name", name)]
        lines.append(f"| `--{flag.name}` | {escaped(flag.help)} |")
    return lines


def experiment_lines(folder: pathlib.Path = ROOT / "experiments") -> list[str]:
    """Return a link and the first picture of each page of experiments, those with pictures first, as Markdown.

    Args:
      folder: the folder of the pages.
    """
    with_picture, without = [], []
    for path in sorted(folder.glob("*.md")):
        text = path.read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        link = f"[{title}](/experiments/{path.name})"
        picture = re.search(r"!\[(.*?)\]\((\S+)\)", text)
        if picture:
            with_picture += ["", link, "", f"![{picture.group(1)}](/experiments/{picture.group(2)})"]
        else:
            without.append(f"- {link}")
    return [*with_picture, "", "Without a picture:" if with_picture else "", "", *without]


def escaped(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


class Generated(SphinxDirective):
    """Insert Markdown that a function returns."""

    optional_arguments = 1

    def lines(self) -> list[str]:
        """Return the Markdown of the directive."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the Markdown."""
        container = nodes.container()
        self.state.nested_parse(StringList(self.lines(), source=self.name), self.content_offset, container)
        return list(container.children)


class ConfigFields(Generated):
    """Insert the fields of one group of the configuration."""

    def lines(self) -> list[str]:
        """Return the table of the group that the argument names."""
        return field_lines(self.arguments[0])


class ClassFields(Generated):
    """Insert the fields of a class."""

    def lines(self) -> list[str]:
        """Return the table of the fields of the class that the argument names."""
        return class_field_lines(self.arguments[0])


class Command(Generated):
    """Insert the options of one subcommand."""

    def lines(self) -> list[str]:
        """Return the reference of the subcommand that the argument names."""
        return train_lines() if self.arguments[0] == "train" else command_lines(self.arguments[0])


class Subcommands(Generated):
    """Insert the list of all subcommands."""

    def lines(self) -> list[str]:
        """Return the table of the subcommands."""
        return subcommand_lines()


class Experiments(Generated):
    """Insert the pages of experiments."""

    def lines(self) -> list[str]:
        """Return the links and pictures of the pages."""
        return experiment_lines()


def register(app: Sphinx) -> None:
    """Add the directives to Sphinx."""
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("class-fields", ClassFields)
    app.add_directive("command", Command)
    app.add_directive("subcommands", Subcommands)
    app.add_directive("experiments", Experiments)
