"""The page of the HTTP API: routes as the code declares them, fields as the structs have them, and one sentence each.

What a route is for is written here; that no route lacks its sentence and no sentence its route is checked while the
page is drawn, so it is checked by CI.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from covey.client import oci
from covey.controller import (
    api_events,
    api_explain,
    api_log,
    api_node,
    api_status,
    api_upgrade,
    api_vm,
    start_request,
    views,
)
from covey.decide import troubles

ROOT = Path(__file__).resolve().parent.parent
Struct = type[msgspec.Struct]


class Entry(NamedTuple):
    """One route. `takes` is its body, `gives` the envelope's body (None: a bare OK)."""

    about: str
    takes: Struct | None = None
    gives: Struct | None = None


CONTROLLER = {
    ("GET", "/livez"): Entry("The process serves. Says nothing of the store."),
    ("GET", "/readyz"): Entry(
        "The controller can do its work now, computed when asked; else 503.", None, api_status.Ready
    ),
    ("GET", "/api/v1/status"): Entry("How the cloud is, seen from here.", None, api_status.Status),
    ("GET", "/api/v1/health"): Entry(
        "The cloud at a glance, and for each trouble one sentence and one remedy "
        "(see [health](../operate/health.md)). Answers also while the controller is red, with what it knew last.",
        None,
        troubles.Health,
    ),
    ("GET", "/api/v1/settings"): Entry("What this controller goes by, without secrets. Answers also while it is red."),
    ("GET", "/api/v1/events"): Entry(
        "The newest events of the last seven days, oldest first: what was decided, about which instance or node, by "
        "whom and why. At most `?limit=` (500, up to 1000).",
        None,
        api_events.Event,
    ),
    ("GET", "/api/v1/upgrade"): Entry(
        "May the format of the store be raised, and what blocks it (see [upgrades](../operate/upgrade.md)).",
        None,
        api_upgrade.Upgrade,
    ),
    ("POST", "/api/v1/upgrade"): Entry(
        "Raise the format of the store, once every live controller knows it. Fails with what blocks it.",
        api_upgrade.Finish,
        api_upgrade.Upgrade,
    ),
    ("POST", "/api/v1/vm"): Entry(
        "Start `count` instances, all or none; gives a list of their ids. With the header `Idempotency-Key`, or with "
        "`external_id` and `name`, a repeat gets the first answer.",
        start_request.StartRequest,
    ),
    ("GET", "/api/v1/vm"): Entry(
        "All instances, as a list of wrappers with the instance in `vm`; with `?id=` the instance itself. "
        "`?state=` (one or several, separated by commas), `?template=` (id, or the name it had), `?group=` and "
        "`?external_id=` show only those that all of them let through. With `?limit=` (1 to 1000) at most so many, "
        "oldest first; when more follow, the header `Covey-Cursor` says where: ask again with `&cursor=` and the same "
        "filters. An instance that exists all the while is on exactly one page.",
        None,
        views.Instance,
    ),
    ("GET", "/api/v1/vm/explain"): Entry(
        "Why the instance `?id=` stands where it stands: its place in the queue, who before it may want the same "
        "nodes, and the verdict of each node with its numbers (see [why an instance waits](../operate/waiting.md)).",
        None,
        api_explain.Explanation,
    ),
    ("GET", "/api/v1/vm/log"): Entry(
        "A part of what the start script of the instance `?id=` wrote: of `&stream=` (stdout or stderr) at most "
        "`&limit=` bytes (262,144) from `&offset=` on (0; negative: from the end). Read from the node, which keeps the "
        "last 16 MiB of each stream; fails when it does not answer. Ask for the next part from `offset` + length of "
        "`data` on, until `end`.",
        None,
        api_log.Log,
    ),
    ("PUT", "/api/v1/vm"): Entry("Change what users may attach to the instance `?id=`.", api_vm.InstanceUpdate),
    ("DELETE", "/api/v1/vm"): Entry("Terminate. Harmless when repeated.", api_vm.Terminate),
    ("GET", "/api/v1/node"): Entry(
        "A list of all nodes; with `?id=` a list of that one. `?state=` and `?group=` filter, `?limit=` and `&cursor=` "
        "page as they do for instances.",
        None,
        views.Node,
    ),
    ("POST", "/api/v1/node/config"): Entry("Configure a node; what is left out stays.", api_node.NodeConfig),
    ("DELETE", "/api/v1/node"): Entry(
        "Remove a node: its instances go to Error, and what it runs is destroyed should it come back.",
        api_node.NodeRemoval,
    ),
    ("POST", "/api/v1/node/release"): Entry(
        "After a restore of the store: give up waiting for a node's word on what it runs. OK when repeated.",
        api_node.NodeRelease,
    ),
    ("GET", "/api/v1/group"): Entry("The groups of nodes. Making them is not built yet.", None, views.Group),
    ("GET", "/api/v1/registry/vm"): Entry("The registry's templates; with `?id=` one with its versions."),
    ("DELETE", "/api/v1/registry/vm"): Entry("Delete the template `?id=` with all its versions. OK when repeated."),
    ("DELETE", "/api/v1/registry/revert"): Entry(
        "Take back one version of the template `?id=` and all newer ones; `&tag=` or `&version=`, also in a JSON body, "
        "neither: the newest. With the header `Idempotency-Key` a repeat takes back no further one.",
        oci.RevertAsk,
    ),
    ("GET", "/api/v1/registry/disk"): Entry("Room on the registry's disk, in bytes.", None, oci.DiskView),
}

REGISTRY = {
    ("GET", "/livez"): Entry("The process serves."),
    ("GET", "/readyz"): Entry("The registry can serve from its storage now; else 503. Says so when the disk is full."),
    ("GET", "/registry/status"): Entry("Version, room on the disk, what is wrong."),
    ("GET", "/registry/vm"): Entry("Templates as a list of `{id: name}`; with `?id=` one with its versions."),
    ("GET", "/registry/v2/vm"): Entry(
        "Templates as a list of objects; with `?id=` one with its versions.", None, oci.TemplateItem
    ),
    ("POST", "/registry/v2/vm"): Entry(
        "The id that a template's name has, or a fresh one, which the name holds from then on.",
        oci.NameAsk,
        oci.NameHeld,
    ),
    ("PUT", "/registry/vm/arch"): Entry(
        "Say which processors the versions of a template are for, when their manifests are wrong. A later push says "
        "its own.",
        oci.ArchSet,
    ),
    ("DELETE", "/registry/vm"): Entry("Delete the template `?id=` with all its versions. OK when repeated."),
    ("DELETE", "/registry/revert"): Entry(
        "Take back one version of the template `?id=` and all newer ones; `&tag=` or `&version=` (or `&number=`), also "
        "in a JSON body, neither: the newest. With the header `Idempotency-Key` a repeat takes back no further one.",
        oci.RevertAsk,
    ),
    ("GET", "/registry/vm/info"): Entry(
        "One version of the template `?id=`: `&tag=`, `&version=`, or the newest.", None, oci.Resolved
    ),
    ("GET", "/registry/disk"): Entry("Room on the disk, in bytes.", None, oci.DiskView),
}

INTRODUCTION = """# The HTTP API

Every answer of every path but the OCI ones is one JSON object, the *envelope*: `status` (`OK` or `FAIL`), `message`
(always a string) and, where there is one, `body`.

| HTTP status | |
|---|---|
| 200 with `OK` | done |
| 200 with `FAIL` | understood and refused; `message` says why and what to do. Nothing was changed. |
| 400, 404, 405, 413 | not understood: malformed JSON or types, no such path, no such method, too large |
| 409, 410 | to agents only: see [the agents' protocol](../agent-protocol.md) |
| 503 with `Retry-After` | no quorum, or the outcome is unsure: ask again, or ask another controller |

JSON is read whatever the `Content-Type` says. Unknown fields are ignored; a documented field that is not built yet is
refused by name. A field that is shown as `optional` is left out when it is empty."""


def page() -> str:
    lines = [INTRODUCTION]
    lines += ["", "## Controller", "", *_section("covey/controller", CONTROLLER, {"/agent/"})]
    lines += ["", "## Registry", "", *_section("covey/registry", REGISTRY, {"/v2"})]
    lines += [
        "",
        "Paths below `/v2/` are those of the OCI distribution specification 1.1, [statement by statement](oci.md).",
        "",
    ]
    return "\n".join(lines)


def _section(folder: str, entries: dict[tuple[str, str], Entry], elsewhere: set[str]) -> Iterator[str]:
    found = {route for route in _routes(ROOT / folder) if not any(route[1].startswith(path) for path in elsewhere)}
    if found != set(entries):
        raise SystemExit(f"scripts/api_page.py does not describe {folder} as it is: {sorted(found ^ set(entries))}")
    for (method, path), entry in entries.items():
        yield f"### {method} {path}"
        yield ""
        yield entry.about
        yield ""
        for title, struct in (("Body", entry.takes), ("Gives", entry.gives)):
            if struct is not None:
                yield from _fields(title, struct)


def _routes(folder: Path) -> Iterator[tuple[str, str]]:
    """Every Route("METHOD", "path", …) whose path is written out."""
    for module in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Route") and len(node.args) >= 2:
                method, path = node.args[:2]
                if isinstance(method, ast.Constant) and isinstance(path, ast.Constant):
                    yield str(method.value), str(path.value)


def _fields(title: str, struct: Struct) -> Iterator[str]:
    yield f"{title}:"
    yield ""
    yield "| field | type |"
    yield "|---|---|"
    for name, hint in inspect.get_annotations(struct).items() if len(struct.__mro__) <= 2 else _inherited(struct):
        yield f"| `{name}` | {_spelled(hint)} |"
    yield ""


def _inherited(struct: Struct) -> Iterator[tuple[str, object]]:
    hints: dict[str, object] = {}
    for base in reversed(struct.__mro__):
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            hints |= inspect.get_annotations(base)
    yield from hints.items()


def _spelled(hint: object) -> str:
    """A type as a reader of JSON would call it."""
    text = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    optional = "UnsetType" in text or "None" in text
    for noise in (" | msgspec.UnsetType", " | UnsetType", " | None", "covey.controller.views.", "covey.model."):
        text = text.replace(noise, "")
    for module in ("covey.controller.start_request.", "covey.client.oci."):
        text = text.replace(module, "")
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "bytes": "base64 text"}
    words["Any"] = "not built yet"
    text = words.get(text) or "`" + text.replace("|", "\\|") + "`"
    return f"{text}, optional" if optional and text != "not built yet" else text
