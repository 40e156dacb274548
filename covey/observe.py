"""Logs: sentences with fields, one line per transition, JSON on stdout (or for people, on a terminal).

Secrets never reach a log: fields named in `HIDDEN` are replaced before rendering.
"""

import logging
import sys
from typing import Any

import structlog

HIDDEN = frozenset({"secret", "password", "token", "authorization", "vnc_password", "startup_script"})


def _hide(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for name in HIDDEN & event.keys():
        event[name] = "(hidden)"
    return event


def configure(*, json: bool | None = None, level: str = "info") -> None:
    """Set up logging for one process; `json` defaults to True unless stderr is a terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=True) if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _hide,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def log(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry ``part=name``."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger
