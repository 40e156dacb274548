"""How the code looks, as far as a program can tell (CONTRIBUTING.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.tidy import repo

MODULE_AIM, MODULE_LIMIT = 400, 600
FUNCTION_AIM, FUNCTION_LIMIT = 35, 90
BLACK_BOXES = (("tests", "cluster"), ("tests", "storm"), ("tests", "topology"))


def test_every_module_says_its_theory_first() -> None:
    silent = [
        str(path) for path, text, tree in repo.product() if text.strip() and len(ast.get_docstring(tree) or "") < 20
    ]
    assert not silent


def test_modules_stay_readable() -> None:
    lengths = sorted(((text.count("\n"), str(path)) for path, text, _tree in repo.product()), reverse=True)
    for length, path in lengths:
        if length > MODULE_AIM:
            print(f"{path} has {length} lines (aim: {MODULE_AIM})")  # noqa: T201  (shown by pytest -rP)
    assert [path for length, path in lengths if length > MODULE_LIMIT] == []


def test_functions_fit_the_screen() -> None:
    lengths = sorted(
        (
            ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
            for path, _text, tree in repo.product()
            for node in repo.functions(tree)
        ),
        reverse=True,
    )
    for length, name in lengths:
        if length > FUNCTION_AIM:
            print(f"{name} has {length} lines (aim: {FUNCTION_AIM})")  # noqa: T201  (shown by pytest -rP)
    assert [name for length, name in lengths if length > FUNCTION_LIMIT] == []


def test_names_are_the_domains() -> None:
    empty_word = re.compile(r"(Manager|Helper|Helpers|Utils|Util)$", re.IGNORECASE)
    classes = [
        f"{path}: {node.name}"
        for path, _text, tree in repo.product()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and empty_word.search(node.name)
    ]
    modules = [str(path) for path, _text, _tree in repo.product() if empty_word.search(path.stem)]
    assert classes + modules == []


def test_modules_are_imported_not_names() -> None:
    """`from covey.store import base`, never `from covey.store.base import Txn`; and no relative imports."""
    wrong = []
    for path, _text, tree in repo.product():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                wrong.append(f"{path}:{node.lineno} imports relatively")
            elif node.module and node.module.split(".")[0] == "covey":
                wrong += [f"{path}:{node.lineno} {n.name}" for n in node.names if not _is_module(node.module, n.name)]
    assert not wrong


def _is_module(package: str, name: str) -> bool:
    place = repo.ROOT / Path(*package.split("."))
    return (place / f"{name}.py").exists() or (place / name / "__init__.py").exists()


def test_only_the_composition_roots_read_the_environment() -> None:
    """Settings are read once. To hand the environment to a child is no reading, and PATH is no setting."""
    wrong = [
        f"{path}:{node.lineno}"
        for path, _text, tree in repo.product()
        if str(path) != "covey/settings.py" and path.parts[1] not in ("cli", "up.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call | ast.Subscript) and _reads_environment(node)
    ]
    assert not wrong


def _reads_environment(node: ast.Call | ast.Subscript) -> bool:
    what = ast.unparse(node.func if isinstance(node, ast.Call) else node.value)
    return what in ("os.environ", "os.environ.get", "os.getenv") and "'PATH'" not in ast.unparse(node)


def test_no_test_replaces_insides() -> None:
    """Clock, randomness, store and hypervisor are arguments; nothing of ours needs to be patched."""
    patch = re.compile(r"\bmock\." r"patch|monkeypatch\.setattr\((?!\"os\.)")
    found = [str(path) for path, text in repo.texts(suffix=".py") if path.parts[0] == "tests" and patch.search(text)]
    assert [name for name in found if name != "tests/tidy/test_modules.py"] == []


def test_black_box_tests_never_import_covey() -> None:
    """They know the product by HTTP, files and signals; so does all that they stand on."""
    seen: set[str] = set()
    fresh = {path for path in repo.files() if path.suffix == ".py" and path.parts[:2] in BLACK_BOXES}
    wrong = []
    while fresh:
        path = fresh.pop()
        seen.add(str(path))
        for name in _imports(ast.parse((repo.ROOT / path).read_text())):
            if name.split(".")[0] == "covey":
                wrong.append(f"{path} imports {name}")
            module = Path(*name.split(".")).with_suffix(".py")
            if name.startswith("tests.") and (repo.ROOT / module).exists() and str(module) not in seen:
                fresh.add(module)
    assert not wrong


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
