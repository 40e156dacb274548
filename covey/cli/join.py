"""`covey join` and `covey leave`."""

import typer


def add(app: typer.Typer) -> None:
    pass
