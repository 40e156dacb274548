"""Named places where a test may stop the program, as a crash or a fault would.

``COVEY_FAILPOINTS=agent.forking=kill,registry.link=error`` arms them at start; unarmed, `reach` is one dict look-up.
Actions: ``kill`` (SIGKILL to ourselves: nothing is flushed), ``error`` (raises OSError EIO), ``full`` (raises OSError
ENOSPC), ``stop`` (SIGSTOP to ourselves: a frozen process). A simulation, which has no processes, hears of all points
by `watch`.
"""

import errno
import os
import signal
from collections.abc import Callable

from covey import errors

_ACTIONS = ("kill", "error", "full", "stop")
_armed: dict[str, str] = {}
_watcher: Callable[[str], None] | None = None


def arm(text: str) -> None:
    """Arm the points named in `text` (``name=action[,name=action]``); an empty text disarms all."""
    _armed.clear()
    for part in filter(None, text.split(",")):
        name, _, action = part.partition("=")
        if action not in _ACTIONS:
            raise errors.SettingError(
                f"FAILPOINTS: {part!r} wants name=action with action one of {', '.join(_ACTIONS)}"
            )
        _armed[name] = action


def watch(watcher: Callable[[str], None] | None) -> None:
    """Tell `watcher` of every point that is reached; it may raise there. None: tell nobody."""
    global _watcher
    _watcher = watcher


def reach(name: str) -> None:
    """Mark that the program is at `name`; does what is armed for it."""
    if _watcher is not None:
        _watcher(name)
    action = _armed.get(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        code = errno.ENOSPC if action == "full" else errno.EIO
        raise OSError(code, os.strerror(code), f"failpoint {name}")
