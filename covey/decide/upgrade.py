"""When the store's format may be raised: pure (safety S27).

A program writes the store in the format that the store has, as long as it knows that one. A newer program knows an
older format too, so programs of two versions serve one store side by side, and either may be taken back. Raising the
format ends that: who does not know the new one can write nothing any more. So it is an act of its own, done by the
operator once nobody is left who would be shut out, and the way back from it is a backup.

Agents never see the store. Whatever their version, they do not stand in the way.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Program(NamedTuple):
    """A controller that is there. `format`: the newest that it writes."""

    id: str
    url: str
    version: str
    format: int

    @property
    def name(self) -> str:
        return f"controller {self.url or self.id} ({f'{self.id}, ' if self.url else ''}version {self.version})"


class Verdict(NamedTuple):
    """`target`: the newest format that any controller knows. `blockers`: what must be done before, each with its
    remedy. `notes`: what is worth knowing."""

    format: int
    target: int
    blockers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def may_finish(self) -> bool:
        return self.target > self.format and not self.blockers


def verdict(
    format: int, controllers: Sequence[Program], agents: Iterable[str], unsettled: str = "", target: int = 0
) -> Verdict:
    """May the store's `format` be raised? `agents`: the version of each. `unsettled`: why the store is not settled
    since a restore. `target` 0: to the newest that any controller knows."""
    target = target or max((one.format for one in controllers), default=format)
    blockers: list[str] = []
    if target > format:
        blockers += _blockers(target, sorted(controllers), unsettled)
    return Verdict(format, target, tuple(blockers), tuple(_notes(format, target, controllers, agents)))


def _blockers(target: int, controllers: Sequence[Program], unsettled: str) -> Iterable[str]:
    if not controllers:
        yield "no controller is listed as live: wait until one is"
    for one in controllers:
        if one.format < target:
            yield f"{one.name} writes format {one.format} at most: upgrade it, or stop it"
    if unsettled:
        yield f"{unsettled}: wait until that is settled"


def _notes(format: int, target: int, controllers: Sequence[Program], agents: Iterable[str]) -> Iterable[str]:
    if target <= format:
        yield f"the store has format {format}, the newest that any controller here knows: nothing is to be raised"
    versions = sorted({one.version for one in controllers})
    if len(versions) > 1:
        yield f"an upgrade of the controllers is under way: {_counted(one.version for one in controllers)}"
    yield f"agents: {_counted(agents)} (any version may stay)"


def _counted(versions: Iterable[str]) -> str:
    counts = Counter(version or "unknown" for version in versions)
    return ", ".join(f"{count} of version {version}" for version, count in sorted(counts.items())) or "none"
