"""Draws the pages of docs/reference/ from the code: `make docs`; with --check it only says which ones are stale.

A page is a function without arguments that returns its text. Nothing in it depends on the machine or the time of day.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
import typer.core
import typer.main

from covey import lifecycle, model, settings_table
from covey.cli import main as cli
from covey.store import schema
from scripts import api_page

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
Command = typer.core.TyperGroup | typer.core.TyperCommand
DRAWN = "<!-- Drawn by scripts/gen_docs.py from {source}; edit that, then run `make docs`. -->\n"


def lifecycle_page() -> str:
    return "\n".join(
        [
            DRAWN.format(source="covey/lifecycle.py"),
            "# The life-cycle of an instance",
            "",
            "Every change of an instance's state is one cell of one table. An event that has no place in a row has no",
            "effect: a `booted` that arrives after a `terminate` changes nothing. Two facts refine some cells: whether",
            "this epoch was *launched* (it may have run guest code, so it is never placed again) and whether a node",
            "holds a *claim* for it (if none does, nobody will ever say `gone`).",
            "",
            *_diagram(),
            "",
            "## Cell by cell",
            "",
            "| state | event | when | becomes |",
            "|---|---|---|---|",
            *(
                f"| {state} | `{event}` | {fact} | {_outcome(target)} |"
                for state, event, fact, target in lifecycle.ROWS
            ),
            "",
        ]
    )


def _outcome(target: model.State | str) -> str:
    words = {
        "keep": "(stays)",
        "re-place": "(stays, waits for a node again)",
        "remove": "(the record is removed)",
        lifecycle.BEFORE: "the state it was in before the push",
    }
    return f"**{target}**" if isinstance(target, model.State) else words[target]


def _diagram() -> list[str]:
    """A mermaid state diagram with one arrow for each pair of states, its events in the order of the table."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for state, event, fact, target in lifecycle.ROWS:
        label = f"{event} ({fact})" if fact else str(event)
        for end in _ends(state, target):
            arrows.setdefault((state, end), []).append(label)
    lines = [
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> Scheduling: accepted",
        "    [*] --> Pulling: accepted and placed",
    ]
    lines += [f"    {start} --> {end}: {', '.join(labels)}" for (start, end), labels in arrows.items()]
    return [*lines, "```"]


def _ends(state: model.State, target: model.State | str) -> list[str]:
    if isinstance(target, model.State):
        return [target]
    if target == lifecycle.BEFORE:
        return [model.State.STARTED, model.State.STOPPED]
    return ["[*]"] if target == "remove" else [state] if target == "re-place" else []


def keys_page() -> str:
    drawing = inspect.getdoc(schema) or ""
    title, _, rest = drawing.partition("\n\n")
    tree, _, notes = rest.partition("\n\n")
    nouns = [
        (schema.INSTANCES, model.Instance),
        (schema.NODES, model.Node),
        (schema.SESSIONS, model.Session),
        (schema.WORDS, model.Word),
        (schema.LEDGERS, model.Ledger),
        (schema.ORDERS, model.Order),
        (schema.ASKS, model.Question),
        (schema.ANSWERS, schema.Answer),
        (schema.BORN, schema.Born),
        (schema.KEYS, schema.Remembered),
        (schema.CONTROLLERS, schema.Controller),
        (schema.EVENTS, schema.Event),
        (schema.BACKUP, schema.Backup),
    ]
    lines = [
        DRAWN.format(source="covey/store/schema.py"),
        f"# The key tree, format {schema.FORMAT}",
        "",
        title,
        "",
        "```",
        inspect.cleandoc(tree),
        "```",
        "",
        notes.replace("\n", " "),
        "",
        "## Fields of the values",
        "",
        "Values are JSON; a field that has its default is left out. Fields are only ever added.",
        "",
    ]
    for prefix, noun in nouns:
        lines += [f"### `{prefix}…`: {noun.__name__}", "", (inspect.getdoc(noun) or "").replace("\n", " "), ""]
        lines += ["`" + "`, `".join(noun.__struct_fields__) + "`", ""]
    return "\n".join(lines)


def settings_page() -> str:
    lines = [
        DRAWN.format(source="covey/settings_table.py"),
        "# Settings",
        "",
        "A flag wins over the environment, the environment over the file, the file over the default.",
        "",
        "* `COVEY_X` and `ANKA_X` mean the same; `COVEY_X` wins. An empty variable is an unset one.",
        "* The file is `/etc/covey/covey.toml`, or what `COVEY_CONFIG` names. Keys are the names below in lower case;",
        "  what stands below `[controller]`, `[registry]`, `[agent]` or `[standalone]` is for that program alone.",
        "* Durations are written as Go writes them: `30s`, `2m`, `1m30s`. Lists are separated by commas.",
        "* A setting whose feature does not exist yet stops the start with one sentence, unless it has its default:",
        "  nobody shall believe in a protection that is not there.",
    ]
    for part in settings_table.Part:
        rows = [row for row in settings_table.TABLE if part in row.parts]
        lines += ["", f"## {_TITLES[part]}", "", "| name | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{row.name}` | {row.kind} | {_default(row)} | {_meaning(row)} |" for row in rows]
    return "\n".join([*lines, ""])


_TITLES = {
    settings_table.Part.CONTROLLER: "`covey controller`",
    settings_table.Part.REGISTRY: "`covey registry`",
    settings_table.Part.AGENT: "`covey agent` and `covey join`",
    settings_table.Part.STANDALONE: "`covey standalone` and `covey up`",
    settings_table.Part.ETCD: "`covey etcd`",
    settings_table.Part.CLIENT: "All other commands",
}


def _default(row: settings_table.Setting) -> str:
    return f"`{row.default}`" if row.default else "–"


def _meaning(row: settings_table.Setting) -> str:
    text = row.doc
    if row.aliases:
        text += " Also: " + ", ".join(f"`{alias}`" for alias in row.aliases) + "."
    if row.unbuilt:
        text += f" **Stops the start:** {row.unbuilt}."
    if row.without_effect:
        text += f" Without effect: {row.without_effect}."
    return text.replace("|", "\\|")


def cli_page() -> str:
    """Every command's own help text, at a fixed width."""
    root = typer.main.get_group(cli.app)
    lines = [
        DRAWN.format(source="covey/cli/"),
        "# The command line",
        "",
        "Every command takes `--controller URL[,URL…]` or `--registry URL[,URL…]` where it talks to one, and `--json`",
        "where it prints something. Exit status: 0 done, 1 refused or failed, 2 wrong usage.",
    ]
    for path, command in _commands("covey", root):
        context = typer.Context(command, info_name=path, terminal_width=96, help_option_names=["-h", "--help"])
        lines += ["", f"## `{path}`", "", "```", command.get_help(context).rstrip(), "```"]
    return "\n".join([*lines, ""])


def _commands(path: str, command: Command) -> Iterator[tuple[str, Command]]:
    yield path, command
    if isinstance(command, typer.core.TyperGroup):
        for name, sub in command.commands.items():
            assert isinstance(sub, typer.core.TyperGroup | typer.core.TyperCommand)
            yield from _commands(f"{path} {name}", sub)


def http_page() -> str:
    return DRAWN.format(source="scripts/api_page.py and the structs it names") + "\n" + api_page.page()


PAGES: dict[str, Callable[[], str]] = {
    "lifecycle.md": lifecycle_page,
    "keys.md": keys_page,
    "settings.md": settings_page,
    "cli.md": cli_page,
    "api.md": http_page,
}
BY_HAND = {"oci.md"}  # kept honest by tests/tidy/test_docs.py


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw docs/reference/ from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    options = parser.parse_args()
    wanted = {name: page() for name, page in PAGES.items()}
    stale = [name for name, text in wanted.items() if _read(REFERENCE / name) != text]
    unknown = [path.name for path in REFERENCE.glob("*.md") if path.name not in {*wanted, *BY_HAND}]
    if options.check:
        for name in stale:
            print(f"docs/reference/{name} is stale: run `make docs`")
        for name in unknown:
            print(f"docs/reference/{name} is drawn by nothing: remove it")
        return 1 if stale or unknown else 0
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (REFERENCE / name).write_text(wanted[name])
        print(f"docs/reference/{name} drawn")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
