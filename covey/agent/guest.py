"""Inside the guest: the QEMU guest agent, and start scripts as jobs that survive everybody.

The guest agent's own ``guest-exec`` tells output only at the end, cuts it at 16 MB, cannot kill, waits for children
that keep the output open, and forgets its processes when it restarts. So it only launches a job, which is a directory
in the guest named after (instance, epoch):

    /var/tmp/covey-JOB/
        script   the text
        pid      the job's shell, leader of its own session and process group
        out err  what the script wrote
        rc       its exit code, there once the shell has ended (whoever still holds out and err)

`mkdir` decides who launches: a script starts at most once (safety S5). Everything else is reading files, by offsets
that are ours; the guest agent may die and come back meanwhile, and so may this process.
"""

import asyncio
import base64
import contextlib
import ipaddress
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from covey import errors
from covey.agent import qmp, tail

_T = TypeVar("_T")

_CALL_S = 10.0
_CHUNK_BYTES = 256 << 10
_ROUND = 8  # chunks of a stream that are read before one looks up
_POLL_S = 0.1
_LOOK_S = 2.0  # how often a job without an end is asked whether its shell still lives
_BEGIN_S = 10.0  # from the job's directory to its shell
_SILENCE_S = 30.0  # so long may the guest agent be away

# $0: job, stdin: script, arguments: interpreter. Prints the job's directory, whether it launched it or found it.
_LAUNCH = """umask 077
for r in /var/tmp /tmp /run; do [ -d $r ] && [ -w $r ] && break; done
d=$r/covey-$0
mkdir "$d" 2>/dev/null || { [ -d "$d" ] && echo "$d"; exit; }
cd "$d" && cat >script && : >out && : >err || exit 1
setsid sh -c 'd=$0; echo $$ >"$d/pid.new"; mv "$d/pid.new" "$d/pid"; cd /
  "$@" "$d/script" >"$d/out" 2>"$d/err" </dev/null
  echo $? >"$d/rc.new"; mv "$d/rc.new" "$d/rc"' "$d" "$@" >/dev/null 2>&1 </dev/null &
echo "$d"
"""
# The group as a negative number, without a "--" before it: busybox takes that for a number.
_KILL = """read p <"$0/pid" || exit 0
kill -TERM -$p 2>/dev/null
i=0; while [ $i -lt 10 ] && kill -0 -$p 2>/dev/null; do i=$((i+1)); sleep 0.1 2>/dev/null || sleep 1; done
kill -KILL -$p 2>/dev/null
exit 0
"""
_LOOK = """[ -e "$0/rc" ] && exit 0
[ -e "$0/pid" ] || exit 3
read p <"$0/pid"; kill -0 $p 2>/dev/null && exit 2
[ -e "$0/rc" ] && exit 0
exit 4
"""
_ENDED, _RUNS, _NOT_BEGUN = 0, 2, 3
_EXIT_CODE = re.compile(rb"[0-9]{1,3}\s*")


class Interrupted(errors.HypervisorError):
    """The job began, but its end will never be known: the guest rebooted, or its shell was killed."""


class Status(msgspec.Struct, rename={"out": "out-data", "code": "exitcode"}):
    """An answer to guest-exec-status."""

    exited: bool
    code: int = -1
    out: str = ""


class Chunk(msgspec.Struct, rename={"data": "buf-b64"}):
    """An answer to guest-file-read."""

    count: int
    data: str = ""


class Guest:
    """The guest agent of one VM. One connection, one question at a time; opened when needed."""

    def __init__(self, socket: Path, user: int) -> None:
        """`user` is QEMU's: nobody else may listen on `socket`."""
        self._socket = socket
        self._user = user
        self._lock = asyncio.Lock()
        self._connection: qmp.Connection | None = None
        self._syncs = 0

    async def call(self, command: str, *, timeout_s: float = _CALL_S, **arguments: Any) -> Any:
        async with self._lock:
            try:
                if self._connection is None:
                    self._connection = await qmp.connect(
                        self._socket, "the guest agent", self._user, timeout_s=timeout_s
                    )
                    self._syncs += 1
                    await qmp.sync_guest(self._connection, self._syncs, timeout_s)
                return await self._connection.ask(command, arguments, timeout_s=timeout_s)
            except qmp.CommandFailed:
                raise
            except BaseException:
                self.close()
                raise

    async def tell(self, command: str, **arguments: Any) -> None:
        """For commands that are not answered when they succeed."""
        await self.call("guest-ping")
        async with self._lock:
            if self._connection is not None:
                await self._connection.tell(command, arguments)
                await asyncio.sleep(0)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def shell(self, text: str, name: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 15) -> Status:
        """Run a short shell text ($0 is `name`) and wait for it."""
        wanted: dict[str, Any] = {"path": "/bin/sh", "arg": ["-c", text, name, *arguments], "capture-output": True}
        if stdin:
            wanted["input-data"] = base64.b64encode(stdin).decode()
        pid = _convert(await self.call("guest-exec", **wanted), dict[str, int])["pid"]
        async with asyncio.timeout(timeout_s):
            pause_s = 0.01
            while not (status := _convert(await self.call("guest-exec-status", pid=pid), Status)).exited:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S)
        return status

    async def read(self, path: str, limit: int = 4096) -> bytes | None:
        """The beginning of a file in the guest, None when there is none."""
        try:
            handle = await self.call("guest-file-open", path=path, mode="r")
        except qmp.CommandFailed:
            return None
        chunk = _convert(await self.call("guest-file-read", handle=handle, count=limit), Chunk)
        await self.call("guest-file-close", handle=handle)
        return decoded(chunk.data)

    async def address(self) -> str:
        """The guest's first IPv4 address that leads outside; "" while it has none."""
        for card in _convert(await self.call("guest-network-get-interfaces"), list[dict[str, Any]]):
            for entry in _convert(card.get("ip-addresses", []), list[dict[str, Any]]):
                text = str(entry.get("ip-address", ""))
                if entry.get("ip-address-type") == "ipv4" and not _is_local(text):
                    return text
        return ""

    async def boot_id(self) -> str:
        """Changes with every boot of the guest; "" for guests that have none."""
        return (await self.read("/proc/sys/kernel/random/boot_id") or b"").decode("ascii", "replace").strip()


async def launch(guest: Guest, job: str, text: str) -> str:
    """Launch the job unless it was launched before. Its directory in the guest."""
    try:
        status = await guest.shell(_LAUNCH, job, *interpreter(text), stdin=text.encode("utf-8", "surrogateescape"))
    except qmp.CommandFailed as fault:
        raise errors.HypervisorError(
            f"the guest agent does not run programs ({fault}): allow guest-exec in the template's qemu-ga settings"
        ) from fault
    except TimeoutError as fault:
        raise qmp.NoAnswer("the guest did not launch the start script in time") from fault
    directory = decoded(status.out).decode("utf-8", "replace").strip()
    if not directory.endswith(f"/covey-{job}"):
        raise errors.HypervisorError("the guest has no writable place for the start script (/var/tmp, /tmp or /run)")
    return directory


def interpreter(text: str) -> list[str]:
    """What runs the script: its first line's, else sh. Spelled out, as temporary directories are often ``noexec``."""
    first = text.split("\n", 1)[0]
    if first.startswith("#!") and (words := first[2:].split(None, 1)):  # one argument at most, as the kernel has it
        return [word.strip() for word in words]
    return ["/bin/sh"]


class Follower:
    """Follows one launched job to its end, keeping the last of its output in two files of the host."""

    def __init__(self, guest: Guest, directory: str, out: Path, err: Path) -> None:
        self._guest = guest
        self._directory = directory
        self._tails = {"out": tail.Tail(out), "err": tail.Tail(err)}
        self._read = {"out": 0, "err": 0}
        self._handles: dict[str, int] = {}

    async def wait(self, timeout_s: float) -> int | None:
        """The exit code; None when the time was up and the whole process group was killed."""
        clock = asyncio.get_running_loop().time
        try:
            code = await self._wait(clock() + timeout_s)
            await self._drain_to_the_end()
            return code
        finally:
            for kept in self._tails.values():
                kept.close()
            with contextlib.suppress(errors.HypervisorError):
                for handle in self._handles.values():
                    await self._guest.call("guest-file-close", timeout_s=1, handle=handle)

    async def _wait(self, end: float) -> int | None:
        clock = asyncio.get_running_loop().time
        looked = heard = begun = clock()
        while True:
            try:
                code = await self._exit_code()
                if code is not None:
                    return code
                await self._drain()
                heard = clock()
                if clock() >= end:
                    await self._guest.shell(_KILL, self._directory)
                    return None
                if clock() - looked >= _LOOK_S:
                    await self._look(clock() - begun)
                    looked = clock()
            except (qmp.NoAnswer, TimeoutError) as fault:
                # The guest agent was restarted, the guest is busy, or it is gone: the VM's end is noticed elsewhere.
                self._handles.clear()
                if clock() - heard > _SILENCE_S and clock() >= end:
                    raise qmp.NoAnswer("the guest agent went silent while the start script ran") from fault
            await asyncio.sleep(_POLL_S)

    async def _exit_code(self) -> int | None:
        written = await self._guest.read(f"{self._directory}/rc", 16)
        if not written:
            return None
        if not _EXIT_CODE.fullmatch(written):
            raise errors.HypervisorError(f"the guest agent answered nonsense: {written[:40]!r} is no exit code")
        return int(written)

    async def _look(self, age_s: float) -> None:
        state = (await self._guest.shell(_LOOK, self._directory)).code
        if state in (_ENDED, _RUNS) or (state == _NOT_BEGUN and age_s < _BEGIN_S):
            return
        raise Interrupted("the start script was interrupted: the guest rebooted, or the script's shell was killed")

    async def _drain_to_the_end(self) -> None:
        end = asyncio.get_running_loop().time() + _SILENCE_S
        while True:
            try:
                await self._drain(tail.KEPT_BYTES // _CHUNK_BYTES + 1)  # who writes on is not waited for
                return
            except qmp.NoAnswer:
                self._handles.clear()
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(_POLL_S)

    async def _drain(self, chunks: int = _ROUND) -> None:
        """Read what was written since, up to the ends of both streams, but no more than so many chunks of each: a
        script may write faster than we read."""
        for stream in self._tails:
            if stream not in self._handles and not await self._open(stream):
                continue
            for _ in range(chunks):
                if await self._read_some(stream) < _CHUNK_BYTES:
                    break
                await self._skip(stream)

    async def _open(self, stream: str) -> bool:
        try:
            opened = await self._guest.call("guest-file-open", path=f"{self._directory}/{stream}", mode="rb")
        except qmp.CommandFailed:
            return False
        self._handles[stream] = _convert(opened, int)
        await self._skip(stream)
        return True

    async def _read_some(self, stream: str) -> int:
        answer = await self._on_handle("guest-file-read", self._handles[stream], count=_CHUNK_BYTES)
        data = decoded(_convert(answer, Chunk).data)
        self._tails[stream].append(data)
        self._read[stream] += len(data)
        return len(data)

    async def _skip(self, stream: str) -> None:
        """Go to where we were, or to the last part that is kept when more than that was written since."""
        handle = self._handles[stream]
        end = await self._seek(handle, 0, 2)
        if end - self._read[stream] > tail.KEPT_BYTES:
            self._read[stream] = end - tail.KEPT_BYTES
            self._tails[stream].forget(self._read[stream])
        await self._seek(handle, self._read[stream], 0)

    async def _seek(self, handle: int, offset: int, whence: int) -> int:
        answer = await self._on_handle("guest-file-seek", handle, offset=offset, whence=whence)
        return _convert(answer, dict[str, int | bool])["position"]

    async def _on_handle(self, command: str, handle: int, **arguments: int) -> Any:
        try:
            return await self._guest.call(command, handle=handle, **arguments)
        except qmp.CommandFailed as fault:  # a guest agent that was restarted knows no handles of its former life
            raise qmp.NoAnswer(str(fault)) from fault


def _convert(value: Any, kind: type[_T]) -> _T:
    """What the guest said, as the type it must have."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as fault:
        raise errors.HypervisorError(f"the guest agent answered nonsense: {fault}") from fault


def decoded(data: str) -> bytes:
    """Bytes from the guest agent's base64."""
    try:
        return base64.b64decode(data)
    except ValueError as fault:
        raise errors.HypervisorError(f"the guest agent answered nonsense: {fault}") from fault


def _is_local(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return True
    return address.is_loopback or address.is_link_local
