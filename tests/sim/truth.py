"""What must always be true, judged by somebody who sees everything: promises I1–I7, rules S1–S19.

`Truth` is told of every revision of the store and of every act of every hypervisor at the instant at which it happens,
and of every answer that a client got. It knows nothing of the product's code but the nouns in the store. The first
broken promise ends the story.

    revision    I4 nobody ends what was not asked to end · I5 · S1 · S11 claims · S16 births · epochs only rise
    hypervisor  I2 one VM per instance · S1 no guest code without launch · I3 room · I4 destroyed on a decision only
    answer      I6 reads show what was true between question and answer · I7 one answer per key
    in the end  I1 all ended · I3 nothing is left · no instance waits while a slot that fits is free

When the store is restored from a backup, what it held then is true again. What came after it may be forgotten:
instances, terminates, what a key was answered with. That a VM runs may not: what was accepted and runs on a node
comes back (S19), a second VM of an instance runs only after the first one was destroyed, and nothing is destroyed
without a decision recorded in one history or the other.
"""

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from covey import model
from covey.store import base, schema
from tests.sim import clockwork
from tests.sim import node as nodes

N = TypeVar("N", bound=model.Noun)
State = model.State
Key = tuple[str, int]
_STORED = (  # what follows from the store alone
    *("instances", "nodes", "sessions", "alive", "words", "ledgers", "orders", "removed", "forgotten"),
    *("_births", "_held"),
)
_CLOSED_S = 65.0  # so long a controller tries to close the door on a start that it gave up
DELETE = 2  # a script's fail handler
OVER = (State.TERMINATING, State.TERMINATED)
LIVING = (State.SCHEDULING, State.PULLING, State.STARTED)


class Broken(AssertionError):
    """A promise was broken."""


@dataclass
class Ask:
    """One start as a client wanted it: however often it was sent, and whatever was answered."""

    count: int
    key: str = ""
    twin: bool = False
    answered: list[tuple[str, ...]] = field(default_factory=list)
    unsure_by: clockwork.Process | None = None  # the controller whose last word was "not known"; nobody asked again
    unsure_at_s: float = 0.0


class Truth:
    """`tell` writes a line of the story."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.revision = 0
        self.instances: dict[str, model.Instance] = {}
        self.nodes: dict[str, model.Node] = {}
        self.sessions: dict[str, model.Session] = {}
        self.alive: set[str] = set()
        self.words: dict[str, model.Word] = {}
        self.ledgers: dict[str, model.Ledger] = {}
        self.orders: dict[str, model.Order] = {}
        self.removed: set[str] = set()
        self.asks: dict[str, Ask] = {}
        self.accepted: set[str] = set()
        self.terminate_asked: set[str] = set()
        self.failed: set[str] = set()  # were in Error
        self.forgotten: set[str] = set()
        self.counts: Counter[str] = Counter()
        self._history: dict[str, list[tuple[int, State | None]]] = {}
        self._births: dict[str, set[str]] = {}  # ask -> instances ever made for it
        self._launched: set[tuple[str, int, str]] = set()  # (instance, epoch, node)
        self._ordered: set[tuple[str, str, int]] = set()  # (node, instance, epoch)
        self._ran: dict[str, tuple[str, int]] = {}  # instance -> where and in which epoch guest code ran
        self._held: dict[str, tuple[str, int]] = {}  # instance -> node and epoch of the slot that it says it has
        self._scripted: set[str] = set()  # instances whose start script was begun
        self._deletes: set[str] = set()  # those which asked for their VM to go when their script fails
        self._withdrawn: list[model.Instance] = []  # placements that this revision took back
        self._ended: set[str] = set()  # somebody was recorded to have decided it, in whatever history
        self.restores = 0
        self._backup: dict[str, Any] = {}
        self._lost: dict[str, bool] = {}  # instance that a restore has forgotten -> whether it had been answered OK
        self._runs: set[str] = set()  # those of them which ran, and must come back
        self._untold: set[str] = set()  # nodes that have not said since the restore what they have

    def fail(self, text: str) -> None:
        self._tell(f"BROKEN {text}")
        if not self.broken.done():
            self.broken.set_exception(Broken(text))

    # ---- every revision --------------------------------------------------------------------------------------------

    def saw(self, batch: base.Batch) -> None:
        self.revision += 1  # not the store's own, which goes back
        self._withdrawn.clear()
        for change in batch.changes:
            kind, _, id = change.key.removeprefix(schema.PREFIX).partition("/")
            match kind:
                case "instance":
                    self._saw_instance(id, change.kv)
                case "ledger":
                    _keep(self.ledgers, id, change.kv, model.Ledger)
                case "order":
                    self._saw_order(id, change.kv)
                case "node":
                    _keep(self.nodes, id, change.kv, model.Node)
                case "session":
                    _keep(self.sessions, id, change.kv, model.Session)
                case "word":
                    _keep(self.words, id, change.kv, model.Word)
                case "alive":
                    (self.alive.discard if change.kv is None else self.alive.add)(id)
                case "adopted":
                    self._untold.discard(id)
                case "removed":
                    (self.removed.discard if change.kv is None else self.removed.add)(id)
        self._check_claims()
        for instance in self._withdrawn:
            self._check_clean_up(instance)

    def _check_clean_up(self, was: model.Instance) -> None:
        """Safety S10: a node from which a placement was taken is told to clean up."""
        order = self.orders.get(f"{was.node}/{was.id}")
        if was.node not in self.removed and (order is None or order.epoch < was.epoch):
            self.fail(f"S10: {was.id} was taken from {was.node} in epoch {was.epoch}, which is not told to clean up")

    def _check_claims(self) -> None:
        """Safety S11, S13: an instance that says it holds a slot holds one, at every single revision."""
        for id, (node, epoch) in self._held.items():
            ledger = self.ledgers.get(node)
            if ledger is None or all((claim.instance, claim.epoch) != (id, epoch) for claim in ledger.claims):
                self.fail(f"S11: {id} in epoch {epoch} lost its claim on {node}")

    def _saw_instance(self, id: str, kv: base.Kv | None) -> None:
        before = self.instances.pop(id, None)
        self._held.pop(id, None)
        if kv is None:
            if before is None or before.state != State.TERMINATED:
                self.fail(f"I1: {id} was forgotten before it was over")
            self.forgotten.add(id)
            self._ended.add(id)
            self._history[id].append((self.revision, None))
            return
        now = self.instances[id] = msgspec.json.decode(kv.value, type=model.Instance)
        self._history.setdefault(id, []).append((self.revision, now.state))
        if now.ended is not None:
            self._ended.add(id)
        if now.claimed:
            self._held[id] = (now.node, now.epoch)
        if now.launch is not None:
            self._launched.add((id, now.launch.epoch, now.launch.node))
        self._check_session(now, before)
        if before is None and id in self._lost:
            self._saw_return(id)
        elif before is None:
            self._saw_birth(id, now)
        else:
            self._check_step(id, before, now)
        if now.state == State.ERROR:
            self.failed.add(id)
        self._check_end(id)

    def _check_session(self, now: model.Instance, before: model.Instance | None) -> None:
        """Safety S7: only the newest life of an agent is believed, and granted anything."""
        node = now.node or (before.node if before is not None else "")  # one that refuses it loses it
        life = self.sessions.get(node)
        newest = 0 if life is None else life.counter
        launch, said = (None, None) if before is None else (before.launch, before.applied)
        if now.launch not in (None, launch) and now.launch is not None and now.launch.session != newest:
            self.fail(f"S7: launch of {now.id} was granted to session {now.launch.session} of {node}, not {newest}")
        if now.applied not in (None, said) and now.applied is not None and now.applied.session != newest:
            self.fail(f"S7: session {now.applied.session} of {node} was believed of {now.id}, not {newest}")

    def _saw_birth(self, id: str, now: model.Instance) -> None:
        if id in self.forgotten:
            self.fail(f"S16: {id} was born twice")
        tag = str(now.metadata.get("ask", ""))
        if now.spec.script is not None and now.spec.script.fail_handler == DELETE:
            self._deletes.add(id)
        made = self._births.setdefault(tag, set())
        made.add(id)
        ask = self.asks.get(tag)
        if ask is not None and ask.key and len(made) > ask.count:
            self.fail(f"I7: {len(made)} instances were made for one key that asked for {ask.count}")

    def _saw_return(self, id: str) -> None:
        """A node has told of it."""
        self.counts["adopted"] += 1
        self._runs.discard(id)
        if self._lost.pop(id):
            self.accepted.add(id)

    def _check_step(self, id: str, before: model.Instance, now: model.Instance) -> None:
        if before.state in OVER and now.state not in OVER:
            self.fail(f"I5: {id} went from {before.state} to {now.state}")
        if before.state == State.TERMINATED and now.state != State.TERMINATED:
            self.fail(f"I5: {id} is {now.state} after it was Terminated")
        if now.state == State.STARTED and not now.launched:
            self.fail(f"S1: {id} is Started and was not launched")
        if now.epoch < before.epoch:
            self.fail(f"S3: the epoch of {id} went back from {before.epoch} to {now.epoch}")
        if before.claimed and now.waiting and now.applied == before.applied:  # else its node said so
            self._withdrawn.append(before)
        if now.epoch == before.epoch and before.launch != now.launch and before.launched:
            self.fail(f"S1: {id} was launched twice in epoch {now.epoch}")
        if before.launched and now.epoch > before.epoch:
            self.fail(f"S1: {id} was placed again after it was launched")
        if now.node != before.node and now.node and now.epoch == before.epoch:
            self.fail(f"S3: {id} was placed in the epoch of an earlier placement")

    def _check_end(self, id: str) -> None:
        """What was answered OK ends because it was asked to or because it failed, not behind its user's back."""
        now = self.instances.get(id)
        over = id in self.forgotten or (now is not None and now.state in OVER)
        if over and id in self.accepted - self.terminate_asked - self.failed:
            self.fail(f"I4: {id} was answered OK and ended though nobody asked")
        if now is not None and now.state in OVER and now.ended is None:
            self.fail(f"I4: {id} is {now.state}, and nobody is recorded to have decided that")

    def _saw_order(self, path: str, kv: base.Kv | None) -> None:
        if kv is None:
            self.orders.pop(path, None)
            return
        order = self.orders[path] = msgspec.json.decode(kv.value, type=model.Order)
        if not (order.decision.who and order.decision.why):
            self.fail(f"I4: an order without who and why: {order}")
        self._ordered.add((order.node, order.instance, order.epoch))
        held = self.instances.get(order.instance)
        if held is None or order.node in self.removed:
            return
        if held.node == order.node and held.epoch <= order.epoch and held.launched and held.state in LIVING:
            self.fail(f"I4: {order.instance} was ordered destroyed although it is {held.state}")

    # ---- a restore -------------------------------------------------------------------------------------------------

    def waiting(self) -> set[str]:
        """What waits for a node: a store that is restored to now would place it, whatever runs by then."""
        return {id for id, now in self.instances.items() if now.waiting}

    def lost(self) -> set[str]:
        """What the restored store has forgotten, and no node has told of yet."""
        return set(self._lost)

    def backed_up(self) -> None:
        """A backup of the store is made."""
        self._backup = {name: copy.copy(getattr(self, name)) for name in _STORED}
        self._backup["_births"] = {tag: set(ids) for tag, ids in self._births.items()}

    def restored(self, cloud: Sequence[nodes.Node]) -> None:
        """The store holds what it held at the backup."""
        self.restores += 1
        for name, value in copy.deepcopy(self._backup).items():
            setattr(self, name, value)
        self.revision += 1
        for id, history in self._history.items():
            now = self.instances.get(id)
            history.append((self.revision, None if now is None else now.state))
        lost = self._history.keys() - self.instances.keys() - self.forgotten
        self._lost = {id: id in self.accepted or self._lost.get(id, False) for id in lost}
        self.accepted -= lost
        for ask in self.asks.values():
            ask.unsure_by = None
            ask.answered = [ids for ids in ask.answered if lost.isdisjoint(ids)]
        bodies = {(node.name, key): phase for node in cloud for key, phase in node.bodies().items()}
        running = {id for (_, (id, _)), phase in bodies.items() if phase is nodes.Phase.RUNNING}
        self._runs = {id for id, accepted in self._lost.items() if accepted and id in running}
        self._runs -= self.terminate_asked | self.failed
        self._ran = {id: (name, epoch) for id, (name, epoch) in self._ran.items() if (name, (id, epoch)) in bodies}
        self._scripted &= self._ran.keys()
        self._untold = set(self.nodes)

    # ---- every act of a hypervisor ---------------------------------------------------------------------------------

    def prepared(self, node: nodes.Node, key: Key) -> None:
        self._tell(f"{node.name}: prepared {_short(key)}")
        bodies = node.bodies()
        if node.crowded:
            return
        if not self._counts_sizes(node.id) and len(bodies) > node.slots:
            self.fail(f"I3: {node.name} has {node.slots} slots and {len(bodies)} VMs")
        taken = node.taken()
        if self._counts_sizes(node.id) and (taken.vcpu > node.size.vcpu or taken.ram_mb > node.size.ram_mb):
            self.fail(f"I3: {node.name} has {node.size}, and its VMs take {taken}")

    def _counts_sizes(self, id: str) -> bool:
        """Whether the node's room is in processors and memory, not in slots."""
        known = self.nodes.get(id)
        return known is not None and known.capacity_mode is model.CapacityMode.RESOURCE

    def ran(self, node: nodes.Node, key: Key) -> None:
        self._tell(f"{node.name}: guest code of {_short(key)} runs")
        self.counts["guests"] += 1
        id, epoch = key
        earlier = self._ran.get(id)
        if earlier is not None:
            self.fail(f"I2: a second VM of {id} runs, on {node.name} in epoch {epoch}; the first one: {earlier}")
        self._ran[id] = (node.name, epoch)
        if (id, epoch, node.id) not in self._launched:
            self.fail(f"S1: guest code of {id} runs on {node.name} in epoch {epoch} without launch")
        ledger = self.ledgers.get(node.id)
        claims = () if ledger is None else ledger.claims
        if node.id not in self.removed | self._untold and all((claim.instance, claim.epoch) != key for claim in claims):
            self.fail(f"S11: {id} in epoch {epoch} runs on {node.name} without a claim")

    def scripted(self, node: nodes.Node, key: Key) -> None:
        """Safety S5: at most once."""
        self._tell(f"{node.name}: the start script of {_short(key)} begins")
        self.counts["scripts"] += 1
        if key[0] in self._scripted:
            self.fail(f"S5: the start script of {key[0]} begins a second time, on {node.name}")
        self._scripted.add(key[0])

    def destroyed(self, node: nodes.Node, key: Key, *, had_run: bool) -> None:
        self._tell(f"{node.name}: destroyed {_short(key)}{'' if had_run else ', which never ran'}")
        self.counts["destructions"] += 1
        id, epoch = key
        if self.restores and self._ran.get(id) == (node.name, epoch):
            del self._ran[id]  # that it ever ran may be forgotten
            self._scripted.discard(id)
        decided = id in self._ended or any((node.id, id, later) in self._ordered for later in range(epoch, epoch + 30))
        if had_run and id not in self._history:
            self.fail(f"I4: {node.name} destroyed {id}, which the cloud does not know")
        if had_run and not decided and id not in self._deletes:
            self.fail(f"I4: {node.name} destroyed {id}, and nobody is recorded to have decided that")

    # ---- every answer ----------------------------------------------------------------------------------------------

    def answered(self, tag: str, ids: Sequence[str]) -> None:
        """A start was answered OK."""
        ask = self.asks[tag]
        if not self._lost.keys().isdisjoint(ids):
            return  # done before the restore, and forgotten
        ask.answered.append(tuple(ids))
        ask.unsure_by = None
        self.accepted.update(ids)
        self.counts["starts answered"] += 1
        if len(ids) != ask.count:
            self.fail(f"I7: {ask.count} instances were asked for and {len(ids)} answered")
        if ask.key and len(set(ask.answered)) > 1:
            self.fail(f"I7: one key, several answers: {sorted(set(ask.answered))}")
        for id in ids:
            if id not in self._history:
                self.fail(f"I1: {id} was answered and does not exist")
            self._check_end(id)

    def shown(self, by: str, id: str, state: str | None, sent_at: int) -> None:
        """A read, sent when the store was at revision `sent_at`, was answered with `state` (None: not found)."""
        self.counts["reads"] += 1
        allowed = self._states(id, sent_at)
        if state not in allowed:
            self.fail(f"I6: {by} shows {id} as {state}; between question and answer it was {sorted(map(str, allowed))}")

    def listed(self, by: str, ids: Iterable[str], sent_at: int) -> None:
        """A list shows what was there all the while, and nothing that was never there."""
        self.counts["lists"] += 1
        found = set(ids)
        for id in self._history.keys() - found:
            if None not in self._states(id, sent_at):
                self.fail(f"I6: the list of {by} lacks {id}, which is there")
        for id in found - self._history.keys():
            self.fail(f"I6: the list of {by} shows {id}, which never was")

    def _states(self, id: str, sent_at: int) -> set[str | None]:
        """What was true of the instance at some moment from revision `sent_at` on; None: it was not there."""
        history = self._history.get(id, [])
        found: set[str | None] = {None} if not history or history[0][0] > sent_at else set()
        for index, (_, then) in enumerate(history):
            ended = history[index + 1][0] if index + 1 < len(history) else self.revision + 1
            if ended > sent_at:
                found.add(None if then is None else str(then))
        return found

    # ---- in the end ------------------------------------------------------------------------------------------------

    def unsettled(self, cloud: Sequence[nodes.Node]) -> str:
        """What is not as it must be once the weather has been fine for a while and nobody wants anything new; "" when
        all is well."""
        if self._runs:
            return f"S19: these ran when the store was restored, and no node has told of them: {sorted(self._runs)}"
        if strangers := self.nodes.keys() - {node.id for node in cloud}:
            return f"S7: no host is any of these nodes: {sorted(strangers)}"
        left = {node.id: self._room(node) for node in cloud if self._open(node)}
        for id, now in self.instances.items():
            free = [node for node, room in left.items() if room(now) and now.spec.node in ("", node)]
            if now.waiting and free and not self._gives_way(now):
                return f"I1: {id} waits while there is room on {free}: {now}"
            script = now.spec.script
            if now.state == State.STARTED and script is not None and script.monitored and now.script_result is None:
                return f"I1: {id} is Started and what its script came to is not known"
            if now.state == State.PULLING and not now.waiting and now.node in self.alive:
                return f"I1: {id} is still Pulling: {now}"
        for tag, ask in self.asks.items():
            if trouble := self._ask_trouble(tag, ask):
                return trouble
        return next(filter(None, map(self._node_trouble, cloud)), "")

    def _ask_trouble(self, tag: str, ask: Ask) -> str:
        living = [id for id in self._births.get(tag, ()) if id in self.instances]
        living = [id for id in living if self.instances[id].state not in (*OVER, State.ERROR)]
        if len(living) > ask.count:
            return f"I7: {len(living)} instances live of a start that asked for {ask.count}"
        by = ask.unsure_by
        if living and by is not None and not (by.dead and by.died_at_s < ask.unsure_at_s + _CLOSED_S):
            return f"S15: a start whose last word was 'not known' has made {living}"
        return ""

    def _open(self, node: nodes.Node) -> bool:
        """Whether the node takes VMs now."""
        known, word = self.nodes.get(node.id), self.words.get(node.id)
        if known is None or known.drain or node.id not in self.alive or (word is not None and word.trouble):
            return False
        return not any(order.node == node.id and order.withdrawn for order in self.orders.values())

    def _gives_way(self, waiting: model.Instance) -> bool:
        """Whether something larger waits, for which room may be kept free."""
        need = nodes.size(waiting.spec)
        sizes = [nodes.size(now.spec) for now in self.instances.values() if now.waiting]
        return any(size.vcpu > need.vcpu or size.ram_mb > need.ram_mb for size in sizes)

    def _room(self, node: nodes.Node) -> Callable[[model.Instance], bool]:
        """What would fit, by the node's ledger."""
        ledger = self.ledgers.get(node.id)
        claims = () if ledger is None else ledger.claims
        if not self._counts_sizes(node.id):
            return lambda _: len(claims) < node.slots
        held = [nodes.size(claim) for claim in claims]
        vcpu = node.size.vcpu - sum(size.vcpu for size in held)
        ram_mb = node.size.ram_mb - sum(size.ram_mb for size in held)
        return lambda now: nodes.size(now.spec).vcpu <= vcpu and nodes.size(now.spec).ram_mb <= ram_mb

    def _node_trouble(self, node: nodes.Node) -> str:
        """What runs is what the store says, and the ledger counts just that (promise I3)."""
        if node.id not in self.alive:
            return f"{node.name} is not there" if node.id not in self.removed else ""
        bodies = node.bodies()
        for (id, epoch), phase in bodies.items():
            now = self.instances.get(id)
            if now is None or now.node != node.id or now.epoch != epoch or now.state in OVER:
                return f"I3: {node.name} has {id} in epoch {epoch} ({phase}), which nothing wants: {now}"
        for id, now in self.instances.items():
            running = bodies.get((id, now.epoch)) is nodes.Phase.RUNNING
            if now.node == node.id and now.state == State.STARTED and not running:
                return f"I3: {id} is shown as Started on {node.name}, and does not run there"
        ledger = self.ledgers.get(node.id)
        claims = {(claim.instance, claim.epoch) for claim in ledger.claims} if ledger is not None else set()
        wanted = {(id, now.epoch) for id, now in self.instances.items() if now.node == node.id and now.claimed}
        return "" if claims == wanted else f"I3: {node.name}'s ledger holds {claims}, its instances hold {wanted}"

    def left(self, cloud: Sequence[nodes.Node]) -> str:
        """What is still there though everything was ended; "" when nothing is."""
        bodies = {node.name: sorted(node.bodies()) for node in cloud if node.bodies()}
        claims = {id: ledger.claims for id, ledger in self.ledgers.items() if ledger.claims}
        if not (bodies or claims or self.orders or self.instances):
            return ""
        states = {id: str(now.state) for id, now in self.instances.items()}
        return f"VMs {bodies}, claims {claims}, orders {sorted(self.orders)}, instances {states}"

    def check_over(self) -> None:
        for id in self.accepted - self.forgotten:
            self.fail(f"I1: {id} was accepted and is lost")


def _keep(table: dict[str, N], id: str, kv: base.Kv | None, kind: type[N]) -> None:
    if kv is None:
        table.pop(id, None)
    else:
        table[id] = msgspec.json.decode(kv.value, type=kind)


def _short(key: Key) -> str:
    return f"{key[0][:8]} in epoch {key[1]}"
