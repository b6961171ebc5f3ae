"""Check that a release is consistent: python .ci/release_version.py v0.2.0.

The tag, the version in pyproject.toml, that in CITATION.cff and the newest heading of CHANGELOG.md must be the same.
"""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def versions(root: pathlib.Path) -> dict[str, str]:
    """Return the version that each file states; "" if it states none.

    Args:
      root: the root of the repository.
    """

    def first(pattern: str, name: str) -> str:
        match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        return match.group(1) if match else ""

    return {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "CITATION.cff": first(r"^version: (\S+)$", "CITATION.cff"),
        "CHANGELOG.md": first(r"^## (\S+)", "CHANGELOG.md"),
    }


def main(tag: str) -> int:
    """Print each file whose version differs from that of the tag; return 1 if there is one, else 0."""
    differing = {name: found for name, found in versions(ROOT).items() if f"v{found}" != tag}
    for name, found in differing.items():
        print(
            f"{name} has version {found!r}; expected {tag.removeprefix('v')!r}: correct it, or the tag", file=sys.stderr
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
