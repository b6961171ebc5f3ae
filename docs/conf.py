"""Configure Sphinx for the documentation site: see docs/build.py.

The source directory is the root of the repository, so that links between docs/, benchmarks/ and experiments/ work on
the site as they work on GitHub.
"""

import os
import pathlib
import sys

from sphinx.application import Sphinx

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vgg_jax  # noqa: E402 # the root of the repository has to be on the path before
from docs import directives  # noqa: E402 # as above

project = "vgg_jax"
author = "The vgg_jax authors"
project_copyright = author
version = release = vgg_jax.__version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/*.md", "experiments/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"]
exclude_patterns = [".*", "build", "runs", "tests", "vgg_jax", "configs", "examples", "*.egg-info"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = False
suppress_warnings = ["myst.header"]  # a page may skip a level of headings
nb_execution_mode = os.environ.get("VGG_JAX_NOTEBOOKS", "off")  # docs/build.py --execute sets it to "force"
nb_execution_timeout = 900  # seconds for a cell, also on a busy machine
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings mark code with one backtick, as Markdown does.
default_role = "code"
autodoc_default_options = {"exclude-members": "parent, name, scope"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
add_module_names = False
viewcode_line_numbers = True
toc_object_entries = False

html_theme = "sphinx_book_theme"
html_title = "vgg_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["static/index.html"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_theme_options = {
    "navbar_persistent": [],
    "logo": {"text": f"vgg_jax {release}"},
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
copybutton_exclude = ".linenos, .gp, .go"


def shorten(*event: object) -> tuple[str, str] | None:
    """Return a signature and its result without the module of JAX's arrays.

    Args:
      *event: the arguments of the event autodoc-process-signature; the last two are the signature and the result.
    """
    signature, result = (str(part or "").replace("jaxlib._jax.Array", "Array") for part in event[-2:])
    return (signature, result) if signature else None


def setup(app: Sphinx) -> None:
    """Register the directives of the references."""
    directives.register(app)
    app.connect("autodoc-process-signature", shorten)
