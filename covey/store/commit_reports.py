"""What agents report becomes facts (safety S3): a report's items in one transaction, all or none.

An item speaks of one (instance, epoch) on the node that sends it. It counts only if the instance is on that node in
that epoch, except `gone`, which also releases what is left of older epochs. Nothing is concluded from what a report
does not say. Every item that is applied leaves its (session, epoch, seq) on the instance; one that is not newer is
settled without effect, so a report may be sent any number of times.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from covey import lifecycle, model, wire
from covey.decide import pauses
from covey.store import base, codec, commit, commit_instances, schema, view

Event = lifecycle.Event
Said = wire.ReportEvent

_ITEMS = 20  # per transaction: each may need six operations
_TOLD_BEFORE = (model.State.STARTED, model.State.ERROR)  # by the adoption after a restore, which knows no results
_TEXT = 4096  # characters kept of a message or fault: the instance is one small key


class Applied(NamedTuple):
    """`settled`: indexes of the items that need not be sent again. `revision`: of the last transaction; what it wrote,
    or found to be so already, is shown by every view at least that new."""

    settled: tuple[int, ...]
    revision: int = 0


class StaleSession(NamedTuple):
    """Another life of this agent has taken over, or the node was removed: answer 409 or 410."""


async def report(
    writer: commit.Writer,
    snapshot: view.Snapshot,
    node: model.NodeId,
    session: int,
    items: Sequence[wire.Item],
    until_ns: int = 0,
) -> Applied | StaleSession:
    """Apply items in their order. Not newer ones are dropped as settled (safety S3).

    GONE for epoch e says that nothing of epoch e or older is left: it releases those claims and ends the order.
    REFUSED makes the instance wait again and orders the node to clean up. Output goes to keys of its own (S26).
    The snapshot may be older than what the items speak of: an answer is proved, if not by what is written.
    """
    revision = 0
    for start in range(0, len(items), _ITEMS):
        part = items[start : start + _ITEMS]

        def rule(
            reading: commit.Reading, part: Sequence[wire.Item] = part
        ) -> commit.Write[Applied | StaleSession] | Applied | StaleSession:
            life = reading.session(node)
            if life is None or life.noun.counter != session:
                return StaleSession()
            page = _Page(reading, node, session)
            for item in part:
                page.take(item)
            return commit.Write(page.ops(), lambda at: Applied((), at))  # without any, it proves that it is so already

        answer: Applied | StaleSession = await writer.run(snapshot, rule, until_ns=until_ns, sure=True)
        if isinstance(answer, StaleSession):
            return answer
        revision = max(revision, answer.revision)
    return Applied(tuple(range(len(items))), revision)


class _Page:
    """The items of one transaction folded into new nouns."""

    def __init__(self, reading: commit.Reading, node: model.NodeId, session: int) -> None:
        self.reading = reading
        self.node = node
        self.session = session
        self.instances: dict[model.InstanceId, model.Instance] = {}  # as changed by this page
        self.gone: dict[model.InstanceId, int] = {}  # instance -> newest epoch of which nothing is left
        self.ordered: dict[model.InstanceId, int] = {}  # instance -> epoch of the order that this page gives
        self.extra: dict[str, base.Op] = {}

    def take(self, item: wire.Item) -> None:
        """Fold one item in."""
        item = msgspec.structs.replace(item, message=item.message[:_TEXT])
        old = self._instance(item.instance)
        if old is not None and (old.node != self.node or old.epoch != item.epoch):
            old = None  # it speaks of the past
        if old is not None and not self._newer(old, item):
            return
        if item.event == Said.GONE:
            self.gone[item.instance] = max(item.epoch, self.gone.get(item.instance, 0))
        new = None if old is None else self._applied(old, item)
        if new is not None:
            mark = model.Applied(session=self.session, epoch=item.epoch, seq=item.seq)
            self.instances[new.id] = msgspec.structs.replace(new, applied=mark, tx=self.reading.tx)

    def ops(self) -> tuple[base.Op, ...]:
        """What the page comes to."""
        ops: dict[str, base.Op] = {}
        for id, instance in self.instances.items():
            ops[schema.instance(id)] = self.reading.put(schema.instance(id), instance)
        releases = self._releases()
        ops |= self.extra
        for op in releases:
            ops[op.key] = op
        return tuple(ops.values())

    def _instance(self, id: model.InstanceId) -> model.Instance | None:
        changed = self.instances.get(id)
        if changed is not None:
            return changed
        try:
            kept = self.reading.instance(id)
        except codec.Broken:  # left alone; but what the node says is gone is gone, and others' facts must not wait
            return None
        return None if kept is None else kept.noun

    def _newer(self, instance: model.Instance, item: wire.Item) -> bool:
        last = instance.applied
        return last is None or (item.epoch, self.session, item.seq) > (last.epoch, last.session, last.seq)

    def _applied(self, old: model.Instance, item: wire.Item) -> model.Instance | None:
        """The instance after one fact; None when the fact has no place in its state."""
        replace = msgspec.structs.replace
        match item.event:
            case Said.ACKNOWLEDGED:
                return replace(old, acknowledged=True)
            case Said.PROGRESS if old.state == model.State.PULLING:
                return replace(old, acknowledged=True, progress=min(max(item.progress, 0.0), 1.0))
            case Said.INFO if item.vm is not None and old.state in lifecycle.LIVING:
                return replace(old, vm=item.vm)
            case Said.BOOTED if item.vm is not None and old.launched:
                return self._told(old, item, Event.BOOTED, progress=1.0, message="")
            case Said.STOPPED:
                return self._told(old, item, Event.STOPPED)
            case Said.FAILED:
                return self._failed(old, item)
            case Said.REFUSED:
                return self._refused(old, item)
            case Said.GONE:
                return self._gone(old, item)
        return None

    def _told(self, old: model.Instance, item: wire.Item, event: Event, **changes: object) -> model.Instance | None:
        """A step with all that the item tells."""
        script = item.script or old.script_result
        if script is not None:
            script = msgspec.structs.replace(script, errors=script.errors[:_TEXT])
        new = commit.stepped(old, event, self.reading, vm=item.vm or old.vm, script_result=script, **changes)
        if new is None and item.script is not None and old.script_result is None and old.state in _TOLD_BEFORE:
            new = msgspec.structs.replace(old, script_result=script)
        if new is not None:
            for stream, text in (("stdout", item.stdout), ("stderr", item.stderr)):
                if text:
                    key = schema.output(item.instance, stream)
                    self.extra[key] = base.Put(key, _decoded(text))
        return new

    def _failed(self, old: model.Instance, item: wire.Item) -> model.Instance | None:
        new = self._told(old, item, Event.FAILED, message=item.message or "The VM failed without saying why")
        if new is not None:
            self._event("failed", new, new.message)
        return new

    def _refused(self, old: model.Instance, item: wire.Item) -> model.Instance | None:
        """The next node may do better; but not for ever."""
        if old.launched:
            return self._failed(old, item)
        if len(old.refused) >= pauses.LIMIT:
            message = f"It was refused {len(old.refused) + 1} times, now: {item.message}"
            return self._failed(old, msgspec.structs.replace(item, message=message))
        new = commit.stepped(old, Event.REFUSED, self.reading, message=item.message, refused=(*old.refused, self.node))
        if new is not None:
            decision = model.Decision(who=self.node, why=f"refused: {item.message}")
            order = commit_instances.clean_up(self.reading, old, decision)
            self.extra[order.key] = order
            self.ordered[new.id] = item.epoch
            self._event("refused", new, item.message)
        return new

    def _gone(self, old: model.Instance, item: wire.Item) -> model.Instance | None:
        """Its VM is no more. Wanted or not: that is a fact, and nobody will say `gone` again."""
        vm = None if old.vm is None else msgspec.structs.replace(old.vm, status="deleted")
        if not old.claimed:
            return None
        new = commit.stepped(old, Event.GONE, self.reading, released=True, vm=vm)
        if new is not None:
            return new
        if not old.launched and old.state == model.State.PULLING and len(old.refused) < pauses.LIMIT:
            return commit.stepped(old, Event.REFUSED, self.reading, refused=(*old.refused, self.node))
        message = item.message or "The node says that nothing of the VM is left"
        failed = commit.stepped(old, Event.FAILED, self.reading, released=True, vm=vm, message=message)
        if failed is not None:
            self._event("failed", failed, message)
        return failed or msgspec.structs.replace(old, released=True, vm=vm)

    def _event(self, what: str, instance: model.Instance, why: str) -> None:
        put = self.reading.event(what, instance.id, model.Decision(who=self.node, why=why))
        self.extra[put.key] = put

    def _releases(self) -> list[base.Op]:
        """Slots that are free again, and orders that are done."""
        if not self.gone:
            return []
        ops: list[base.Op] = []
        ledger = self.reading.ledger(self.node)
        if ledger is not None:
            rest = tuple(claim for claim in ledger.noun.claims if claim.epoch > self.gone.get(claim.instance, -1))
            if len(rest) != len(ledger.noun.claims):
                noun = msgspec.structs.replace(ledger.noun, claims=rest, tx=self.reading.tx)
                ops.append(self.reading.put(schema.ledger(self.node), noun))
        for id, epoch in self.gone.items():
            key = schema.order(self.node, id)
            order: codec.Kept[model.Order] | None = self.reading.order(self.node, id)
            if self.ordered.get(id, 0) > epoch:
                continue  # given after that `gone`
            self.extra.pop(key, None)  # done before it was given: nobody would say `gone` again
            if order is not None and order.noun.epoch <= epoch:
                ops.append(base.Delete(key))
        return ops


def _decoded(text: str) -> bytes:
    """Base64 output, cut to its last part (safety S26); what is no base64 is kept as it came."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = text.encode("utf-8", "replace")
    return raw[-schema.OUTPUT_LIMIT_BYTES :]
