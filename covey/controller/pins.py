"""What a tag was when a start last asked for it, kept in the store for the time when no registry can say (safety S14).

A start is pinned on a registry's fresh word as long as one gives it. When none does, a version that was started before
is still known, by every controller and after a restart of all of them; nodes that have its layers start it. What nobody
started in the last month is not known, and is refused as before: nobody is told that there is no such tag.

To remember costs no start anything: it is written after the answer, when the word differs from what this controller
wrote last, and otherwise once a day.
"""

import contextlib
from collections.abc import Callable

from covey import errors, model, observe
from covey.client import oci
from covey.store import commit, commit_pins, schema, view

Asked = commit_pins.Asked

_AGAIN_NS = 24 * 3600 * 1_000_000_000
_LIMIT = 10_000

log = observe.log("registry")


class Pins:
    """`learn` after each answer of a registry, `recall` when there is none."""

    def __init__(self, writer: commit.Writer, snapshot: Callable[[], view.Snapshot]) -> None:
        self._writer = writer
        self._snapshot = snapshot
        self._written: dict[Asked, tuple[schema.Pin, int]] = {}  # and when, on the boot clock
        self._alone = False  # no registry can say

    def learn(self, asked: Asked, found: oci.Resolved) -> None:
        if self._alone:
            self._alone = False
            log.info("a registry says again what templates are")
        pin, now_ns = _pin(found), self._writer.world.boot_ns()
        before = self._written.get(asked)
        if before is not None and before[0] == pin and now_ns - before[1] < _AGAIN_NS:
            return
        if len(self._written) >= _LIMIT:
            self._written.clear()  # at worst all is written once more
        self._written[asked] = pin, now_ns
        self._writer.soon(self._write(asked, pin))

    def forget(self, asked: Asked) -> None:
        """A registry said that there is no such version (any more)."""
        self._written.pop(asked, None)
        self._writer.soon(self._forget(asked))

    async def _forget(self, asked: Asked) -> None:
        with contextlib.suppress(errors.StoreError):  # it ends by itself
            await commit_pins.forget(self._writer, self._snapshot(), asked)

    async def _write(self, asked: Asked, pin: schema.Pin) -> None:
        try:
            await commit_pins.learn(self._writer, self._snapshot(), asked, pin)
        except errors.StoreError:
            if self._written.get(asked, (None, 0))[0] == pin:
                del self._written[asked]  # the next start tries again

    async def recall(self, asked: Asked) -> oci.Resolved | None:
        """None: it was not started of late. Raises StoreError."""
        pin = await commit_pins.recall(self._writer.store, asked)
        if not self._alone:
            self._alone = True
            log.warning("no registry can say what templates are: what was started before is started as it was then")
        return None if pin is None else _resolved(asked, pin)


def _pin(found: oci.Resolved) -> schema.Pin:
    return schema.Pin(
        name=found.name,
        tag=found.tag,
        version=found.number,
        digest=found.digest,
        arch=found.arch,
        size_bytes=found.size,
        vcpu=found.vcpu,
        vram_mb=found.ram_mb,
    )


def _resolved(asked: Asked, pin: schema.Pin) -> oci.Resolved:
    return oci.Resolved(
        id=model.TemplateId(asked.template),
        name=pin.name,
        tag=pin.tag,
        number=pin.version,
        digest=pin.digest,
        arch=pin.arch,
        size=pin.size_bytes,
        creation_date=0,
        vcpu=pin.vcpu,
        ram_mb=pin.vram_mb,
    )
