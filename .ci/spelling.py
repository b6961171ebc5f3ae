"""Run codespell over the words of the tracked files and over the parts of their names: American spelling everywhere.

codespell takes a name such as `snake_case` or `camelCase` for one word. This script writes copies in which blanks
separate the parts of names, and checks the copies.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".md", ".toml", ".cff", ".yaml", ".yml", ""}
EXCLUDED = {"LICENSE"}


def split_names(text: str) -> str:
    """Return the text with the parts of snake_case and camelCase names separated by blanks."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"(?<=[A-Za-z])_(?=[A-Za-z])", " ", text))


def main() -> int:
    """Check all tracked files, print each misspelling, and return codespell's exit code."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [name for name in listed if pathlib.Path(name).suffix in SUFFIXES and name not in EXCLUDED]
    with tempfile.TemporaryDirectory() as directory:  # without a pyproject.toml, which codespell would read
        for name in names:
            copy = pathlib.Path(directory, "words", name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(split_names((ROOT / name).read_text()))
        command = [sys.executable, "-m", "codespell_lib", "--builtin", "en-GB_to_en-US", "--check-hidden", "words"]
        return subprocess.run(command, cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
