"""Nodes' words that bring nothing but newer figures: gathered for a second, and written together (safety S26).

Each node says its word once a minute, also when nothing has changed there. Those of 5,000 nodes are eighty a second,
spread evenly: one by one they would be eighty proposals, gathered they are a few. A word that brings news is never kept
waiting here. What is lost with this controller comes again within the minute.
"""

import asyncio
from collections.abc import Callable

from covey import errors, model, observe
from covey.store import commit, commit_nodes, view

GATHER_S = 1.0

_log = observe.log("agents")


class Figures:
    """Words that wait to be written; the newest of each node."""

    def __init__(self, writer: commit.Writer, snapshot: Callable[[], view.Snapshot]) -> None:
        self._writer = writer
        self._snapshot = snapshot
        self._words: dict[model.NodeId, model.Word] = {}

    def later(self, word: model.Word) -> None:
        """Have it written within the next seconds. `word` is of an authenticated session."""
        if not self._words:
            self._writer.soon(self._write())
        self._words[word.node] = word

    async def _write(self) -> None:
        await asyncio.sleep(GATHER_S)
        words, self._words = self._words, {}
        snapshot = self._snapshot()
        says = (commit_nodes.say(self._writer, snapshot, word.node, word.session, word) for word in words.values())
        faults = [one for one in await asyncio.gather(*says, return_exceptions=True) if isinstance(one, BaseException)]
        for fault in faults:
            if not isinstance(fault, errors.CoveyError):
                raise fault
        if faults:
            _log.debug("figures were not written; they come again", nodes=len(faults), why=str(faults[0]))
