"""Imports point one way, and a script parses its command line before it imports anything heavy."""

import ast
import sys

import pytest

from tests.conftest import ROOT

# Who may import whom; config and utils say so again where they forbid third parties.
ALLOWED = {
    "benchmarks": {"config", "data", "models", "runtime", "utils"},
    "evaluation": {"config", "data", "evaluation", "models", "runtime", "utils"},
    "models": {"config", "data", "models", "runtime", "utils"},
    "data": {"config", "data", "utils"},
    "runtime": {"config", "runtime", "utils"},
    "utils": {"utils"},
    "config": {"config"},
}
LIGHT = {"utils.logging_utils", "runtime.run_dir", "runtime.run_files", "benchmarks.points"}  # no torch below them
SCRIPT_NAMES = {"train", "test_trainer", "evaluate", "benchmark", "predict", "export", "app"}
OURS = {*ALLOWED, "tests"} | SCRIPT_NAMES
MODULES = sorted(path for folder in ALLOWED for path in (ROOT / folder).glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """First names of everything imported anywhere below."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module.split(".")[0])
    return found


def test_imports_point_one_way():
    for path in MODULES:
        assert imports(ast.parse(path.read_text())) & OURS <= ALLOWED[path.parent.name], path


def test_config_needs_the_standard_library_alone():
    for path in (ROOT / "config").glob("*.py"):
        assert imports(ast.parse(path.read_text())) <= set(sys.stdlib_module_names) | {"config"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_before_they_import_anything_heavy(path):
    """At the top of a root script stand only the standard library, config and LIGHT."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in top:
        name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        assert name.split(".")[0] in {"config", *sys.stdlib_module_names} or name in LIGHT
