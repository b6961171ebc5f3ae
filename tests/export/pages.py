"""The Python of a page of docs/, run with the files of a test."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"


def snippets(name):
    """Return the Python snippets of a page."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def run_page(name):
    """Run a page's snippets one after the other; return their names."""
    namespace = {"__name__": "page"}
    for snippet in snippets(name):
        exec(compile(snippet, name, "exec"), namespace)
    return namespace
