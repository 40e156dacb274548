"""What an agent must still know after a crash: a record per VM, and tombstones.

    <data>/
    ├── node.json, spare                 who this node is; room to write that on a full disk (agent.identity)
    ├── controllers.json                 where the cloud's controllers were last (agent.identity)
    ├── records/<instance>.<epoch>.json  Record: written before each act that could not be guessed afterwards
    ├── tombstones/<instance>.json       Tombstone: ordered destroyed; kept 30 days (safety S19)
    ├── vms/                             the hypervisor's
    └── images/                          the image cache's (agent.images)

A record carries the history and revision of the answer it acts on, so both are on disk before the act (safety S2).
A record is removed after its VM is; a tombstone outlives both. The caller sees to it that one agent at a time uses a
directory. Without a directory all is kept in memory, and without `sync` it survives the process but not the host: both
are for synthetic nodes, whose VMs do no better.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from covey import durable, model, observe, wire
from covey.decide import convergence

_DAY_NS = 24 * 3600 * 1_000_000_000
TOMBSTONES_KEPT_NS = 30 * _DAY_NS

_log = observe.log("agent")
Key = tuple[model.InstanceId, int]  # (instance, epoch)
_NONE: "Mapping[int, Record]" = {}


class Record(model.Noun, frozen=True, kw_only=True):
    """One VM, as far as it came. `script` is the text that travelled with the launch, base64."""

    instance: model.InstanceId
    epoch: int
    cloud: str
    seen: wire.Seen
    spec: model.Spec
    vm_name: str = ""
    stage: convergence.Stage = convergence.Stage.ACCEPTED
    script: str = ""
    script_ended: bool = False
    launched_ns: int = 0  # world.boot_ns at the start, for deadlines counted from launch (safety S9)
    after: convergence.After = convergence.After.KEEP
    message: str = ""
    vm: model.VmInfo | None = None
    result: model.ScriptResult | None = None
    stdout: str = ""
    stderr: str = ""

    @property
    def key(self) -> Key:
        return (self.instance, self.epoch)


class Tombstone(model.Noun, frozen=True, kw_only=True):
    """This epoch of the instance, and every older one, was ordered destroyed: nothing of it starts again."""

    instance: model.InstanceId
    epoch: int
    decision: model.Decision
    seen: wire.Seen
    at_ns: int
    final: bool = False  # the instance itself ended, not only this placement of it (safety S19)

    def grave(self) -> convergence.Grave:
        return convergence.Grave(instance=self.instance, epoch=self.epoch, decision=self.decision)


class Records:
    """All records and tombstones of one node, in memory and, given a directory, on disk."""

    def __init__(self, data: Path | None, *, sync: bool = True) -> None:
        self._sync = sync
        self._records_dir = None if data is None else data / "records"
        self._tombstones_dir = None if data is None else data / "tombstones"
        self._records: dict[model.InstanceId, dict[int, Record]] = {}  # by epoch
        self._tombstones: dict[model.InstanceId, Tombstone] = {}
        self._swept_ns = 0  # when old tombstones were looked for last

    def load(self, now_ns: int) -> None:
        """Read everything back; forget tombstones older than 30 days."""
        if self._records_dir is None or self._tombstones_dir is None:
            return
        for directory in (self._records_dir, self._tombstones_dir):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            durable.sweep(directory)
        for path in sorted(self._records_dir.glob("*.json")):
            record = durable.read(path, Record)
            if record is not None:
                self._keep(record)
        for path in sorted(self._tombstones_dir.glob("*.json")):
            tombstone = durable.read(path, Tombstone)
            if tombstone is not None:
                self._tombstones[tombstone.instance] = tombstone
        self._sweep(now_ns)

    def save(self, record: Record) -> None:
        """Durable when it returns."""
        if self._records_dir is not None:
            durable.write(self._records_dir / f"{record.instance}.{record.epoch}.json", record, fsync=self._sync)
        self._keep(record)

    def save_if_possible(self, record: Record) -> None:
        """For what must be told whether or not the disk takes it: a full disk is no excuse."""
        try:
            self.save(record)
        except OSError as error:
            self._keep(record)
            _log.error("a record could not be written", instance=record.instance, error=str(error))

    def forget(self, key: Key) -> None:
        """The VM is gone and nobody asks for it any more. Harmless when unknown."""
        known = self._records.get(key[0])
        if known is None or known.pop(key[1], None) is None:
            return
        if not known:
            del self._records[key[0]]
        if self._records_dir is not None:
            durable.remove(self._records_dir / f"{key[0]}.{key[1]}.json", fsync=self._sync)

    def _keep(self, record: Record) -> None:
        self._records.setdefault(record.instance, {})[record.epoch] = record

    def bury(self, tombstone: Tombstone) -> None:
        """Durable when it returns; an older order never replaces a newer one, nor an order about a placement one that
        was final.

        On a full disk it is kept in memory: destroying is what makes room, and the control plane grants no launch to
        what it ordered destroyed."""
        if tombstone.at_ns - self._swept_ns > _DAY_NS:
            self._sweep(tombstone.at_ns)
        known = self._tombstones.get(tombstone.instance)
        if known is not None and known.epoch >= tombstone.epoch and (known.final or not tombstone.final):
            return
        if known is not None:
            epoch, final = max(known.epoch, tombstone.epoch), known.final or tombstone.final
            tombstone = msgspec.structs.replace(tombstone, epoch=epoch, final=final)
        self._tombstones[tombstone.instance] = tombstone
        if self._tombstones_dir is not None:
            try:
                durable.write(self._tombstones_dir / f"{tombstone.instance}.json", tombstone, fsync=self._sync)
            except OSError as error:
                _log.error("a tombstone could not be written", instance=tombstone.instance, error=str(error))

    def _sweep(self, now_ns: int) -> None:
        """Forget old tombstones; not of VMs that are still on record, whatever the clock says."""
        self._swept_ns = now_ns
        for tombstone in self.tombstones():
            if tombstone.at_ns + TOMBSTONES_KEPT_NS < now_ns and not self.by_epoch(tombstone.instance):
                del self._tombstones[tombstone.instance]
                if self._tombstones_dir is not None:
                    durable.remove(self._tombstones_dir / f"{tombstone.instance}.json", fsync=False)

    def get(self, key: Key) -> Record | None:
        return self._records.get(key[0], _NONE).get(key[1])

    def by_epoch(self, instance: model.InstanceId) -> Mapping[int, Record]:
        """The records of one instance, as they are until the next call."""
        return self._records.get(instance, _NONE)

    def all(self) -> list[Record]:
        return [record for epochs in self._records.values() for record in epochs.values()]

    def tombstone(self, instance: model.InstanceId) -> Tombstone | None:
        return self._tombstones.get(instance)

    def tombstones(self) -> list[Tombstone]:
        return list(self._tombstones.values())

    def newest_seen(self, history: str) -> int:
        """The highest revision of `history` that any act of this node rests on."""
        acts = [record.seen for record in self.all()]
        acts += [tombstone.seen for tombstone in self._tombstones.values()]
        return max((seen.revision for seen in acts if seen.history == history), default=0)
