"""Options: those that many commands share, and those that programs have because they have settings.

A program's options are made from the settings table, so that every setting is also a flag and none is declared twice.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covey import settings_table

if TYPE_CHECKING:
    from covey.client import controller as controller_client

Flags = Mapping[str, object]
Part = settings_table.Part
Kind = settings_table.Kind

Controller = Annotated[
    str | None,
    typer.Option(
        "--controller",
        metavar="URL[,URL…]",
        help="The cloud's controllers [COVEY_CONTROLLER; http://127.0.0.1:8090]",
    ),
]
Registry = Annotated[
    str | None,
    typer.Option(
        "--registry", metavar="URL[,URL…]", help="The cloud's registries [COVEY_REGISTRY; http://127.0.0.1:8089]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def connect(controllers: str | None) -> "controller_client.Controller":
    """A client of the controllers named on the command line or in the environment."""
    from covey import settings, world
    from covey.client import controller as controller_client

    chosen = settings.client(os.environ, {"CONTROLLER": controllers})
    return controller_client.Controller(chosen.controllers, world.System(), ca_cert=chosen.ca_cert)


def trusted() -> Path | None:
    """Authorities that are believed beside the system's own."""
    from covey import settings

    return settings.client(os.environ).ca_cert


def of(part: Part, *, without: frozenset[str] = frozenset()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `(flags: Mapping[str, object], …)` one option for each setting of `part` that is built.

    `without` leaves out names that the command takes in another way.
    """
    rows = {
        row.name.lower(): row
        for row in settings_table.TABLE
        if part in row.parts and not row.unbuilt and not row.without_effect and row.name not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
        names = {p.name for p in own}

        @functools.wraps(command)
        def run(**given: object) -> None:
            chosen = {rows[name].name: value for name, value in given.items() if name not in names}
            command(flags=chosen, **{name: value for name, value in given.items() if name in names})

        made = [_parameter(row) for row in rows.values()]
        run.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *made)} | {"return": None}
        return run

    return decorate


_METAVARS = {
    Kind.TEXT: "TEXT",
    Kind.NUMBER: "N",
    Kind.DURATION: "TIME",
    Kind.LIST: "A[,B…]",
    Kind.ADDRESS: "HOST:PORT",
    Kind.URLS: "URL[,URL…]",
    Kind.PATH: "PATH",
}


def environment(flags: Flags) -> dict[str, str]:
    """The same settings as variables, for programs started from here."""
    return {
        f"COVEY_{name}": str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in flags.items()
        if value is not None
    }


def _parameter(row: settings_table.Setting) -> inspect.Parameter:
    option = "--" + row.name.lower().replace("_", "-")
    text = f"{row.doc} [COVEY_{row.name}{'; ' + row.default if row.default else ''}]"
    kind: Any = bool if row.kind is Kind.SWITCH else str
    metavar = _METAVARS.get(row.kind)
    return inspect.Parameter(
        row.name.lower(),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(option, help=text, metavar=metavar, show_default=False)],
    )
