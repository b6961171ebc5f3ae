"""Check that a release is consistent, or prepare one.

    python .ci/release_version.py v0.2.0                     check
    python .ci/release_version.py --set 0.2.0 2026-12-01     write the version and the date

The tag, the version in pyproject.toml, that in CITATION.cff and the newest heading of CHANGELOG.md must be the same.
--set writes them; the commit of these files and the tag then publish the release.
"""

import datetime
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSION = re.compile(r"\d+\.\d+\.\d+")


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


def set_version(root: pathlib.Path, version: str, date: str) -> None:
    """Write a version and its date into the three files; nothing is written if one of them has no place for it.

    Args:
      root: the root of the repository.
      version: such as 0.2.0.
      date: the day of the release, YYYY-MM-DD.

    Raises:
      SystemExit: if the version or the date has another form, or CHANGELOG.md has no heading "Unreleased".
    """
    if not VERSION.fullmatch(version):
        raise SystemExit(f"found the version {version!r}; expected three numbers: pass one such as 0.2.0")
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise SystemExit(f"found the date {date!r}; expected YYYY-MM-DD: pass the day of the release") from None
    edits = {
        "pyproject.toml": (r'^version = ".*"$', f'version = "{version}"'),
        "CITATION.cff": (r"^version: .*\n(?:date-released: .*\n)?", f"version: {version}\ndate-released: {date}\n"),
        "CHANGELOG.md": (r"^## Unreleased$", f"## {version} ({date})"),
    }
    texts = {}
    for name, (pattern, line) in edits.items():
        texts[name], count = re.subn(pattern, line, (root / name).read_text(), count=1, flags=re.MULTILINE)
        if not count:
            raise SystemExit(f"{name} has no line {pattern}; expected one: add it, then rerun")
    for name, text in texts.items():
        (root / name).write_text(text)


def main(*words: str) -> int:
    """Check a tag, or set a version; print each file whose version differs from the tag and return 1 if one does."""
    match words:
        case ["--set", version, date]:
            set_version(ROOT, version, date)
            return 0
        case [tag]:
            differing = {name: found for name, found in versions(ROOT).items() if f"v{found}" != tag}
        case _:
            raise SystemExit(__doc__)
    expected = tag.removeprefix("v")
    for name, found in differing.items():
        print(f"{name} has version {found!r}; expected {expected!r}: correct it, or the tag", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
