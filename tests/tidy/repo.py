"""The project's own files, as the tidy tests read them."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = (".whl", ".png", ".qcow2", ".gz", ".ico")


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file that is or would be committed, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()))


def texts(*, suffix: str = "") -> Iterator[tuple[Path, str]]:
    """(path, content) of every text file whose name ends in `suffix`."""
    for path in files():
        if path.suffix not in BINARY and path.name.endswith(suffix):
            yield path, (ROOT / path).read_text(encoding="utf-8")


def product() -> Iterator[tuple[Path, str, ast.Module]]:
    """(path, source, syntax tree) of every module of the product that people wrote."""
    for path, text in texts(suffix=".py"):
        if path.parts[0] == "covey" and "etcdpb" not in path.parts:
            yield path, text, ast.parse(text)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_ids() -> set[str]:
    """Every test of the project as ``path::name`` (and ``path::Class::name``)."""
    found = set()
    for path, text in texts(suffix=".py"):
        if path.parts[0] == "tests":
            found |= {f"{path}::{name}" for name in _test_names(ast.parse(text).body)}
    return found


def _test_names(body: list[ast.stmt], within: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _test_names(node.body, f"{node.name}::")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield within + node.name
