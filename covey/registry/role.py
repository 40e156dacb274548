"""Who takes pushes among registries with disks of their own (safety S33, S34).

One server of a set holds the *role*, for one *term*; terms grow with every change of hands. An entry comes into a log
at the holder alone, and in four steps, at each of which a process may freeze for hours:

    decide ──► accept ──► link to the number ──► settle ──► answer 201
               │                                 │
               │                                 └ still the holder in this term? as many copies as wanted?
               └ may this entry have this number in this term?

* `Alone`: one storage, however many servers on it. The link decides; nothing else is asked.
* `Appointed`: an operator says who holds the role. What a server knows is durable, and shared by its processes, as
  files that are made once: `BASE_PATH/role/<term>` names the holder of that term. Whoever gives the role away first
  writes that down, then looks what its logs hold; so of "linked, then still the holder" and "gave it away, then
  looked" one sees the other, and what was answered 201 goes along.
* `elected.Elected`: etcd says so, and accepts every entry in a transaction that compares the role's key.

A server that hears of a higher term stops at once. Two holders of one term can only be made by people, on two sides of
a broken network; then neither takes pushes, both say so, and nothing is removed, until somebody promotes one.
"""

import re
from pathlib import Path
from typing import Protocol

from covey import durable, errors, failpoint, model, observe, world

log = observe.log("registry")

_FRESH_NS = 10**9
_TERM = re.compile(r"(\d{10})(\.disputed)?")


class View(model.Noun, frozen=True, kw_only=True):
    """Who holds the role, as this server knows. `holder` "": nobody that it knows of. `why_not`: what stands in the
    way, where the holder takes no pushes. `key` is the store's mark of this reign."""

    term: int = 0
    holder: str = ""
    mine: bool = False
    why_not: str = ""
    key: int = 0


class NotHolder(errors.Unavailable):
    """This server takes no pushes; the text names the one that does. Certainly nothing was entered."""


class Role(Protocol):
    """For any number of pushes at once, in any number of processes of one server."""

    def view(self) -> View: ...

    async def accept(self, view: View, log: str, number: int, entry: bytes) -> None:
        """Before an entry that was decided on under `view` gets its number. Returns when nobody else in the set can
        give this number to another entry, as far as that can be known. Raises NotHolder, `Taken`, and Unsure."""
        ...

    async def settle(self, view: View, log: str, number: int, *, entered: bool) -> None:
        """Before it is answered that the log is right up to `number`; `entered` False: nothing had to be entered, as an
        earlier request had seen to that. Raises Unsure: it is in this log, but may be set aside; and NotHolder."""
        ...

    async def certain(self) -> bool:
        """Whether this server holds the role right now: then what its logs say from here on contains everything that
        anybody was told before. Raises StoreError when that cannot be known."""
        ...

    async def heard(self, term: int, holder: str) -> None:
        """What another server of the set believes. Harmless when repeated, or old."""
        ...


class Taken(errors.CoveyError):
    """The number belongs to another entry, which is in the log now: decide again."""


class Alone:
    """One storage: whoever reaches it may push."""

    def view(self) -> View:
        return View(mine=True)

    async def accept(self, view: View, log: str, number: int, entry: bytes) -> None:
        return

    async def settle(self, view: View, log: str, number: int, *, entered: bool) -> None:
        return

    async def certain(self) -> bool:
        return True

    async def heard(self, term: int, holder: str) -> None:
        return


class Others(Protocol):
    """Who is asked what the other servers believe."""

    async def hear(self) -> None:
        """Ask all of them who takes pushes, and tell the role (`heard`); soon, whether they answer or not."""
        ...


def not_holder(view: View, own_url: str) -> NotHolder:
    """Why `own_url` takes no pushes."""
    if view.why_not:
        return NotHolder(view.why_not)
    if view.holder and view.holder != own_url:
        return NotHolder(f"the registry {view.holder} takes pushes, not {own_url}; nothing was entered")
    return NotHolder("no registry of this set takes pushes now; nothing was entered")


# ---- an operator says who ------------------------------------------------------------------------------------------


class Terms:
    """What a server knows of terms and their holders, in files that are made once, for all its processes."""

    def __init__(self, base: Path, world: world.World, *, fsync: bool = True) -> None:
        self._folder = base / "role"
        self._world = world
        self._fsync = fsync
        durable.make_dirs(self._folder, fsync=fsync)

    def last(self) -> tuple[int, str, str]:
        """The newest term, its holder, and who else is said to hold it; (0, "", "") when nothing is known."""
        found = {hit[0]: hit for name in self._names() if (hit := _TERM.fullmatch(name))}
        term = max((int(hit[1]) for hit in found.values()), default=0)
        if not term:
            return 0, "", ""
        disputed = _name(term, disputed=True)
        return term, self._read(_name(term)), self._read(disputed) if disputed in found else ""

    def _names(self) -> list[str]:
        return [path.name for path in self._folder.iterdir()]

    def _read(self, name: str) -> str:
        return (self._folder / name).read_text("utf-8")

    def enter(self, term: int, holder: str) -> None:
        """Write down who holds a term. Harmless when that is known; another holder than the known one is written down
        beside it."""
        if not self._make(_name(term), holder) and self._read(_name(term)) != holder:
            self._make(_name(term, disputed=True), holder)

    def _make(self, name: str, content: str) -> bool:
        if (self._folder / name).exists():
            return False
        aside = self._folder / f"{self._world.token()}.tmp"
        try:
            durable.write_new(aside, content.encode(), fsync=self._fsync)
            return durable.link_new(aside, self._folder / name, fsync=self._fsync)
        finally:
            durable.discard(aside)


def _name(term: int, *, disputed: bool = False) -> str:
    return f"{term:010d}{'.disputed' if disputed else ''}"


class Copies(Protocol):
    """Who waits until other servers have all of an entry."""

    async def wait(self, log: str, number: int) -> None:
        """Raises Unsure when that takes too long."""
        ...


class Single:
    """`Copies` where one is enough."""

    async def wait(self, log: str, number: int) -> None:
        return


class Appointed:
    """A `Role` that people give. `first`: who holds it as long as nobody has said otherwise. A server whose disk is new
    does not take pushes as the first holder before it has heard all others (`campaign.Appointing`): it may be an old
    one that has lost what they know. Until then `waits_for` says what is lacking."""

    def __init__(
        self,
        own_url: str,
        terms: Terms,
        first: str,
        world: world.World,
        copies: Copies | None = None,
    ) -> None:
        self._own_url = own_url
        self._terms = terms
        self._world = world
        self.others: Others | None = None
        self._heard_ns = -_FRESH_NS  # when all that can be asked were asked last
        self.first = first
        self.waits_for = "the other servers of the set must be heard before this new registry takes pushes"
        self._copies = copies if copies is not None else Single()

    def view(self) -> View:
        term, holder, other = self._terms.last()
        if not term:
            return View(holder=self.first, why_not=self.waits_for if self.first == self._own_url else "")
        if other:
            text = (
                f"both {holder} and {other} were made the registry that takes pushes (term {term}), so neither does:"
                " `covey registry promote URL` says which one it is"
            )
            return View(term=term, holder=holder, why_not=text)
        return View(term=term, holder=holder, mine=holder == self._own_url)

    @property
    def fresh(self) -> bool:
        """Nothing is known yet of any term."""
        return not self._terms.last()[0]

    async def accept(self, view: View, log: str, number: int, entry: bytes) -> None:
        now = self.view()
        if not now.mine or now.term != view.term:
            raise not_holder(now, self._own_url)

    async def settle(self, view: View, log: str, number: int, *, entered: bool) -> None:
        failpoint.reach("registry.entry.unsettled")
        await self._hear()
        now = self.view()
        if not now.mine or now.term != view.term:
            if not entered:
                raise not_holder(now, self._own_url)
            who = now.holder if now.holder != self._own_url else "another registry"
            raise errors.Unsure(f"{who} was made the one that takes pushes meanwhile; send it again")
        await self._copies.wait(log, number)

    async def certain(self) -> bool:
        await self._hear()
        return self.view().mine

    async def _hear(self) -> None:
        """Ask the others, unless that was a moment ago. Whoever is promoted by force has tried for longer than that to
        reach this server, so a holder that stood still meanwhile hears of it here, before it answers."""
        asked_ns = self._world.boot_ns()
        if self.others is not None and asked_ns - self._heard_ns > _FRESH_NS:
            await self.others.hear()
            self._heard_ns = asked_ns

    async def heard(self, term: int, holder: str) -> None:
        """That this very server holds a term which it does not know of is no news to act on: it takes the role itself,
        when it has what it needs (`take`)."""
        known, known_holder, other = self._terms.last()
        if not holder or term < max(known, 1) or (holder == self._own_url and term > known):
            return
        if (term, holder) in ((known, known_holder), (known, other)) or (term == known and other):
            return
        if term == known:
            log.error("two registries hold one term", term=term, holders=[known_holder, holder])
        else:
            log.warning("the push role has moved", term=term, holder=holder)
        self._terms.enter(term, holder)

    def take(self, term: int) -> None:
        """Hold the role from now on."""
        self._terms.enter(term, self._own_url)
        log.warning("this registry takes pushes now", term=term)

    def give(self, term: int, holder: str) -> None:
        """Let `holder` have it. What this server answers from now on is not 201."""
        self._terms.enter(term, holder)
        log.warning("the push role was given away", term=term, holder=holder)
