"""Rules that keep the package readable: imports go in one direction, functions are short."""

import ast
from importlib import import_module

import pytest

import gravlens_jax
from conftest import ROOT

ORDER = (
    *("errors", "config", "metrics", "layers", "preprocess", "lensing", "model", "run_dir", "pixels", "npz", "folders"),
    *("inference", "optim", "train_step", "sharding", "loader", "console", "datasets", "checkpoint"),
    *("weights", "report", "training", "cli"),
)
PACKAGE = ROOT / "gravlens_jax"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [*MODULES.values(), *sorted((ROOT / "scripts").rglob("*.py"))]


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
def test_a_module_imports_only_modules_before_it(module):
    part = module.partition(".")[0]
    before = {"errors", "lensing"} if part == "lensing" else set(ORDER[: ORDER.index(part)])
    names = imported(MODULES[module])
    assert {name.split(".")[1] for name in names if name.startswith("gravlens_jax.")} <= before
    assert not {name.partition(".")[0] for name in names} & {"scripts", "bench", "tests"}


def test_the_package_is_small():
    assert {module.partition(".")[0] for module in MODULES} == {"__init__", *ORDER}
    assert len(MODULES) <= 28


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_change_no_variable_of_another(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Nonlocal), node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_public_names_are_the_ones_that_type_checkers_see():
    checked = {name for name in imported(MODULES["__init__"]) if name.startswith("gravlens_jax.")}
    assert checked == {f"{gravlens_jax._MODULES[name]}.{name}" for name in gravlens_jax.__all__}
    for name in gravlens_jax.__all__:
        assert getattr(gravlens_jax, name) is getattr(import_module(gravlens_jax._MODULES[name]), name)
