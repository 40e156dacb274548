"""What goes wrong, when and for how long: a plan that follows from a seed alone. Pure.

Faults overlap, of one kind or of several. Two rules keep the storm one that a cloud can promise to survive with its
clients served: of three etcd members or controllers at most one is in trouble at a time, but for short spells in which
a quorum, or every controller but one, is gone. Everything heals at the end.
"""

import dataclasses
import random
from collections.abc import Sequence

SPELL_S = 7.0  # how long a quorum may be lost


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One trouble of one or more hosts. `peer`: the other end of a link, "" for all of them."""

    at_s: float
    for_s: float
    kind: str
    targets: tuple[str, ...]
    peer: str = ""
    amount: float = 0.0

    @property
    def until_s(self) -> float:
        return self.at_s + self.for_s

    def __str__(self) -> str:
        where = "+".join(self.targets) + (f" → {self.peer}" if self.peer else "")
        amount = f" {self.amount:g}" if self.amount else ""
        return f"{self.at_s:6.1f} s  {self.kind}{amount} {where} for {self.for_s:.1f} s"


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    members: tuple[str, ...]
    controllers: tuple[str, ...]
    agents: tuple[str, ...]
    balancers: tuple[str, ...] = ()

    def quorum(self) -> int:
        return len(self.members) // 2 + 1


PROCESS = ("kill -9", "SIGSTOP", "SIGTERM")
LINK = ("isolate", "cut", "one-way cut", "loss", "slow")
_SHARES = (("agent", 4), ("controller", 4), ("member", 3), ("balancer", 2), ("quorum", 1), ("controllers", 1))


def plan(seed: int, seconds: float, hosts: Hosts, *, gap_s: float = 4.0) -> list[Fault]:
    """Faults from a little after the start to a little before the end, in order."""
    chance = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    at_s = 5.0
    while (at_s := at_s + chance.expovariate(1 / gap_s)) < seconds - 10:
        fault = _draw(chance, at_s, hosts)
        if fault is not None and fault.until_s < seconds - 3 and _bearable(fault, faults, hosts):
            faults.append(fault)
    return faults


def _draw(chance: random.Random, at_s: float, hosts: Hosts) -> Fault | None:
    whom = chance.choices([name for name, _ in _SHARES], [share for _, share in _SHARES])[0]
    at_s = round(at_s, 2)
    if whom == "quorum":
        victims = tuple(chance.sample(hosts.members, hosts.quorum()))
        return Fault(at_s, round(chance.uniform(2, SPELL_S), 1), chance.choice(("kill -9", "SIGSTOP")), victims)
    if whom == "controllers":
        victims = tuple(chance.sample(hosts.controllers, len(hosts.controllers) - 1))
        return Fault(at_s, round(chance.uniform(2, SPELL_S), 1), chance.choice(PROCESS), victims)
    group = {
        "agent": hosts.agents,
        "controller": hosts.controllers,
        "member": hosts.members,
        "balancer": hosts.balancers,
    }[whom]
    if not group:
        return None
    target = chance.choice(group)
    if whom == "balancer":
        return Fault(at_s, round(chance.uniform(1, 5), 1), chance.choice(PROCESS), (target,))
    if chance.random() < 0.55:
        return _of_process(chance, at_s, whom, target)
    return _of_link(chance, at_s, target, hosts)


def _of_process(chance: random.Random, at_s: float, whom: str, target: str) -> Fault:
    kind = chance.choice(PROCESS)
    long = whom == "agent" and chance.random() < 0.25  # longer than a lease: the node is lost and comes back
    for_s = chance.uniform(32, 48) if long else chance.uniform(0.5, 12)
    return Fault(at_s, round(for_s, 1), kind, (target,))


def _of_link(chance: random.Random, at_s: float, target: str, hosts: Hosts) -> Fault:
    kind = chance.choice(LINK)
    for_s = round(chance.uniform(3, 15), 1)
    if kind == "isolate":
        return Fault(at_s, for_s, kind, (target,))
    others = [name for name in (*hosts.members, *hosts.controllers, *hosts.agents) if name != target]
    amount = {"loss": chance.uniform(5, 30), "slow": chance.uniform(0.02, 0.25)}.get(kind, 0.0)
    if target in hosts.agents:
        others = list(hosts.controllers)
    return Fault(at_s, for_s, kind, (target,), chance.choice(others), round(amount, 3))


def _bearable(fault: Fault, earlier: Sequence[Fault], hosts: Hosts) -> bool:
    """Nobody suffers twice at once, and no quorum is lost by two troubles that meet; a spell comes alone."""
    meanwhile = [one for one in earlier if one.until_s + 3 > fault.at_s]
    if any(set(_struck(one)) & set(_struck(fault)) for one in meanwhile):
        return False
    for group in (hosts.members, hosts.controllers):
        hurt = [name for one in (*meanwhile, fault) for name in _struck(one) if name in group]
        spell = len([name for name in fault.targets if name in group]) > 1
        if len(hurt) > 1 and not (spell and len(hurt) == len(fault.targets)):
            return False
    return len(meanwhile) < 4


def _struck(fault: Fault) -> tuple[str, ...]:
    return (*fault.targets, fault.peer) if fault.peer else fault.targets
