"""Follow pages of the documentation as a reader does, on a machine that has nothing but the wheel.

    python .ci/fresh_machine.py [--python python3.13] [--pages PAGE...] [--folder FOLDER]

Builds the wheel of the tracked files. For each page, makes an empty folder and an empty home directory, and runs the
page's code blocks in their order and nothing else: the blocks of shell commands install the packages, and pip finds
vgg_jax in the wheel only. Blocks of Python share one interpreter; the cells of a notebook run in Jupyter. Prints the
seconds and the figures of each page, and fails if a block fails or a figure is below the stated one.

Needs `pip install build`, and a network connection for the packages that the pages install.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("quickstart", "export", "notebooks/quickstart", "notebooks/digits", "notebooks/export")
BLOCK = re.compile(r"^```(sh|python|\{code-cell\} ipython3)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# The accuracy that a page prints, and the lowest that agrees with the stated one: 2 of the 360 images fewer.
FIGURES = {"quickstart": (r"accuracy\s+(\d+\.\d+)%", 99.44 - 0.56), "notebooks/digits": (r"(\d+\.\d+)% of 1797", 90.0)}
RUN_BLOCKS = """
import json, subprocess, sys
names = {"__name__": "__main__"}
for kind, text in json.load(open(sys.argv[1])):
    print(f"--- {kind}", text, sep="\\n", flush=True)
    if kind == "python":
        exec(compile(text, "block", "exec"), names)
    else:
        subprocess.run(["bash", "-e", "-c", text], check=True)
"""


class Block(NamedTuple):
    """A block of code: its kind, sh, python or cell, and its text."""

    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page in their order.

    Args:
      page: Markdown.
    """
    return [Block("cell" if "cell" in kind else kind, text) for kind, text in BLOCK.findall(page)]


def split(found: list[Block]) -> tuple[list[Block], list[Block]]:
    """Return the blocks of shell commands that a page begins with, which install, and the others."""
    count = next(
        (i for i, block in enumerate(found) if block.kind != "sh" or "pip install" not in block.text), len(found)
    )
    return found[:count], found[count:]


def notebook(cells: list[Block]) -> dict[str, Any]:
    """Return a Jupyter notebook with the cells."""
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    entries = [{**code, "id": f"cell-{i}", "source": block.text} for i, block in enumerate(cells)]
    return {"cells": entries, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def output_of(path: pathlib.Path) -> str:
    """Return the text that the cells of an executed notebook have printed."""
    cells = json.loads(path.read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Build the wheel of the tracked files and return its folder."""
    source, wheels = folder / "source", folder / "wheels"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", wheels, source], check=True, stdout=2)
    shutil.rmtree(source)
    return wheels


def environment(home: pathlib.Path, wheels: pathlib.Path, python: str) -> dict[str, str]:
    """Return the variables of a reader's shell, in which `python3` is the Python to try."""
    programs = home / "programs"
    programs.mkdir(parents=True)
    for name in ("python3", "python"):
        (programs / name).write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
        (programs / name).chmod(0o755)
    for name in (".config/pip", ".pip"):  # where this machine finds packages
        if (pathlib.Path.home() / name).exists():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(pathlib.Path.home() / name)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "XLA_", "VGG_"))
    }
    links = f"{wheels} {kept.get('PIP_FIND_LINKS', '')}".strip()
    return {**kept, "HOME": str(home), "PATH": f"{programs}:{kept['PATH']}", "PIP_FIND_LINKS": links}


def follow(name: str, folder: pathlib.Path, wheels: pathlib.Path, python: str) -> str:
    """Run the blocks of a page in an empty folder and return what they print.

    Args:
      name: the page without folder and suffix.
      folder: a missing folder.
      wheels: the folder of the wheel.
      python: the path of the Python.

    Raises:
      subprocess.CalledProcessError: if a block fails.
    """
    page = (ROOT / "docs" / f"{name}.md").read_text()
    install, rest = split(blocks(page))
    work = folder / "work"
    work.mkdir(parents=True)
    variables = environment(folder / "home", wheels, python)
    for block in install:
        subprocess.run(["bash", "-e", "-c", block.text], cwd=work, env=variables, check=True, stdout=2)
    variables["PATH"] = f"{work / '.venv' / 'bin'}:{variables['PATH']}"
    if any(block.kind == "cell" for block in rest):
        path = work / "page.ipynb"
        path.write_text(json.dumps(notebook([block for block in rest if block.kind == "cell"])))
        command = ["jupyter", "execute", "--inplace", "--timeout=-1", path.name]
        subprocess.run(command, cwd=work, env=variables, check=True, stdout=2)
        return output_of(path)
    (work / "blocks.json").write_text(json.dumps(rest))
    command = ["python", "-c", RUN_BLOCKS, "blocks.json"]
    ran = subprocess.run(command, cwd=work, env=variables, stdout=subprocess.PIPE, text=True)
    print(ran.stdout, file=sys.stderr)
    ran.check_returncode()
    return ran.stdout


def figure_of(name: str, output: str) -> str:
    """Return the last figure that a page has printed, as text.

    Raises:
      SystemExit: if it is missing or below the stated one.
    """
    if name not in FIGURES:
        return "no figure, its assertions hold"
    pattern, lowest = FIGURES[name]
    found = re.findall(pattern, output)
    if not found or float(found[-1]) < lowest:
        raise SystemExit(f"{name}: found the accuracy {found[-1:]}; expected at least {lowest:.2f}%: correct the page")
    return f"accuracy {found[-1]}%"


def main(words: list[str] | None = None) -> int:
    """Follow the pages, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="the Python of the reader (default: %(default)s)")
    parser.add_argument("--pages", nargs="+", default=PAGES, choices=PAGES, help="default: all")
    parser.add_argument("--folder", type=pathlib.Path, help="keep all files there; default: a temporary folder")
    options = parser.parse_args(words)
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="fresh-"))
    folder = folder.resolve()
    version = [options.python, "-c", "import sys; print(sys.executable, sys.version.split()[0])"]
    try:
        python, number = subprocess.run(version, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"{options.python} does not run ({error}); expected a Python: pass its path")
    try:
        wheels = build_wheel(folder)
        for name in options.pages:
            start = time.perf_counter()
            output = follow(name, folder / name.replace("/", "-"), wheels, python)
            seconds = time.perf_counter() - start
            print(f"docs/{name}.md, Python {number}: {figure_of(name, output)}, {seconds:.0f} s", flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
