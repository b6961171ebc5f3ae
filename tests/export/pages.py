"""The Python of a page of docs/, run with the files of a test."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"


def snippets(name):
    """Return the Python snippets of a page."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def run_page(name, *words):
    """Run those of a page's snippets that contain one of the words, or all, in order; return their names."""
    namespace = {"__name__": "page"}
    for snippet in snippets(name):
        if words and not any(word in snippet for word in words):
            continue
        exec(compile(snippet, name, "exec"), namespace)
    return namespace
