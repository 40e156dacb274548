"""Bugs that the histories must find: each takes away one of the things that the argument rests on."""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from covey.registry import accepted, campaign, elected, role
from covey.store import base
from tests.reigns import parts


class AsksNoTerm(elected.Elected):
    """What is accepted is not compared with the role."""

    async def _commit(self, txn: base.Txn) -> tuple[base.Outcome, bool]:
        compares = tuple(one for one in txn.compares if one.key != elected.ROLE_KEY)
        return await super()._commit(txn._replace(compares=compares))


class AsksNoNumber(elected.Elected):
    """… nor with the log's head: two processes of one server give one number. (Found soon where chains are not looked
    at either: these keep most of it from other servers.)"""

    async def _commit(self, txn: base.Txn) -> tuple[base.Outcome, bool]:
        compares = tuple(one for one in txn.compares if one.key == elected.ROLE_KEY)
        return await super()._commit(txn._replace(compares=compares))


class ShowsFirst(parts.Logs):
    """An entry gets its number before it is accepted."""

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        if not await super().append(log, number, entry):
            return False
        if check is not None:
            await check()
        return True


class EntersNothing(campaign.Campaign):
    """A successor does not enter what was accepted, and does not ask whether it has everything."""

    async def _complete(self) -> None:
        return

    async def _has_all(self) -> bool:
        return True


class AsksNobody(campaign.Campaign):
    """A server takes the role with whatever it has."""

    async def _has_all(self) -> bool:
        return True

    async def prune(self) -> None:
        page = await self._store.range(elected.ACCEPTED, base.prefix_end(elected.ACCEPTED))
        for kv in page.kvs:
            await self._store.commit(base.Txn((), (base.Delete(kv.key),)))


class CountsAlone(campaign.Campaign):
    """Whoever has as many entries as were accepted has what was accepted."""

    async def _has_all(self) -> bool:
        for name, stand in (await self._accepted.stands()).items():
            if (await self._standing.fold(name)).count < stand.count:
                return False
        return True


class _Blind(accepted.Accepted):
    async def stands(self) -> dict[str, accepted.Stand]:
        return {name: dataclasses.replace(stand, chain="") for name, stand in (await super().stands()).items()}


class AppendsBlindly(campaign.Campaign):
    """… and what was accepted comes behind whatever is there."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._accepted = _Blind(args[2], args[3], args[5], more["bounds"])


class LooksOnce(role.Appointed):
    """Nobody looks after the link whether the role was given away meanwhile."""

    async def settle(self, view: role.View, log: str, number: int, *, entered: bool) -> None:
        return


class CopiesNothing(campaign.Appointing):
    """Who is promoted does not ask the holder for what it has."""

    async def _catch_up(self, holder: str) -> None:
        return


class GivesNothing(role.Appointed):
    """A holder does not believe that another one was made it."""

    async def heard(self, term: int, holder: str) -> None:
        if not self.view().mine:
            await super().heard(term, holder)


BUGS = {
    "asks-no-term": parts.Bugs(elected_role=AsksNoTerm),
    "asks-no-number": parts.Bugs(elected_role=AsksNoNumber, candidate=AppendsBlindly),
    "shows-first": parts.Bugs(journal=ShowsFirst),
    "enters-nothing": parts.Bugs(candidate=EntersNothing),
    "asks-nobody": parts.Bugs(candidate=AsksNobody),
    "counts-alone": parts.Bugs(candidate=CountsAlone),
    "appends-blindly": parts.Bugs(candidate=AppendsBlindly),
    "looks-once": parts.Bugs(given_role=LooksOnce),
    "copies-nothing": parts.Bugs(operator=CopiesNothing),
    "gives-nothing": parts.Bugs(given_role=GivesNothing),
}

FOUND_SOON = ("asks-no-term", "asks-no-number", "shows-first", "enters-nothing", "copies-nothing", "gives-nothing")
FOUND_STRANDED = ("counts-alone", "appends-blindly")  # by histories that give up by force what one server has
