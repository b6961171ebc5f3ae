"""Build the documentation site; a warning is an error.

    python docs/build.py [--execute] [OUTPUT]

Needs pip install 'vgg_jax[docs]'. OUTPUT is build/site by default; open OUTPUT/index.html. With --execute, the
notebooks of docs/notebooks run, each in a process of its own; without it, the site has their code without results.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from vgg_jax import look  # noqa: E402 # the root of the repository has to be on the path before


def matplotlibrc() -> str:
    """Return the file of settings that gives the pictures of the notebooks the look of all pictures."""
    colors = [color.removeprefix("#") for color in look.COLORS]  # "#" begins a comment in this file
    lines = [f"{name}: {str(value).removeprefix('#')}\n" for name, value in look.STYLE.items()]
    return "".join([*lines, f"axes.prop_cycle: cycler('color', {colors})\n"])


def build(output: pathlib.Path, execute: bool) -> int:
    """Run Sphinx and return its exit code.

    Args:
      output: the folder of the site.
      execute: run the notebooks.
    """
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-E", "-c", "docs", "."]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "matplotlibrc")
        path.write_text(matplotlibrc())
        settings = {
            "VGG_JAX_NOTEBOOKS": "force" if execute else "off",
            "JAX_PLATFORMS": "cpu",
            "MATPLOTLIBRC": str(path),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        environment = {**os.environ, **settings}
        return subprocess.run([*command, str(output.resolve())], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default=ROOT / "build" / "site", type=pathlib.Path, metavar="OUTPUT")
    parser.add_argument("--execute", action="store_true", help="run the notebooks")
    options = parser.parse_args()
    sys.exit(build(options.output, options.execute))
