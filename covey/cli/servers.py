"""The programs that stay: `covey controller`, `registry`, `agent`, `standalone` and `up`.

Each reads its settings once, sets up logging, runs in the foreground until SIGTERM or Ctrl-C, and ends with 0. What
stops a start is one line and exit code 1.
"""

import asyncio
import gc
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from covey import errors, settings_table
from covey.cli import background, flags, out

if TYPE_CHECKING:
    from covey import observe, settings

Part = settings_table.Part

_NOT_FLAGS = frozenset({"NODES", "REGISTRY_PEER_SECRET"})  # what is in argv, all of this host see
_FILES = 65_536
_MORE_OBJECTS = 50_000  # some 10 MB


class _Program(Protocol):
    """A program that listens or works between `start` and `stop`."""

    async def start(self) -> None: ...

    async def stop(self) -> object: ...


P = TypeVar("P", bound=_Program)


@flags.of(Part.CONTROLLER)
def controller(flags: flags.Flags) -> None:
    """Run one controller. Any number of them on one etcd are equal."""
    from covey import settings

    chosen = settings.controller(os.environ, flags)
    if chosen.standalone or chosen.run_registry:
        _standalone(flags, etcd=chosen.standalone, registry=chosen.run_registry)
        return
    _begin(chosen, Part.CONTROLLER)
    go_first(chosen.priority)
    from covey import world
    from covey.controller import replica

    _run(lambda: replica.Replica(chosen, world.System()), quick=True)


def registry(flags: flags.Flags) -> None:
    """Run one registry: `covey registry` without a command."""
    from covey import settings, world

    chosen = settings.registry(os.environ, flags)
    _begin(chosen, Part.REGISTRY)
    from covey.registry import service, workers

    config = service.configured(chosen)
    environ = _environ(flags)
    if config.workers > 1:
        _run(lambda: workers.Workers(config, world.System(), environ), quick=False)
    else:
        _run(lambda: service.Registry(config, world.System(), environ), quick=config.tls is not None)


def _environ(given: flags.Flags) -> dict[str, str]:
    """For a program started from here, which is to have the same settings."""
    return {**os.environ, **flags.environment(given)}


def registry_worker(listener: int, tally: int, number: int) -> None:
    """One of a registry's processes; `covey registry` starts it, with its settings in the environment."""
    from covey import settings, world

    chosen = settings.registry(os.environ)
    _begin(chosen, Part.REGISTRY, notices=False)
    from covey.registry import service
    from covey.registry import tally as counting

    config = service.configured(chosen)
    counts = counting.Tally(config.workers, number, tally)
    shared = socket.socket(fileno=listener)
    mine = service.onlooker(config) if number else config
    made = service.Registry(mine, world.System(), os.environ, shared=shared, counts=counts)
    _run(lambda: made, quick=config.tls is not None)


@flags.of(Part.AGENT)
def agent(flags: flags.Flags) -> None:
    """Run this host's agent, or many synthetic nodes."""
    from covey import settings, world

    chosen = settings.agent(os.environ, flags)
    _begin(chosen, Part.AGENT)
    from covey.agent import program

    if chosen.nodes and not chosen.data_dir_given:
        _run(lambda: program.Program(chosen, world.System(), None), quick=True, ended=program.Program.ended)
        return
    with background.running_agent(chosen.data_dir):
        explicit = background.take_explicit(chosen.data_dir)
        folder = background.folder(chosen.data_dir)
        made = program.Program(chosen, world.System(), folder, explicit=explicit)
        _run(lambda: made, quick=True, ended=program.Program.ended)


@flags.of(Part.STANDALONE, without=_NOT_FLAGS)
def standalone(flags: flags.Flags) -> None:
    """Run etcd, a controller and a registry in one process tree."""
    _standalone(flags)


@flags.of(Part.STANDALONE, without=_NOT_FLAGS)
def up(
    flags: flags.Flags,
    nodes: Annotated[int, typer.Option(help="How many synthetic nodes.", min=0, max=10_000)] = 5,
) -> None:
    """Run a whole cloud with synthetic nodes, to try things out."""
    _standalone({**flags, "NODES": nodes})


def _standalone(given: flags.Flags, *, etcd: bool = True, registry: bool = True) -> None:
    from covey import settings
    from covey import up as whole

    chosen = settings.standalone(os.environ, given)
    _begin(chosen, Part.STANDALONE)
    environ = _environ(given)
    asyncio.run(whole.run(chosen, environ, out.say, etcd=etcd, registry=registry))


def _begin(
    chosen: "settings.Controller | settings.Registry | settings.Agent | settings.Standalone",
    program: Part,
    *,
    notices: bool = True,
) -> None:
    """Logging and failpoints as set, then what the settings have to say."""
    from covey import failpoint, observe

    file = None if chosen.log_dir is None else _log_file(chosen.log_dir / f"covey-{program}.log")
    observe.configure(json=chosen.log_json, level=chosen.log_level, file=file)
    failpoint.arm(chosen.failpoints)
    log = observe.log("settings")
    for notice in chosen.notices if notices else ():
        log.warning(notice)


def _log_file(path: Path) -> "observe.File":
    from covey import observe

    try:
        return observe.File(path)
    except OSError as error:
        raise errors.SettingError(f"LOG_DIR: {path} cannot be written: {error.strerror}") from error


def _run(make: Callable[[], P], *, quick: bool, ended: Callable[[P], Awaitable[None]] | None = None) -> None:
    """Start, wait for a signal (or until `ended` says that it ended by itself), stop. `quick`: on uvloop, which has no
    sendfile but is faster at small requests."""

    _take_all_file_descriptors()
    _collect_seldom()

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        program = make()
        try:
            await _unless(program.start(), stop)
            await (stop.wait() if ended is None else _unless(ended(program), stop))
        finally:
            await program.stop()

    if quick:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    else:
        asyncio.run(main())


def go_first(priority: int) -> None:
    """Before threads are made, which inherit it. On a host that is busy with builds, agents or etcd a controller that
    waits its turn makes all of them wait: there it carried out a quarter more with the same processor time."""
    if not priority:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -priority)
    except PermissionError:
        from covey import observe

        observe.log("settings").info("PRIORITY is not permitted; the controller runs like other programs")


def _take_all_file_descriptors() -> None:
    """A connection is one, and the usual limit of 1024 is lower than what this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _collect_seldom() -> None:
    """Python looks for garbage in cycles after every 700 objects more than it freed, and through all objects when a
    quarter of them is new: with thousands of parked polls, which come and go, that is nearly always, and one look takes
    a good part of a second. Little of what these programs let go of is in cycles."""
    gc.freeze()  # what was imported stays for good
    gc.set_threshold(_MORE_OBJECTS, 10, 10)


async def _unless(starting: Awaitable[None], stop: asyncio.Event) -> None:
    """Start, but give it up when the signal comes first."""
    work = asyncio.ensure_future(starting)
    signalled = asyncio.create_task(stop.wait())
    await asyncio.wait((work, signalled), return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if not work.done():
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return
    await work


def add(app: typer.Typer) -> None:
    for command in (standalone, up, controller, agent):
        app.command()(command)
    app.command("registry-worker", hidden=True)(registry_worker)
