"""The `covey` command: verb groups put together, and every error turned into one line.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted. Command modules import what they need inside
the commands, so that `covey --help` is quick.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer import exceptions

import covey
from covey import errors
from covey.cli import dump, etcd, join, logs, nodes, out, registry, servers, status, templates, upgrade, vms

app = typer.Typer(
    name="covey",
    help="Virtual machines on demand from a fleet of your own hosts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.say(f"covey {covey.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


servers.add(app)
join.add(app)
status.add(app)
dump.add(app)
logs.add(vms.app)
app.add_typer(vms.app, name="vm")
app.add_typer(templates.app, name="template")
app.add_typer(nodes.app, name="node")
app.add_typer(upgrade.app, name="upgrade")
app.add_typer(registry.app, name="registry")
app.add_typer(etcd.app, name="etcd")


def main(argv: list[str] | None = None) -> None:
    """Run one command and end the process with its exit code."""
    code = run(sys.argv[1:] if argv is None else argv)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command; its exit code."""
    try:
        result: Any = app(argv, prog_name="covey", standalone_mode=False)
        sys.stdout.flush()
    except exceptions.TyperException as error:  # wrong usage
        if type(error).__name__ != "NoArgsIsHelpError":
            out.error(f"{error.format_message()} (covey … --help shows how)")
        else:
            out.note(error.format_message())
        return error.exit_code
    except errors.RemoteError as error:
        hint = "" if error.status else "; is it running? Name another with --controller or --registry"
        out.error(f"{error}{hint}")
        return 1
    except errors.CoveyError as error:
        out.error(str(error))
        return 1
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
        out.error(f"{error.object!r} is not UTF-8 text, as names, tags and other words have to be")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        out.error("interrupted")
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        out.error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    return result if isinstance(result, int) else 0
