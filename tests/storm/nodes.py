"""What the nodes really ran, by their own disks and not by any controller's word.

A synthetic node keeps below its directory a journal of guests' starts and ends, the VMs that are there, and a tombstone
for each order to destroy that it obeyed, with who gave it and why.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A line of a journal."""

    node: str
    instance: str
    epoch: int
    what: str  # start, stop, destroy
    at_ns: int


@dataclasses.dataclass
class Ran:
    """All nodes together."""

    entries: list[Entry] = dataclasses.field(default_factory=list)
    bodies: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (node, VM's directory) of what is there
    orders: dict[str, str] = dataclasses.field(default_factory=dict)  # instance → who and why

    def starts(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.what == "start":
                found[entry.instance].append(entry)
        return found

    def doubled(self) -> list[list[Entry]]:
        """Instances whose guest was started more than once: nothing here is ever stopped and started again."""
        return [starts for starts in self.starts().values() if len(starts) > 1]

    def killed_by_mistake(self, asked_ns: dict[str, int]) -> list[str]:
        """Guests that ended before anybody asked for it, or without an order that says who and why."""
        found = []
        for entry in self.entries:
            if entry.what == "start":
                continue
            if entry.at_ns < asked_ns.get(entry.instance, entry.at_ns + 1):
                found.append(f"{entry.what} of {entry.instance} on {entry.node}: nobody had asked for it")
            elif not self.orders.get(entry.instance):
                found.append(f"{entry.what} of {entry.instance} on {entry.node}: there is no order")
        return found

    def leaked(self, known: Iterable[str]) -> list[str]:
        """VMs that are still there, guests that never ended, guests of no instance."""
        ended = {(entry.node, entry.instance, entry.epoch) for entry in self.entries if entry.what == "destroy"}
        found = [f"{directory} is still on {node}" for node, directory in self.bodies]
        found += [
            f"{entry.instance} on {entry.node} was started and never destroyed"
            for entry in self.entries
            if entry.what == "start" and (entry.node, entry.instance, entry.epoch) not in ended
        ]
        everybody = set(known)
        return [*found, *(f"{id} ran and nobody had asked for it" for id in self.starts() if id not in everybody)]


def read(folders: Iterable[Path]) -> Ran:
    """Of every node whose directory lies somewhere below these folders."""
    ran = Ran()
    for folder in folders:
        for vms in folder.glob("**/node-*/vms"):
            node = f"{folder.name}/{vms.parent.name}"
            journal = vms / "journal.log"
            for line in journal.read_text().splitlines() if journal.exists() else ():
                instance, epoch, what, at_ns = line.split()
                ran.entries.append(Entry(node, instance, int(epoch), what, int(at_ns)))
            ran.bodies += [(node, path.parent.name) for path in vms.glob("*/vm.json")]
            for path in vms.parent.glob("tombstones/*.json"):
                decision = json.loads(path.read_text())["decision"]
                ran.orders[path.stem] = f"{decision['who']}: {decision['why']}" if decision["why"] else ""
    return ran
