"""The shape that DESIGN.md gives the code: sizes, parameters, and habits that make a line hard to read."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ROOT
from tests.unit.test_layers import SCRIPT_NAMES, imports

MAX_CORE = 3000  # lines
MAX_PRODUCT = 17387  # lines; 8,647 before folders of images, 12,230 before checked state and checkpoints (docs/LOG.md)
MAX_SCRIPT, MAX_MAIN = 80, 45  # lines of train.py and of its main()
MAX_PARAMETERS, MAX_TUPLE = 7, 3
CORE = [
    "train.py",
    "config/training_config.py",
    "data/dataset.py",
    "data/collator.py",
    "models/builder.py",
    "models/trainer.py",
    "models/scoring.py",
    "evaluation/evaluator.py",
    "evaluation/metrics.py",
    "runtime/run_dir.py",
    "runtime/checkpoint.py",
]
ROOMS = ("config", "data", "models", "evaluation", "runtime", "utils", "benchmarks")
SEES_CONFIG = ("build_", "from_", "open_run", "init_distributed")
KEEPS_CONFIG = ("config/", "runtime/run_files.py", "runtime/run_dir.py")  # read, write, compare it
FRAMEWORK = {"forward", "backward", "jvp", "setup_context"}  # of autograd functions; their signatures are torch's


def python_files(*folders: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).glob("*.py"))


PRODUCT = [*python_files("."), *python_files(*ROOMS)]
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef
Habit = Callable[[str, ast.Module], Iterator[str]]  # (path, its tree) -> what breaks it
HABITS: dict[Habit, list[str]] = {}  # with the files that keep them


def kept_by(paths: list[str]) -> Callable[[Habit], Habit]:
    def keep(habit: Habit) -> Habit:
        HABITS[habit] = paths
        return habit

    return keep


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def count_lines(paths: list[str]) -> int:
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths)


def functions(tree: ast.AST) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Each function with the class that it is a method of."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, node if isinstance(node, ast.ClassDef) else None


def test_core_path_can_be_read_in_an_hour():
    assert count_lines(CORE) <= MAX_CORE


def test_product_code_is_small():
    assert count_lines(PRODUCT) <= MAX_PRODUCT


def test_train_is_a_table_of_contents():
    assert count_lines(["train.py"]) <= MAX_SCRIPT
    (main,) = [node for node in parse("train.py").body if isinstance(node, Function) and node.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= MAX_MAIN


@kept_by(PRODUCT)
def only_builders_see_the_whole_config(path, tree):
    if path.startswith(KEEPS_CONFIG):
        return
    for function, _ in functions(tree):
        annotations = [argument.annotation for argument in arguments_of(function) if argument.annotation]
        takes = any("TrainingConfig" in ast.unparse(annotation) for annotation in annotations)
        if takes and not function.name.lstrip("_").startswith(SEES_CONFIG):
            yield f"{path}:{function.lineno}: {function.name}"


def arguments_of(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


@kept_by(python_files("."))
def scripts_never_import_scripts(path, tree):
    yield from (f"{path}: {name}" for name in imports(tree) & SCRIPT_NAMES)


@kept_by(PRODUCT + TESTS)
def functions_take_few_parameters(path, tree):
    for function, owner in functions(tree):
        decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
        is_autograd = owner is not None and any("Function" in ast.unparse(base) for base in owner.bases)
        if any("triton.jit" in name for name in decorators) or (is_autograd and function.name in FRAMEWORK):
            continue
        has_self = owner is not None and "staticmethod" not in decorators
        count = len(arguments_of(function)) - has_self
        if count > MAX_PARAMETERS:
            yield f"{path}:{function.lineno}: {function.name} takes {count}"


@kept_by(PRODUCT)
def long_tuples_have_names(path, tree):
    """A function that returns more than three values returns a NamedTuple or a dataclass."""
    for function, _ in functions(tree):
        for node in ast.walk(function.returns or ast.Constant(None)):
            if not isinstance(node, ast.Subscript) or ast.unparse(node.value) != "tuple":
                continue
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if len(parts) > MAX_TUPLE:
                yield f"{path}:{function.lineno}: {function.name} -> {ast.unparse(function.returns)}"


@kept_by(PRODUCT + TESTS)
def calls_take_their_arguments_one_by_one(path, tree):
    """`call(*(a, b))` is a way around the formatter, not an argument list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            splats = [part.value for part in node.args if isinstance(part, ast.Starred)]
            yield from (f"{path}:{splat.lineno}" for splat in splats if isinstance(splat, ast.Tuple | ast.List))


@kept_by(PRODUCT + TESTS)
def strings_are_chosen_by_conditions_not_multiplied(path, tree):
    """`"text" if flag else ""`, never `"text" * flag`; a repetition is by a number: `"-" * 80`, `"ab" * len(rows)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for text, times in ((node.left, node.right), (node.right, node.left)):
                if is_text(text) and is_condition(times):
                    yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_condition(node: ast.expr) -> bool:
    """Not a number, as far as the syntax shows it."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name in ("bool", "isinstance", "any", "all") or name.rsplit(".", 1)[-1].startswith(
            ("is_", "has_", "startswith", "endswith")
        )
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    is_flag = isinstance(node, ast.Attribute)  # the numbers that strings are repeated by are local
    return is_not or is_flag or isinstance(node, ast.Compare | ast.BoolOp)


@kept_by(PRODUCT + TESTS)
def module_has_a_docstring(path, tree):
    """The first line says what the file is for."""
    if not path.endswith("__init__.py") and not ast.get_docstring(tree):
        yield path


@kept_by(PRODUCT)
def public_names_have_no_aliases(path, tree):
    """No `old_name = new_name` at the top of a module: there is no release whose names must live on."""
    defined = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in defined:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


@pytest.fixture(scope="module")
def broken() -> dict[Habit, list[str]]:
    """What breaks each habit; each file is parsed once."""
    found: dict[Habit, list[str]] = {habit: [] for habit in HABITS}
    for path in PRODUCT + TESTS:
        tree = parse(path)
        for habit, paths in HABITS.items():
            if path in paths:
                found[habit] += habit(path, tree)
    return found


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_habit_is_kept(habit, broken):
    assert not broken[habit], "\n".join([habit.__doc__ or "", *broken[habit]])


def test_everything_in_the_tree_has_its_room():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    rooms = {*ROOMS, "web", "docs", "tests", ".ci"}
    assert {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line} <= rooms
    assert not [
        line for line in listed.stdout.splitlines() if line.split("/")[-1] in ("common.py", "helpers.py", "misc.py")
    ]


def test_docs_testing_lists_tests_that_exist():
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(test_\w+)`", page))
    defined = {function.name for path in TESTS for function, _ in functions(parse(path))}
    assert len(listed) > 40 and listed <= defined, sorted(listed - defined)
