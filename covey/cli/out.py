"""What commands print: tables and progress for people, JSON for programs, one line for an error.

Results go to stdout, everything else to stderr. Colours and progress bars appear on terminals only.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from covey import errors


def say(text: str) -> None:
    """One line for people, at once even when stdout is a pipe."""
    print(text, flush=True)


def note(text: str) -> None:
    """One line beside the result."""
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """The one line that a failed command ends with."""
    note(f"covey: {' '.join(text.split())}")


def as_json(value: object) -> None:
    """The result for programs. Structs are written with every field that is not its default."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode(), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; a blank cell is shown as a dash, so that lines can be cut by columns."""
    shown = [[cell or "-" for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _plain(columns, shown)
        return
    from rich import box
    from rich import console as rich_console
    from rich import table as rich_table

    drawn = rich_table.Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in shown:
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    rich_console.Console().print(drawn)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    for row in [[column.upper() for column in columns], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """One thing, field by field; empty fields are left out."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        if value:
            print(f"{name.ljust(width)}  {value}")


class Bar(Protocol):
    """A progress bar: `done` of `total`, with a word on what happens now."""

    def __call__(self, done: float, total: float, text: str = "") -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Bar]:
    """A bar on terminals; elsewhere nothing, the lines around it tell enough."""
    if not sys.stderr.isatty():
        yield lambda done, total, text="": None
        return
    from rich import console as rich_console
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
        rich_progress.TimeElapsedColumn(),
    )
    console = rich_console.Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(title, total=None, text="")

        def show(done: float, total: float, text: str = "") -> None:
            bars.update(bar, completed=done, total=total or None, text=text)

        yield show


class Transfers(Protocol):
    """Several things that move at once: what moves, bytes that are done, bytes in all."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextmanager
def transfers() -> Iterator[Transfers]:
    """A bar with speed and time left for each thing that moves, on terminals."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich import console as rich_console
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    console = rich_console.Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, transient=True) as bars:
        known: dict[str, rich_progress.TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield show


def read(option: str, file: Path, limit_bytes: int) -> bytes:
    """The content of a file named by an option; never more than the limit, whatever the file is."""
    with file.open("rb") as stream:
        content = stream.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise errors.Refused(f"{option} {file} has more than {limit_bytes} bytes; at most {limit_bytes} are taken")
    return content


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
