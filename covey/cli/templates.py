"""`covey template …`: push, pull and look at VM templates."""

import typer

app = typer.Typer(help="Templates: what instances are started from.", no_args_is_help=True)
