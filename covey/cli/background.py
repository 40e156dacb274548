"""The node's agent in the background: its saved settings, its lock, and how it is started and stopped.

Below DATA_DIR/agent: agent.env (the settings it was joined with, one COVEY_X="…" per line, also read by systemd),
agent.lock (held by the running agent, its process id inside; the kernel frees it, so it is never stale), agent.pid (the
detached process that was started last), agent.log.

Where systemd runs (and we are root) the agent is the unit covey-agent.service; else a detached process.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from covey import errors

_UNIT = Path("/etc/systemd/system/covey-agent.service")
_STOP_S = 30.0
_ASKED_S = 0.5


def folder(data_dir: Path) -> Path:
    """Where everything of the node's agent is."""
    return data_dir / "agent"


def _made(data_dir: Path) -> Path:
    """The agent's folder, made if need be. Raises SettingError."""
    try:
        folder(data_dir).mkdir(parents=True, exist_ok=True, mode=0o711)
    except OSError as error:
        raise _unusable(data_dir, error) from error
    return folder(data_dir)


def _unusable(data_dir: Path, error: OSError) -> errors.SettingError:
    return errors.SettingError(
        f"DATA_DIR {data_dir} cannot be written ({error.strerror}): choose another with --data-dir"
    )


# ---- the lock --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_agent(data_dir: Path) -> Iterator[None]:
    """Held by `covey agent` as long as it runs. Raises SettingError when one runs on this data directory already."""
    try:
        lock = _lock(data_dir)
    except BlockingIOError:
        raise errors.SettingError(
            f"an agent runs on {data_dir} already (process {running_pid(data_dir)}): "
            "stop it with `covey leave`, or choose another place with --data-dir"
        ) from None
    except OSError as error:
        raise _unusable(data_dir, error) from error
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(lock)


def _lock(data_dir: Path) -> int:
    """Take the lock. Who only asks whether an agent runs (`running_pid`) holds it for a moment: that is waited out."""
    from covey import durable

    end = time.monotonic() + _ASKED_S
    while True:
        try:
            return durable.lock(_made(data_dir) / "agent.lock")
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


def running_pid(data_dir: Path) -> int:
    """The process id of the agent on this data directory; 0 when none runs."""
    try:
        lock = os.open(folder(data_dir) / "agent.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    except OSError as error:  # a file in the directory's place
        raise _unusable(data_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not take each other for the agent
    except BlockingIOError:
        return int(os.read(lock, 20).strip() or b"-1")
    else:
        return 0
    finally:
        os.close(lock)


# ---- saved settings --------------------------------------------------------------------------------------------


def save(data_dir: Path, variables: Mapping[str, str]) -> Path:
    """Keep the settings of this join; a crash leaves the old ones or the new ones."""
    file = _made(data_dir) / "agent.env"
    from covey import durable

    lines = (f"{name}={_quoted(value)}\n" for name, value in sorted(variables.items()))
    try:
        durable.replace(file, "".join(lines).encode())
    except OSError as error:
        raise _unusable(data_dir, error) from error
    return file


def saved(data_dir: Path) -> dict[str, str]:
    """The settings of the last join; empty when there was none."""
    try:
        lines = (folder(data_dir) / "agent.env").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name: "".join(shlex.split(value)) for name, _, value in pairs}


def forget(data_dir: Path) -> None:
    """The node has left: a later join is a new node. The image cache stays."""
    for name in ("agent.env", "node.json", "controllers.json", "spare", "joining", "agent.pid"):
        (folder(data_dir) / name).unlink(missing_ok=True)


def mark_explicit(data_dir: Path) -> None:
    """The next start is an operator's wish: it may take the node over without the last secret (safety S7)."""
    (folder(data_dir) / "joining").touch()


def take_explicit(data_dir: Path) -> bool:
    """Whether this start is the one an operator asked for. True once."""
    try:
        (folder(data_dir) / "joining").unlink()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def unless_it_fails(data_dir: Path) -> Iterator[None]:
    """A join: when it fails, what it made is removed, the settings before it hold again, and so does their agent."""
    made_dirs = [path for path in (folder(data_dir), *folder(data_dir).parents) if not path.exists()]
    names = {path.name for path in folder(data_dir).glob("*")}
    before, ran = saved(data_dir), running_pid(data_dir) > 0
    try:
        yield
    except BaseException:
        with contextlib.suppress(errors.SettingError):  # of a directory that cannot be used: the fault is known
            stop(data_dir)
            take_explicit(data_dir)
            if not _joined(data_dir):
                _undo(data_dir, names, made_dirs)
            if before:
                save(data_dir, before)
            if ran:
                start(data_dir, lambda: running_pid(data_dir) > 0)
        raise


def _joined(data_dir: Path) -> bool:
    """Whether there is a node here: then something may run, and its files are needed."""
    from covey import world
    from covey.agent import identity

    return bool(identity.File(folder(data_dir), world.System()).now.node)


def _undo(data_dir: Path, names: set[str], made_dirs: list[Path]) -> None:
    """Remove what is new. No VM is started before a node has joined."""
    for path in folder(data_dir).glob("*"):
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in made_dirs:
        with contextlib.suppress(OSError):
            path.rmdir()


def _quoted(value: str) -> str:
    if "\n" in value:
        raise errors.SettingError(f"a setting may not contain a line break: {value!r}")
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


# ---- start and stop --------------------------------------------------------------------------------------------


def start(data_dir: Path, ready: Callable[[], bool], timeout_s: float = 60.0) -> str:
    """Start the agent in the background and wait until it is `ready`; how it runs, in words. Raises SettingError with
    the agent's own last line when it ends instead."""
    if _systemd():
        return _start_unit(data_dir, ready, timeout_s)
    log = folder(data_dir) / "agent.log"
    with log.open("ab") as output:
        offset = output.tell()
        agent = subprocess.Popen(
            [sys.executable, "-m", "covey", "agent"],
            env={**os.environ, **saved(data_dir)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    (folder(data_dir) / "agent.pid").write_text(f"{agent.pid}\n")
    deadline = time.monotonic() + timeout_s
    while not ready():
        if agent.poll() is not None:
            raise errors.SettingError(_last_line(log, offset) or f"the agent ended with exit code {agent.returncode}")
        if time.monotonic() > deadline:
            agent.terminate()
            agent.wait()
            last = _last_line(log, offset)
            raise errors.SettingError(f"the agent was not ready within {timeout_s:.0f} s; it said last: {last}")
        time.sleep(0.05)
    return f"process {agent.pid}, log {log}"


def is_ours(data_dir: Path, pid: int) -> bool:
    """Whether the running agent was started here, by an earlier join."""
    if _unit_is_ours(data_dir):
        return True
    try:
        return int((folder(data_dir) / "agent.pid").read_text()) == pid
    except (FileNotFoundError, ValueError):
        return False


def stop(data_dir: Path) -> bool:
    """Stop the agent; VMs go on. False when none runs."""
    if _unit_is_ours(data_dir):
        _call("systemctl", "disable", "--now", _UNIT.name)
        _UNIT.unlink()
        _call("systemctl", "daemon-reload")
        return True
    pid = running_pid(data_dir)
    if pid <= 0:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while running_pid(data_dir) == pid:
        if time.monotonic() > deadline:
            raise errors.SettingError(f"the agent (process {pid}) did not stop within {_STOP_S:.0f} s")
        time.sleep(0.05)
    (folder(data_dir) / "agent.pid").unlink(missing_ok=True)
    return True


def _unit_is_ours(data_dir: Path) -> bool:
    return _systemd() and _UNIT.exists() and is_unit_of(data_dir, _UNIT.read_text("utf-8"))


def is_unit_of(data_dir: Path, unit: str) -> bool:
    """Whether this unit is of the agent on this data directory, and of no other."""
    return _settings_line(data_dir) in unit.splitlines()


def _settings_line(data_dir: Path) -> str:
    return f"EnvironmentFile={folder(data_dir) / 'agent.env'}"


def _systemd() -> bool:
    return os.geteuid() == 0 and Path("/run/systemd/system").is_dir()


def _start_unit(data_dir: Path, ready: Callable[[], bool], timeout_s: float) -> str:
    """KillMode=process: VMs survive the agent, also its restart."""
    _UNIT.write_text(
        f"""[Unit]
Description=Covey agent
After=network-online.target
Wants=network-online.target

[Service]
{_settings_line(data_dir)}
ExecStart={sys.executable} -m covey agent
Restart=always
RestartSec=2
KillMode=process

[Install]
WantedBy=multi-user.target
"""
    )
    _call("systemctl", "daemon-reload")
    _call("systemctl", "enable", _UNIT.name)
    _call("systemctl", "restart", _UNIT.name)
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise errors.SettingError(
                f"the agent was not ready within {timeout_s:.0f} s; see journalctl -u {_UNIT.name}"
            )
        time.sleep(0.1)
    return f"unit {_UNIT.name}, log in the journal"


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise errors.SettingError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _last_line(log: Path, offset: int) -> str:
    """What the agent said last, since this start."""
    with log.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].removeprefix("covey: ") if lines else ""
