"""The books are closed: clients' history, nodes' journals and the cloud's last words are held against each other."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.storm import model, nodes
from tests.support import history

# Why an instance may end in Error here: an agent that died between launch and start never boots it afterwards (S4).
_FAIR_ERRORS = ("launched", "its guest was launched", "its guest ran before")


@dataclasses.dataclass
class Verdict:
    """Lists name what is wrong and should be empty; the rest are figures."""

    lost: list[str] = dataclasses.field(default_factory=list)
    doubled: list[str] = dataclasses.field(default_factory=list)
    leaked: list[str] = dataclasses.field(default_factory=list)
    killed: list[str] = dataclasses.field(default_factory=list)
    misread: list[str] = dataclasses.field(default_factory=list)
    instances: int = 0
    creates: int = 0
    ends: int = 0
    figures: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        found = [*self.lost, *self.doubled, *self.leaked, *self.killed, *self.misread]
        if self.creates != self.ends:
            found.append(f"{self.creates} instances were created and {self.ends} ended")
        return found


def close(calls: Sequence[history.Call], ran: nodes.Ran, end: dict[str, Any]) -> Verdict:
    """`end` is what the load saw when all was over."""
    verdict = Verdict()
    started = model.requests(calls)
    told = model.histories(calls, started.values())
    asked_ns = _asked_to_end(calls)
    given_up = {id: one.called_ns for one in started.values() if not one.accepted for id in one.ids}
    for request in started.values():
        if trouble := request.trouble():
            fault = verdict.doubled if len(request.ids) > request.count else verdict.lost
            fault.append(f"{request.name}: {trouble}")
    for id, ops in told.items():
        if trouble := model.judge(ops):
            verdict.misread.append(f"{id}: {trouble}")
    verdict.lost += [f"{id} is {state} for ever" for id, state in end["stuck"].items()]
    verdict.lost += _never_ran(told, ran, end["errors"], asked_ns)
    verdict.lost += [f"{id} ended in Error: {why}" for id, why in end["errors"].items() if not _is_fair(why)]
    verdict.doubled += [
        " and ".join(f"{e.node} epoch {e.epoch}" for e in starts) + f": {starts[0].instance}"
        for starts in ran.doubled()
    ]
    verdict.killed = ran.killed_by_mistake(asked_ns | given_up)
    verdict.leaked = [*ran.leaked(told), *_slots_held(end["nodes"])]
    verdict.leaked += [f"{id} cannot be ended: {state}" for id, state in end["left"].items()]
    verdict.instances = verdict.creates = len(told)
    verdict.ends = sum(_ended(ops) for ops in told.values())
    verdict.figures = _figures(calls, ran, end)
    return verdict


def _asked_to_end(calls: Sequence[history.Call]) -> dict[str, int]:
    """Instance → when somebody first asked for its end."""
    asked: dict[str, int] = {}
    for call in calls:
        if call.what == "terminate":
            id = call.request["id"]
            asked[id] = min(asked.get(id, call.called_ns), call.called_ns)
    return asked


def _never_ran(
    told: dict[str, list[model.Op]], ran: nodes.Ran, errors: dict[str, str], asked: dict[str, int]
) -> list[str]:
    starts = ran.starts()
    return [f"{id} was never started" for id in told if id not in starts and id not in errors and id not in asked]


def _is_fair(why: str) -> bool:
    return why.startswith(_FAIR_ERRORS)


def _ended(ops: Sequence[model.Op]) -> bool:
    """Whether the last that was seen of it is its end."""
    last = max((op for op in ops if op.what.verb == "look"), key=lambda op: op.returned or 0, default=None)
    return last is not None and last.what.seen in ("Terminated", model.ABSENT)


def _slots_held(told: dict[str, list[list[Any]]]) -> list[str]:
    """Nodes that still count a VM when there is none, by any controller's word; also controllers without a word."""
    held = [f"{name}: {node} holds {count} slots" for name, rows in told.items() for node, _, count, _ in rows if count]
    return [*held, *(f"{name} does not tell what nodes hold" for name, rows in told.items() if not rows)]


def _figures(calls: Sequence[history.Call], ran: nodes.Ran, end: dict[str, Any]) -> dict[str, object]:
    figures: dict[str, object] = {"guests started": sum(entry.what == "start" for entry in ran.entries)}
    figures["guests ended"] = sum(entry.what == "destroy" for entry in ran.entries)
    groups = [(what, [call for call in calls if call.what == what]) for what in ("start", "show", "list", "terminate")]
    groups.append(("through the balancer", [call for call in calls if call.via == "lb"]))
    for what, mine in groups:
        took = sorted((call.returned_ns - call.called_ns) / 1e9 for call in mine if call.returned_ns)
        if took:
            share = 100 * len(took) / len(mine)
            figures[f"{what}: answered"] = f"{len(took)} of {len(mine)} ({share:.2f} %)"
            figures[f"{what}: median, 99 %, slowest"] = (
                f"{took[len(took) // 2] * 1000:.0f} ms, {took[len(took) * 99 // 100] * 1000:.0f} ms, {took[-1]:.1f} s"
            )
    figures["longest time without any answer"] = f"{_longest_silence_s(calls):.1f} s"
    figures["ended in Error"] = len(end["errors"])
    for why, count in Counter(end["errors"].values()).most_common(5):
        figures[f"  {why[:60]}"] = count
    figures["starts refused"] = sum(call.what == "start" and call.known and "ids" not in call.answer for call in calls)
    return figures


def _longest_silence_s(calls: Sequence[history.Call]) -> float:
    times = sorted(call.returned_ns for call in calls if call.returned_ns)
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0) / 1e9


def of(folder: Path, agents: Sequence[str]) -> Verdict:
    """Of a storm's folder, also long afterwards."""
    calls = sorted(history.read(folder / "history.jsonl"), key=lambda call: call.called_ns)
    ran = nodes.read(folder / agent for agent in agents)
    return close(calls, ran, json.loads((folder / "end.json").read_text()))


def table(verdict: Verdict, faults_done: dict[str, int]) -> str:
    rows: list[tuple[str, object]] = [("instances", verdict.instances)]
    rows += [("lost", len(verdict.lost)), ("doubled", len(verdict.doubled)), ("leaked", len(verdict.leaked))]
    rows += [("killed by mistake", len(verdict.killed)), ("answers that fit no order", len(verdict.misread))]
    rows += [("created", verdict.creates), ("ended", verdict.ends), *verdict.figures.items()]
    rows += [("faults", sum(faults_done.values()))]
    rows += [(f"  {kind}", count) for kind, count in sorted(faults_done.items())]
    return "\n".join(f"{name:<46} {value!s}" for name, value in rows)
