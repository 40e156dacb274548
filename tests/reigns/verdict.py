"""What must hold at the end of a history, of logs and of what clients were told."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from covey import model
from covey.registry import views

Logs = Mapping[str, Sequence[bytes]]


class Wrong(AssertionError):
    """The history shows something that must never be."""


@dataclass
class Done:
    """An acknowledged change of a tag: `digest` "" is a delete. Each tag is changed by one client."""

    repository: str
    tag: str
    digest: str
    number: int | None = None
    began_s: float = 0.0  # when it was asked for


@dataclass
class Step:
    """An acknowledged change of a template that one client alone changes, one step after the other. `tag` of a revert:
    its request id; `number` then is the version that it begins with."""

    kind: str
    tag: str
    digest: str
    number: int | None


def in_order(final: Sequence[bytes], steps: Sequence[Step]) -> None:
    """All steps are in the log, in their order. Raises Wrong."""
    entries = [msgspec.json.decode(raw, type=views.Entry) for raw in final]
    left = [
        (entry.kind, entry.request or entry.tag, entry.digest, entry.version)
        for entry in entries
        if entry.kind in (views.Kind.PUSH, views.Kind.REVERT)
    ]
    told = list(left)
    for step in steps:
        wanted = step.kind, step.tag, step.digest, step.number
        while left and left[0] != wanted:
            left.pop(0)
        if not left:
            raise Wrong(f"{step} was acknowledged and is not in its place: {told}")


def judge(
    final: Logs,
    aside: Mapping[str, Logs],
    done: Sequence[Done],
    *,
    with_etcd: bool,
    forced: bool,
    sure_s: float = math.inf,
) -> None:
    """`final`: the logs that all servers have in the end; `aside`: what each has set aside. `sure_s`: what was asked
    for later than that is in the logs, whatever was done by force before. Raises Wrong."""
    for url, logs in aside.items():
        count = sum(len(found) for found in logs.values())
        if with_etcd and count and not forced:
            raise Wrong(f"{url} has set {count} entries aside, which somebody may have seen")
    for repository in sorted({one.repository for one in done}):
        mine = [one for one in done if one.repository == repository]
        entries = [msgspec.json.decode(raw, type=views.Entry) for raw in final.get(repository, [])]
        kept = [
            msgspec.json.decode(raw, type=views.Entry) for logs in aside.values() for raw in logs.get(repository, [])
        ]
        sure = [one for one in mine if not forced or one.began_s > sure_s]
        _numbers(repository, entries, sure)
        for tag in sorted({one.tag for one in mine}):
            lying = {entry.digest for entry in kept if entry.tag == tag}
            _acknowledged(tag, entries, [one for one in mine if one.tag == tag], lying, forced=forced)
            _acknowledged(tag, entries, [one for one in sure if one.tag == tag], lying, forced=False)


def _numbers(repository: str, entries: Sequence[views.Entry], done: Sequence[Done]) -> None:
    given = [entry.version for entry in entries if entry.version >= 0]
    if given != list(range(len(given))):
        raise Wrong(f"{repository}: version numbers {given}")
    told: dict[int, str] = {}
    for one in done:
        if one.number is not None and told.setdefault(one.number, one.digest) != one.digest:
            raise Wrong(f"{repository}: version {one.number} was given twice")


def _acknowledged(
    tag: str, entries: Sequence[views.Entry], done: Sequence[Done], kept: set[model.Digest], *, forced: bool
) -> None:
    """What was acknowledged of a tag is in the log, in the order in which it was; or it lies aside, where
    somebody used force."""
    changes = [_change(entry) for entry in entries if entry.tag == tag]
    left = list(changes)
    for one in done:
        wanted = one.digest, -1 if one.number is None else one.number
        while left and left[0] != wanted:
            left.pop(0)
        if left:
            continue
        if not forced or (one.digest not in kept and wanted not in changes):
            raise Wrong(f"{tag} {one.digest} {one.number} was acknowledged and is not there: {changes}")
        left = list(changes)


def _change(entry: views.Entry) -> tuple[str, int]:
    return (entry.digest if entry.kind != views.Kind.DELETE else "", entry.version)
