"""The house rules: sizes, names, docstrings and wording. Each test lists all its problems at once."""

import ast
import collections
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "vgg_jax").rglob("*.py"))
PUBLIC = [*PACKAGE, *sorted((ROOT / "configs").glob("*.py")), ROOT / "train.py"]
CODE = [
    *PUBLIC,
    *(
        path
        for folder in ("tests", "benchmarks", "experiments", "docs")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
PROSE = [
    *sorted(ROOT.glob("*.md")),
    *(path for folder in ("docs", "benchmarks", "experiments") for path in sorted((ROOT / folder).rglob("*.md"))),
]
LONGEST_MODULE = 350
LONGEST_FUNCTION = 60
LONGEST_TEST_NAME = 60
SHORT_FUNCTIONS = {"build": 50, "train_and_evaluate": 50}

# The first words that docstrings of functions and methods may have.
VERBS = """
    Abort Accumulate Add Adjust Advance Allocate Append Apply Ask Assign Augment Average Begin Bind Block Bound
    Broadcast Build Cache Call Cast Check Choose Clamp Clean Clear Close Combine Compare Compile Complete Compute
    Configure Continue Convert Convolve Copy Correct Count Create Crop Decode Delay Delete Describe Detect Determine
    Disable Discard Dispatch Display Divide Do Download Draw Drop Enable End Ensure Enter Estimate Evaluate Examine
    Exchange Execute Exit Expand Export Extract Fail Fetch Fill Filter Find Finish Flatten Flip Flush Fold Follow
    Format Free Freeze Gather Generate Get Give Group Guard Handle Hash Hide Hold Ignore Import Infer Initialize
    Insert Inspect Install Invert Invoke Iterate Join Keep Limit List Load Lock Log Look Lower Make Map Mark Match
    Measure Merge Modify Monitor Move Multiply Name Normalize Notify Open Order Pad Paint Parse Pass Permute Place
    Plot Pool Predict Prefetch Prepare Preprocess Preserve Prevent Print Process Produce Propagate Provide Publish
    Pull Put Query Raise Read Rebuild Receive Record Reduce Refuse Register Reject Release Remove Rename Render Repeat
    Replace Report Request Require Reset Reshape Resize Resolve Restore Restrict Resume Return Reverse Rewrite Rotate
    Round Run Sample Save Scale Select Send Serialize Set Shard Shift Show Silence Shuffle Shut Skip Slice Smooth Sort
    Split Stack Start Stop Store Stream Style Subtract Suppress Swap Synchronize Take Tell Test Toggle Track Train
    Transfer Transform Transpose Trim Turn Undo Unlock Unpack Update Upload Use Validate Verify Wait Warn Wrap Write
    Yield
"""

# Phrases of the old prose, each with words to use instead.
BANNED = {
    r"\bgo(es|ing)? on (with|from|where|at|on|in|if|when)\b|\bgoes on\b": "resume, continue",
    r"\b(is|are) not there\b": "is missing",
    r"\b(part|all|much|most|each|none) of it\b": "its, or name the thing",
    r"\bsays so\b|\bwhat it says\b|\bas it says\b": "state what is meant",
    r"\bso that whoever\b|\bthat has chosen already\b": "split the sentence",
    r"(?<=[.!?] )Of (?=[a-z`])|^Of (?=[a-z`])": "begin with the subject",
    r"\bFrom [^.]{1,60} on[,.;:]": "above, starting at",
    r"\bbut for (the|its|random|noise)\b": "except for",
    r"\b[Bb]y way of\b": "through",
    r"\bnot in the way\b": "ignored",
    r"\bwants? of (an?|images|their)\b": "needs",
    r"\bmirror(s|ed|ing)?\b": "horizontal flip",
    r"\b[Aa]t last\b": "finally",
    r"\b[Ff]or ever\b": "forever",
    r"The command\.|Nothing, and so": "begin with a verb",
    r"\bthat (is|are) there\b|\b(is|are) there already\b": "exists",
    r"\bmend\b": "fix",
    r"\bthrice\b": "three times",
    r"\bspeaks? of\b": "names, or logs",
    r"\b(is|are) whole\b|\bwhole are those\b": "complete, or intact",
    r"\bmake room\b": "free disk space",
}
BRITISH = {
    r"\bcentre",
    r"\bcolour",
    r"normalis",
    r"initialis",
    r"\bgrey\b",
    r"neighb[o]ur",
    r"behavi[o]ur",
    r"\banalyse",
}


def relative(path):
    return str(path.relative_to(ROOT))


def functions(path):
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def check(problems):
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems)


def test_modules_are_short():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in PUBLIC}
    check([f"{path} has {n} lines; expected {LONGEST_MODULE}" for path, n in lengths.items() if n > LONGEST_MODULE])


def test_functions_are_short():
    problems = []
    for path in PUBLIC:
        for node in functions(path):
            length, most = node.end_lineno - node.lineno + 1, SHORT_FUNCTIONS.get(node.name, LONGEST_FUNCTION)
            if length > most:
                problems.append(f"{relative(path)}:{node.lineno} {node.name} has {length} lines; expected {most}")
    check(problems)


def test_module_names_differ():
    """Two modules of the package share a name only if one of them is a command."""
    places = collections.defaultdict(list)
    for path in PACKAGE:
        if path.stem not in ("__init__", "__main__") and path.parent.name != "cli":
            places[path.stem].append(relative(path))
    check([f"{', '.join(paths)} share a name" for paths in places.values() if len(paths) > 1])


def test_no_module_is_called_utils():
    check([relative(path) for path in PACKAGE if path.stem in ("utils", "util", "helpers", "common", "misc")])


def test_docstrings_begin_with_a_verb():
    problems, verbs = [], set(VERBS.split())
    for path in PUBLIC:
        for node in functions(path):
            first = (ast.get_docstring(node) or "Return").split()[0].strip(".,:;")
            if first not in verbs:
                problems.append(f"{relative(path)}:{node.lineno} {node.name}: docstring begins with {first!r}")
    check(problems)


def test_configs_state_source_command_cost_and_result():
    problems = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        problems += [
            f"{relative(path)} has no line {part!r}"
            for part in ("Source:", "Command:", "Cost:", "Result:")
            if not re.search(rf"^{part}", text, re.MULTILINE)
        ]
    check(problems)


def test_prose_has_no_banned_phrase():
    """Code, documentation and README use the words of the field, in plain order."""
    problems = []
    for path in [*CODE, *PROSE]:
        if path == pathlib.Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, instead in BANNED.items():
                if match := re.search(pattern, line.strip().lstrip("# ").strip('"')):
                    problems.append(f"{relative(path)}:{number} {match.group()!r}; use: {instead}")
    check(problems)


def test_spelling_is_american():
    """Catch the common British words without codespell, which .ci/run uses for all of them."""
    problems = []
    for path in [*CODE, *PROSE]:
        if path == pathlib.Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.replace("_", " ")
            problems += [
                f"{relative(path)}:{number} {m.group()!r}" for p in BRITISH for m in re.finditer(p, words, re.I)
            ]
    check(problems)


def test_test_names_are_short():
    problems = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in functions(path):
            if node.name.startswith("test_") and len(node.name) > LONGEST_TEST_NAME:
                problems.append(f"{relative(path)}:{node.lineno} {node.name} has {len(node.name)} characters")
    check(problems)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    wide = [line for line in lines if len(line) > 120 and not line.startswith("|") and "](" not in line]
    check(wide)


def test_all_packages_are_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE}
    check(sorted((folders | {"vgg_jax.configs"}) ^ listed))


def test_suppressed_checks_have_a_reason():
    problems = []
    for path in PUBLIC:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"# type: ignore(\[[\w, -]+\])?\s*$", line) or re.search(r"# noqa(: ?[A-Z0-9, ]+)?\s*$", line):
                problems.append(f"{relative(path)}:{number} {line.strip()}")
    check(problems)
