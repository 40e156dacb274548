"""Logs: sentences with fields, one line per transition, JSON on stderr (or for people, on a terminal).

Given a directory, each line also goes, always as JSON, to a file there. The file is opened again when it is no longer
where it was, so logrotate may move it away and needs to signal nobody. A log file that cannot be written costs lines in
it, and one line on stderr, never the program.

Secrets never reach a log: fields named in `HIDDEN` are replaced before rendering.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

import structlog

HIDDEN = frozenset({"secret", "password", "token", "authorization", "vnc_password", "startup_script"})


def _hide(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for name in HIDDEN & event.keys():
        event[name] = "(hidden)"
    return event


class File:
    """Log lines appended to `path`, which others may move away or remove at any time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be opened."""
        self._path = path
        self._render = structlog.processors.JSONRenderer(ensure_ascii=True)
        self._failed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = self._open()

    def __call__(self, logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """As a processor: writes a copy of the line and passes it on."""
        line = self._render(logger, method, dict(event))
        try:
            self._append(line.encode() if isinstance(line, str) else line)
        except OSError as error:
            if not self._failed:
                sys.stderr.write(f"covey: {self._path} cannot be written: {error.strerror}\n")
            self._failed = True
        else:
            self._failed = False
        return event

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is None or not self._in_place(self._file):
            self.close()
            self._file = self._open()
        os.write(self._file, line + b"\n")  # one call: the lines of several processes do not mix

    def _in_place(self, file: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        return False

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


class _Stderr:
    """Standard error as it is when a line is written: a logger that is kept follows whoever redirects it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(*, json: bool | None = None, level: str = "info", file: File | None = None) -> None:
    """Set up logging for one process; `json` defaults to True unless stderr is a terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=True) if as_json else structlog.dev.ConsoleRenderer()
    )
    copies: tuple[structlog.typing.Processor, ...] = () if file is None else (file,)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hide,
            structlog.processors.format_exc_info,
            *copies,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
        cache_logger_on_first_use=True,
    )


def log(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry ``part=name``."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger
