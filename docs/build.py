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

ROOT = pathlib.Path(__file__).parent.parent


def build(output: pathlib.Path, execute: bool) -> int:
    """Run Sphinx and return its exit code.

    Args:
      output: the folder of the site.
      execute: run the notebooks.
    """
    settings = {"VGG_JAX_NOTEBOOKS": "force" if execute else "off", "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, **settings, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-E", "-c", "docs", "."]
    return subprocess.run([*command, str(output.resolve())], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default=ROOT / "build" / "site", type=pathlib.Path, metavar="OUTPUT")
    parser.add_argument("--execute", action="store_true", help="run the notebooks")
    options = parser.parse_args()
    sys.exit(build(options.output, options.execute))
