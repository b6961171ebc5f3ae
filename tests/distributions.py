"""List the contents of a wheel and a source distribution, and fail on a file that does not belong there.

python -m build && python -m tests.distributions dist
"""

import pathlib
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ("*.txt", "*.safetensors", "*.LICENSE", "py.typed")  # beside the Python files of the package
TOP = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg", "PKG-INFO", "CHANGELOG.md", "CITATION.cff"}


def expected_in_wheel():
    """Return the names of the package's files in a wheel."""
    folder = ROOT / "vgg_jax"
    files = [*folder.rglob("*.py"), *(path for pattern in DATA for path in folder.rglob(pattern))]
    configs = {f"vgg_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    return {str(path.relative_to(ROOT)) for path in files} | configs


def wheel_problems(names):
    """Return what is wrong with the names of a wheel's files."""
    found = {name for name in names if ".dist-info/" not in name}
    wanted = expected_in_wheel()
    return [
        *(f"the wheel lacks {name}" for name in sorted(wanted - found)),
        *(f"the wheel has {name}, which does not belong there" for name in sorted(found - wanted)),
    ]


def sdist_problems(names):
    """Return what is wrong with the names of a source distribution's files, without its first folder."""
    found = {name for name in names if name}
    wanted = {name.replace("vgg_jax/configs/", "configs/") for name in expected_in_wheel()}
    allowed = ("vgg_jax/", "configs/", "tests/", "docs/", "vgg_jax.egg-info/")
    return [
        *(f"the source distribution lacks {name}" for name in sorted(wanted - found)),
        *(
            f"the source distribution has {name}, which does not belong there"
            for name in sorted(found)
            if name not in TOP and not name.startswith(allowed)
        ),
    ]


def contents(path):
    """Return the names of the files in a distribution; for an sdist, without its first folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]


def main(folder):
    """Print the contents and the problems of all distributions in a folder; return 1 if there are any, else 0."""
    paths = sorted([*pathlib.Path(folder).glob("*.whl"), *pathlib.Path(folder).glob("*.tar.gz")])
    problems = (
        [] if len(paths) == 2 else [f"found {len(paths)} distributions in {folder}; expected a wheel and an sdist"]
    )
    for path in paths:
        names = contents(path)
        print(f"{path.name}: {len(names)} files, {path.stat().st_size / 2**20:.2f} MiB", *sorted(names), sep="\n  ")
        problems += wheel_problems(names) if path.suffix == ".whl" else sdist_problems(names)
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
