"""Rules that keep the project readable: imports go in one direction, everything is small, public names are few."""

import ast
from importlib import import_module

import pytest

import gravlens_jax
from conftest import ROOT
from helpers import run_code

ORDER = (  # a module imports only modules before it; those in one string do not import each other
    *("errors", "files", "config", "npz", "folders", "progress", "metrics"),
    *("layers preprocess lensing", "model", "inference", "optim", "train_step", "sharding", "loader", "stream"),
    *("run_files", "datasets", "checkpoint", "network", "report", "training", "cli", "__main__"),
)
CORE = ("model", "optim", "train_step", "loader", "checkpoint", "training")
LIMITS = [  # sizes as they are: lower them when something is removed
    ("gravlens_jax/**/*.py", "lines", 4_699),
    ("gravlens_jax/**/[a-z]*.py", "files", 28),  # not __init__.py and __main__.py
    (" ".join(f"gravlens_jax/{name}.py" for name in CORE), "lines", 744),
    ("scripts/**/*.py", "lines", 2_788),
    ("scripts/bench/*.py", "lines", 1_180),
    ("tests/**/*.py", "lines", 4_647),
    ("README.md", "lines", 130),
    ("README.md", "words", 1_500),
]
PACKAGE = ROOT / "gravlens_jax"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path):
    """Returns the full names of all that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_module_imports_only_modules_before_it(module):
    names, part = imported(MODULES[module]), module.partition(".")[0]
    (place,) = (i for i, group in enumerate(ORDER) if part in group.split())
    before = ["errors", "config", "lensing"] if part == "lensing" else " ".join(ORDER[:place]).split()
    assert {name.split(".")[1] for name in names if name.startswith("gravlens_jax.")} <= {*before, "__version__"}
    assert not {name.partition(".")[0] for name in names} & {"scripts", "bench", "tests"}


def test_modules_without_jax():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"gravlens_jax.{name}")
    assert not {"jax", "flax", "optax", "orbax"} & sys.modules.keys(), name"""
    run_code(code, "errors", "files", "config", "npz", "folders", "progress", "metrics", "cli")
    run_code("import gravlens_jax.report, sys; assert 'matplotlib' not in sys.modules")  # only for drawing


@pytest.mark.parametrize("patterns, unit, most", LIMITS)
def test_project_is_small(patterns, unit, most):
    texts = [path.read_text() for pattern in patterns.split() for path in ROOT.glob(pattern)]
    lines, words = sum(len(text.splitlines()) for text in texts), sum(len(text.split()) for text in texts)
    assert 0 < {"files": len(texts), "lines": lines, "words": words}[unit] <= most


@pytest.mark.parametrize("folder", ["gravlens_jax", "scripts"])
def test_functions_are_short_and_change_no_variable_of_another(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Nonlocal), f"{path}:{node.lineno}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_public_names_are_those_for_type_checkers_and_for_completion():
    checked = {name for name in imported(MODULES["__init__"]) if name.startswith("gravlens_jax.")}
    assert checked == {f"{gravlens_jax._MODULES[name]}.{name}" for name in gravlens_jax.__all__}
    for name in gravlens_jax.__all__:
        assert getattr(gravlens_jax, name) is getattr(import_module(gravlens_jax._MODULES[name]), name)
    assert dir(gravlens_jax) == sorted([*gravlens_jax.__all__, "__version__"])
    assert not {*gravlens_jax.__all__} & MODULES.keys()
