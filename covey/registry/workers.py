"""Several processes behind one listening socket, for one server that uses more than one processor.

    supervisor ── listens, accepts nothing ──► worker 1 … n: accept from the same socket
        │  ▲                                         │
        │  └────────── tally (a shared file) ◄───────┘
        └── /metrics: sums over all workers

The socket is the supervisor's: what waits in its backlog when a worker dies is taken by another one, and the worker is
started again (`supervise`). A worker is an ordinary registry on the same storage; nothing is shared between them but
the socket and the tally, so what holds for several servers on one storage holds for them. The first one takes care of
the storage beside; the supervisor only looks at it, for the figures it tells.

Stopping closes the supervisor's end first, so that nobody connects to a socket that no worker looks at any more; then
all workers drain at once.
"""

import asyncio
import os
import sys
from collections.abc import Mapping

from covey import observe, server, supervise, tls_context, world
from covey.registry import catalog, metrics, service, tally, upkeep

log = observe.log("registry")

_STOP_S = 5.0  # beyond the grace


class Workers:
    """start → (keeps its workers running by itself) → stop. `command` is what runs one, without its three numbers: the
    files of socket and tally, and which worker it is."""

    def __init__(
        self,
        config: service.Config,
        world: world.World,
        environ: Mapping[str, str],
        command: tuple[str, ...] = (sys.executable, "-m", "covey", "registry-worker"),
    ) -> None:
        self._config = config
        self._world = world
        self._environ = environ
        self._command = command
        self._socket = server.listen(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]
        self._counts = tally.Tally(config.workers)
        self._children: list[supervise.Child] = []
        self._storage = service.storage_of(config, environ, world)
        held = catalog.Catalog(self._storage.content, self._storage.logs, world)
        idle = service.onlooker(config).care
        self._upkeep = upkeep.Upkeep(
            held, self._storage.care, self._storage.log_care, world, idle, held=self._storage.replica
        )
        self.metrics: metrics.Metrics | None = None
        if config.metrics is not None:
            self.metrics = metrics.Metrics(config.metrics, self._counts, lambda: self._upkeep.figures, world)

    async def start(self) -> None:
        """Run all workers and wait until they serve. Raises SettingError when one cannot."""
        if self._config.tls is not None:
            tls_context.of(self._config.tls)  # what is wrong with the settings is said here, once
        await self._storage.open()
        if self.metrics is not None:
            await self._upkeep.start()
            await self.metrics.start(self._config.host)
        self._children = [supervise.Child(self._program(number), log.warning) for number in range(self._config.workers)]
        starting = [asyncio.create_task(child.start()) for child in self._children]
        try:
            await asyncio.gather(*starting)
        finally:
            for start in starting:
                start.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
        log.info("the registry listens", host=self._config.host, port=self.port, workers=self._config.workers)

    def _program(self, number: int) -> supervise.Program:
        files = (self._socket.fileno(), self._counts.file)

        async def ready() -> bool:
            return self._counts.row(number)[tally.Count.SERVING] == self._children[number].pid

        return supervise.Program(
            f"registry worker {number + 1}",
            (*self._command, *map(str, (*files, number))),
            self._environ,
            ready,
            stop_s=self._config.grace_s + _STOP_S,
            files=files,
        )

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers, as they are now."""
        return tuple(child.pid for child in self._children)

    async def stop(self) -> None:
        """Harmless when repeated."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        await asyncio.gather(*(child.stop() for child in self._children))
        if self.metrics is not None:
            await self.metrics.stop()
        await self._upkeep.stop()
        self._storage.close()
        self._counts.close()
        log.info("the registry has stopped", pid=os.getpid())
