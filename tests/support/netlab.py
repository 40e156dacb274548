"""Hosts on one machine, a switch between them, and faults: cut, one-way cut, isolation, loss, delay, a pulled cable.

    with netlab.Lab(["e1", "e2", "lb", "load"]) as lab:        # root, and no other set-up
        server = lab["lb"].spawn(["haproxy", "-f", file], log=path)
        lab.cut("e1", "e2", one_way=True)                      # what e1 sends does not reach e2
        lab.isolate("e1")
        lab.heal()
        lab["load"].call(lambda: urllib.request.urlopen(url))  # code of this process on that host's network
        server.stop()                                          # SIGSTOP; .cont(), .kill(), .term(), .wait()
        lab["lb"].crash()                                      # power off: the cable is dead, nothing says goodbye

Each host is an anonymous network, process, mount and host-name namespace that one `unshare` holds. Nothing has a name
outside, so labs run side by side, and clean-up needs no code: the holder dies with the test runner (PR_SET_PDEATHSIG),
and with it every process of the host, detached daemons too, its network cards and the switch. Hosts share the
machine's files.

Two switches. The usual one is a kernel bridge with nft rules: full speed, no delay. `tap=True` passes every frame
through this process, which can also delay, throttle and repeat frames (many kernels have no netem): about 1 Gbit/s.

Traps that this module steps around: PDEATHSIG fires when the *thread* that started a process ends, so all starts are
made from the main thread; `nsenter` stops itself when its child is stopped, so both are continued; and inside a process
namespace the pid of `ip link … netns PID` means something else, so cards are moved from outside of it.
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Protocol, Self, TypeVar

from tests.support import netlab_tap

T = TypeVar("T")

NETWORK = "198.18.77"  # of the range for benchmarks (RFC 2544): no route leaves the namespaces
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_ANONYMOUS = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")
_HOLDER = """
hostname {name}; ip link set lo up; echo ready; exec 2>/dev/null
trap : CHLD; while :; do sleep 3600 & wait $!; done
"""
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab itself could not do it; the text is the tool's."""


def environment(**more: str) -> dict[str, str]:
    """What a program in the lab sees: none of the settings that were made around the tests, but the mark of the run."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("COVEY_", "ANKA_")) or n == "COVEY_TEST_RUN"}
    return {**kept, **more}


class Process:
    """One program on a host. `pid` is its own, as the machine outside sees it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = self._find()

    def _find(self) -> int:
        """nsenter's only child is the program; it is there at once, or the program has ended already."""
        children = pathlib.Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
        while self._popen.poll() is None:
            if words := children.read_text().split():
                return int(words[0])
            time.sleep(0.001)
        return 0

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        """To the program alone, not to what it started. One that has ended hears nothing."""
        if self.pid and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        if number in (signal.SIGKILL, signal.SIGCONT):
            self.wake_waiter()

    def wake_waiter(self) -> None:
        if self.running:
            self._popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and its end."""
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def stop(self) -> None:
        """SIGSTOP: its sockets stay open and nothing answers."""
        self.signal(signal.SIGSTOP)

    def cont(self) -> None:
        self.signal(signal.SIGCONT)

    def term(self) -> None:
        """SIGTERM; does not wait."""
        self.signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code; negative when a signal ended it."""
        return self._popen.wait(timeout_s)


class Host:
    """One host: its own network card `eth0`, process ids and host name."""

    def __init__(self, name: str, ip: str) -> None:
        self.name, self.ip = name, ip
        self._held = _start(
            [*_ANONYMOUS, "sh", "-c", _HOLDER.format(name=name)],
            stdout=subprocess.PIPE,
        )
        assert self._held.stdout is not None
        if self._held.stdout.readline().strip() != b"ready":
            raise LabError(f"host {name} could not be made; are we root?")
        self.holder = int(pathlib.Path(f"/proc/{self._held.pid}/task/{self._held.pid}/children").read_text().split()[0])
        self._processes: list[Process] = []
        self._card: Callable[[bool], None] = lambda up: None  # the cable, once the switch has one for us
        self._off = False

    def inside(self, argv: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
        """What starts a command here, for those who start it by themselves."""
        return ["nsenter", "-t", str(self.holder), "-n", "-p", "-m", "-u", "--", *(os.fspath(word) for word in argv)]

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, check: bool = True, timeout_s: float = 60, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end. Raises LabError with its complaint unless `check` is off."""
        done = subprocess.run(
            self.inside(argv), env=environment(**env), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode:
            raise LabError(f"{self.name}: {' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def spawn(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        log: pathlib.Path | None = None,
    ) -> Process:
        """Start a program that stays; its output is added to `log`. A host that was off is switched on."""
        self.boot()
        self._processes = [process for process in self._processes if process.running]
        with contextlib.ExitStack() as files:
            out: int | IO[bytes] = subprocess.DEVNULL if log is None else files.enter_context(log.open("ab"))
            chosen = environment() if env is None else dict(env)
            process = Process(_start(self.inside(argv), stdout=out, stderr=subprocess.STDOUT, env=chosen))
        self._processes.append(process)
        return process

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread of this process whose new sockets belong to this host's network."""
        return self.calling(work)()

    def calling(self, work: Callable[[], T]) -> Callable[[], T]:
        """The same, begun now; what is returned waits for its end and gives its result (or raises its error)."""
        results: list[T] = []
        faults: list[BaseException] = []

        def body() -> None:
            try:
                self._enter_network()
                results.append(work())
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=body, name=f"on {self.name}", daemon=True)
        thread.start()

        def wait() -> T:
            thread.join()
            if faults:
                raise faults[0]
            return results[0]

        return wait

    def _enter_network(self) -> None:
        """Network namespaces belong to threads; this moves the calling one."""
        file = os.open(f"/proc/{self.holder}/ns/net", os.O_RDONLY)
        try:
            if _libc.setns(file, _CLONE_NEWNET):
                raise LabError(f"{self.name}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(file)

    def crash(self) -> None:
        """Power off: first the cable, so that no connection is closed in order, then every process at once. Files stay
        as they are; addresses that programs had added are gone."""
        self._card(False)
        self._off = True
        self.run(["sh", "-c", "kill -KILL -1"], check=False)  # all of this process namespace but its first
        for process in self._processes:
            process.wake_waiter()
            process.wait(10)
        self._processes.clear()
        self.run(["ip", "addr", "flush", "dev", "eth0"])

    @property
    def off(self) -> bool:
        """After `crash`, until `boot`."""
        return self._off

    def boot(self) -> None:
        """Power on again; nothing runs yet. Without effect on a host that is on."""
        if self._off:
            self._off = False
            self.run(["ip", "addr", "add", f"{self.ip}/24", "dev", "eth0"])
            self._card(True)

    def connect(self, card: Callable[[bool], None]) -> None:
        """For switches: `card(up)` plugs the cable in or pulls it."""
        self._card = card

    def pull(self, *, out: bool = True) -> None:
        self._card(not out)

    def close(self) -> None:
        """Everything of it ends now. The kernel kills the whole process namespace with its first process."""
        self._held.kill()
        self._held.wait()
        if self._held.stdout is not None:
            self._held.stdout.close()
        for process in self._processes:
            process.wake_waiter()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self._processes.clear()


class Switch(Protocol):
    """What carries frames between hosts. Rules add up until `clear`."""

    def drop(self, source: str, target: str, percent: float) -> None: ...

    def shape(self, source: str, target: str, shape: netlab_tap.Shape) -> None: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


class Lab:
    """The hosts by name, in one network, and the faults between them."""

    def __init__(self, names: Sequence[str], *, tap: bool = False, seed: int = 0) -> None:
        self.hosts: dict[str, Host] = {}
        self._switch: Switch | None = None
        try:
            for number, name in enumerate(names, 1):
                self.hosts[name] = Host(name, f"{NETWORK}.{number}")
            self._switch = _Taps(self.hosts, seed) if tap else _Bridge(self.hosts)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        if self._switch is not None:
            self._switch.close()
            self._switch = None

    @property
    def switch_pid(self) -> int:
        """A process in whose network namespace the bridge is, for faults by hand (`nsenter -t … -n nft`)."""
        assert isinstance(self.switch, _Bridge)
        return self.switch.host.holder

    @property
    def switch(self) -> Switch:
        if self._switch is None:
            raise LabError("the lab is closed")
        return self._switch

    def cut(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Nothing passes between `a` and `b`; with `one_way` only what `a` sends to `b` is lost."""
        self.loss(a, b, 100, one_way=one_way)

    def isolate(self, *side: str) -> None:
        """The hosts of `side` reach each other, and nobody else."""
        for inside in side:
            for outside in self.hosts.keys() - set(side):
                self.cut(inside, outside)

    def loss(self, a: str, b: str, percent: float, *, one_way: bool = False) -> None:
        """This share of the packets between `a` and `b` is lost."""
        for source, target in _directions(a, b, one_way):
            self.switch.drop(source, target, percent)

    def slow(
        self,
        a: str,
        b: str,
        *,
        delay_s: float = 0,
        jitter_s: float = 0,
        rate_bytes_s: float = 0,
        repeated: float = 0,
        one_way: bool = False,
    ) -> None:
        """Each direction is delayed by `delay_s` ± `jitter_s`, carries at most `rate_bytes_s`, and delivers a share of
        its packets twice. Needs tap=True."""
        for source, target in _directions(a, b, one_way):
            self.switch.shape(source, target, netlab_tap.Shape(delay_s, jitter_s, rate_bytes_s, repeated))

    def limit(self, name: str, shape: Sequence[str]) -> None:
        """What reaches the host passes this queueing discipline (`tc`). Its own card is the host's to limit."""
        assert isinstance(self.switch, _Bridge)
        self.switch.limit(name, shape)

    def unplug(self, name: str) -> None:
        """Pull the cable; `heal` plugs it in again."""
        self.hosts[name].pull()

    def heal(self) -> None:
        """No faults between hosts any more. Hosts that are off stay off."""
        self.switch.clear()
        for host in self.hosts.values():
            if not host._off:
                host.pull(out=False)


def _directions(a: str, b: str, one_way: bool) -> Iterator[tuple[str, str]]:
    yield a, b
    if not one_way:
        yield b, a


class _Bridge:
    """A kernel bridge in a namespace of its own. One rule a direction, in the chain that forwarded frames pass."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self.host = Host("switch", "")
        try:
            self._tool("ip", "link", "add", "br0", "type", "bridge")
            self._tool("ip", "link", "set", "br0", "up")
            for name, host in hosts.items():
                self._plug(name, host)
            self._nft("add table bridge lab\nadd chain bridge lab faults { type filter hook forward priority 0; }")
        except BaseException:
            self.close()
            raise

    def _plug(self, name: str, host: Host) -> None:
        port = f"p-{name}"
        peer = ("peer", "name", "eth0", "netns", str(host.holder))
        self._tool("ip", "link", "add", port, "type", "veth", *peer)
        self._tool("ip", "link", "set", port, "master", "br0", "up")
        host.run(["ip", "addr", "add", f"{host.ip}/24", "dev", "eth0"])
        host.run(["ip", "link", "set", "eth0", "up"])
        host.connect(lambda up: self._tool("ip", "link", "set", port, "up" if up else "down"))

    def _tool(self, *argv: str, text: str = "") -> None:
        """In the network namespace only: a pid on the command line is the machine's."""
        command = ["nsenter", "-t", str(self.host.holder), "-n", "--", *argv]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=90, check=False)
        if done.returncode:
            raise LabError(f"{' '.join(argv)}: {done.stderr.strip()} {text}")

    def _nft(self, text: str) -> None:
        self._tool("nft", "-f", "-", text=text)

    def drop(self, source: str, target: str, percent: float) -> None:
        share = "" if percent >= 100 else f"numgen random mod 1000 < {round(percent * 10)} "
        self._nft(f'add rule bridge lab faults iifname "p-{source}" oifname "p-{target}" {share}drop')

    def limit(self, name: str, shape: Sequence[str]) -> None:
        self._tool("tc", "qdisc", "replace", "dev", f"p-{name}", *shape)

    def shape(self, source: str, target: str, shape: netlab_tap.Shape) -> None:
        raise LabError("this switch knows no delay; make the lab with tap=True")

    def clear(self) -> None:
        self._nft("flush chain bridge lab faults")

    def close(self) -> None:
        self.host.close()


class _Taps:
    """Every card is a TAP device of its host; a thread of this process passes the frames on."""

    def __init__(self, hosts: Mapping[str, Host], seed: int) -> None:
        self._wires = netlab_tap.Wires(seed)
        try:
            for number, (name, host) in enumerate(hosts.items(), 1):
                mac = f"02:00:00:00:00:{number:02x}"
                self._wires.add(name, bytes.fromhex(mac.replace(":", "")), host.call(netlab_tap.open_card))
                host.run(["ip", "link", "set", "eth0", "address", mac])
                host.run(["ip", "addr", "add", f"{host.ip}/24", "dev", "eth0"])
                host.run(["ip", "link", "set", "eth0", "up"])
                host.connect(functools.partial(self._wires.cable, name))
            self._wires.start()
        except BaseException:
            self.close()
            raise

    def drop(self, source: str, target: str, percent: float) -> None:
        self._wires.drop(source, target, percent / 100)

    def shape(self, source: str, target: str, shape: netlab_tap.Shape) -> None:
        self._wires.shape(source, target, shape)

    def clear(self) -> None:
        self._wires.clear()

    def close(self) -> None:
        self._wires.close()


def _start(
    argv: Sequence[str],
    *,
    stdout: int | IO[bytes],
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    if threading.current_thread() is not threading.main_thread():
        raise LabError("start programs from the main thread: they would end together with any other")
    return subprocess.Popen(
        [*_DIES_WITH_US, *argv],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment() if env is None else dict(env),
        start_new_session=True,  # Ctrl-C is ours alone
    )
