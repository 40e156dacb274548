"""How one setting is found and read: the way from text to typed values, and every refusal on it.

`settings` says which program reads what; `settings_table` declares the rows. Nothing here knows a program.
"""

import difflib
import ipaddress
import os
import re
import tomllib
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from covey import errors, settings_table

Part = settings_table.Part
Kind = settings_table.Kind
TABLE = settings_table.TABLE

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Flags = Mapping[str, object]  # setting name -> value as typed; None: not given


class Address(msgspec.Struct, frozen=True):
    """Where to listen. `host` "": every interface. Port 0: a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


# ---- how values are written ------------------------------------------------------------------------------------

_UNITS_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)


def duration_s(text: str) -> float:
    """Seconds of a duration in Go's syntax (``1m30s``). Raises ValueError."""
    if text == "0":
        return 0.0
    total_ns, end = 0.0, 0
    for match in _DURATION.finditer(text):
        if match.start() != end:
            break
        total_ns += float(match[1]) * _UNITS_NS[match[2]]
        end = match.end()
    if not text or end != len(text):
        raise ValueError(text)
    return total_ns / 10**9


def address(text: str) -> Address:
    """An address from ``host:port``, ``[v6]:port`` or ``:port``. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(text)
    if host.startswith("["):
        if not host.endswith("]"):
            raise ValueError(text)
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(text)
    return Address(host, int(port))


def url(text: str) -> str:
    """A base URL; ``http://`` is added when no scheme is given. Raises ValueError."""
    whole = text if "://" in text else f"http://{text}"
    if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/:@\[\]]+)(:\d{1,5})?(/\S*)?", whole):
        raise ValueError(text)
    if (urllib.parse.urlsplit(whole).port or 0) > 65535:  # raises ValueError itself, too
        raise ValueError(text)
    return whole.rstrip("/")


def host_port(endpoint: str) -> str:
    return endpoint.removeprefix("http://").removeprefix("https://").rstrip("/")


# ---- reading ---------------------------------------------------------------------------------------------------


class _Value(NamedTuple):
    text: str
    source: str  # how the user would find it: COVEY_X, --x, covey.toml: x


class Reader:
    """One program's view of flags, environment and file. Checks what must stop the start when it is made."""

    def __init__(self, part: Part, environ: Mapping[str, str], flags: Flags) -> None:
        self._part = part
        self._environ = environ
        self._flags = {name: value for name, value in flags.items() if value is not None}
        self._rows = {row.name: row for row in TABLE if part in row.parts}
        self._file_name, self._file = _read_file(environ)
        self._notices = [*_strangers(environ), *self._file_strangers()]
        if part is not Part.CLIENT:
            self._check_unbuilt()

    # ---- where a value comes from

    def find(self, name: str) -> _Value | None:
        """The value that wins, and where it is from; None when the default holds."""
        row = self._rows[name]
        if name in self._flags:
            return _Value(_as_text(self._flags[name]), "--" + name.lower().replace("_", "-"))
        for prefix in ("COVEY_", "ANKA_"):
            for spelled in (name, *row.aliases):
                if text := self._environ.get(prefix + spelled, "").strip():
                    return _Value(text, prefix + spelled)
        for table, where in ((self._file.get(self._part.value), f"[{self._part.value}] "), (self._file, "")):
            if isinstance(table, dict):
                for spelled in (name, *row.aliases):
                    if spelled.lower() in table:
                        return _Value(_as_text(table[spelled.lower()]), f"{self._file_name}: {where}{spelled.lower()}")
        return None

    def raw(self, name: str) -> str:
        found = self.find(name)
        return self._rows[name].default if found is None else found.text

    def _bad(self, name: str, wanted: str) -> errors.SettingError:
        found = self.find(name)
        source = name if found is None else found.source
        shown = "(hidden)" if self._rows[name].secret or found is None else repr(found.text)
        return errors.SettingError(f"{source}: {shown} is not {wanted}")

    # ---- by kind

    def text(self, name: str) -> str:
        """The text as given; a default that is a description (it has a blank, or is worked out) reads as ""."""
        found = self.find(name)
        if found is not None:
            return found.text
        default = self._rows[name].default
        return "" if " " in default else default

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise self._bad(name, f"one of: {', '.join(choices)}")
        return value

    def switch(self, name: str) -> bool:
        value = self.raw(name).lower()
        if value in ("true", "1", "yes", "on", "t"):
            return True
        if value in ("false", "0", "no", "off", "f"):
            return False
        raise self._bad(name, "true or false")

    def number(self, name: str) -> int:
        value = self.raw(name)
        if not re.fullmatch(r"[0-9]{1,9}", value):
            raise self._bad(name, "a whole number, 0 or more")
        return int(value)

    def share(self, name: str) -> float:
        value = self.raw(name)
        if not re.fullmatch(r"[0-9]*\.?[0-9]+", value) or float(value) > 1:
            raise self._bad(name, "a number from 0 to 1")
        return float(value)

    def duration(self, name: str) -> float:
        try:
            return duration_s(self.raw(name))
        except ValueError:
            raise self._bad(name, "a duration such as 30s, 2m or 1m30s") from None

    def positive(self, name: str) -> float:
        value = self.duration(name)
        if value <= 0:
            raise self._bad(name, "a duration above 0, such as 5s")
        return value

    def items(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text(name).split(",") if part.strip())

    def networks(self, name: str) -> tuple[Network, ...]:
        """Addresses are networks of one."""
        try:
            return tuple(ipaddress.ip_network(part, strict=False) for part in self.items(name))
        except ValueError:
            raise self._bad(name, "a comma separated list of addresses or networks such as 10.0.0.0/24") from None

    def urls(self, name: str) -> tuple[str, ...]:
        if self.find(name) is None and not self._rows[name].default.startswith("http"):
            return ()
        try:
            return tuple(url(part) for part in self.items(name))
        except ValueError:
            raise self._bad(name, "a comma separated list of URLs such as http://host:8090") from None

    def one_url(self, name: str) -> str:
        """ "" when it is not set."""
        found = self.urls(name)
        if len(found) > 1:
            raise errors.SettingError(f"{name}={self.text(name)} is more than one URL: give one")
        return next(iter(found), "")

    def listen(self, name: str) -> Address:
        """An address to listen on; one that other machines reach must be allowed, as nobody has to log in."""
        try:
            where = address(self.raw(name))
        except ValueError:
            raise self._bad(name, "an address such as 127.0.0.1:8090 or :80") from None
        if where.loopback:
            return where
        if not self.switch("ALLOW_ANONYMOUS"):
            raise errors.SettingError(
                f"{name} {where} is reachable from other machines and nobody has to log in: "
                "listen on 127.0.0.1, or set COVEY_ALLOW_ANONYMOUS=true if that network is trusted"
            )
        self._notices.append(f"Anyone who reaches {where} controls this cloud: authentication is off")
        return where

    def place(self, name: str) -> Address | None:
        """An address to listen on where a caller shows who it is; None when it is not set."""
        if self.find(name) is None:
            return None
        try:
            return address(self.raw(name))
        except ValueError:
            raise self._bad(name, "an address such as 10.0.0.7:8091 or :8091") from None

    def path(self, name: str) -> Path | None:
        found = self.find(name)
        return None if found is None else Path(os.path.abspath(os.path.expanduser(found.text)))

    def file(self, name: str) -> Path | None:
        where = self.path(name)
        if where is not None and not os.access(where, os.R_OK):
            raise self._bad(name, "a file that can be read")
        return where

    def data_dir(self) -> Path:
        if (given := self.path("DATA_DIR")) is not None:
            return given
        return Path("/var/lib/covey") if os.geteuid() == 0 else Path(os.path.expanduser("~/.local/share/covey"))

    def common(self) -> dict[str, Any]:
        """The fields that every program has; called last, when all notices are gathered."""
        level = self.one_of("LOG_LEVEL", ("debug", "info", "warning", "error"))
        as_json = self.one_of("LOG_JSON", ("auto", "true", "false"))
        return {
            "failpoints": self.text("FAILPOINTS"),
            "log_level": level,
            "log_json": None if as_json == "auto" else as_json == "true",
            "log_dir": self.path("LOG_DIR"),
            "notices": tuple(dict.fromkeys(self._notices)),
        }

    # ---- what stops the start, and what is only said

    def _check_unbuilt(self) -> None:
        for row in self._rows.values():
            found = self.find(row.name)
            if found is None:
                continue
            if row.without_effect:
                self._notices.append(f"{found.source} has no effect: {row.without_effect}")
            if not row.unbuilt:
                continue
            if not self._is_default(row, found.text):
                raise errors.SettingError(f"{found.source} is set, but {row.unbuilt}: unset it to start without")

    def _is_default(self, row: settings_table.Setting, text: str) -> bool:
        if row.kind is Kind.SWITCH:
            return not self.switch(row.name)
        if row.kind is Kind.DURATION:
            return self.duration(row.name) == duration_s(row.default)
        return text == row.default

    def _file_strangers(self) -> list[str]:
        known = {spelled.lower() for row in TABLE for spelled in (row.name, *row.aliases)}
        parts = {part.value for part in Part}
        strangers: list[str] = []
        for key, value in self._file.items():
            if key in parts and isinstance(value, dict):
                strangers += [inner for inner in value if inner not in known]
            elif key not in known:
                strangers.append(key)
        return [f"{self._file_name}: {key} is not a setting and is ignored{_near(key, known)}" for key in strangers]


def _read_file(environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The settings file's name and content. A file that was named must exist."""
    named = environ.get("COVEY_CONFIG") or environ.get("ANKA_CONFIG")
    name = named or settings_table.CONFIG_DEFAULT
    try:
        return name, tomllib.loads(Path(name).read_text("utf-8"))
    except FileNotFoundError:
        if named:
            raise errors.SettingError(f"COVEY_CONFIG: there is no file {name}") from None
        return name, {}
    except (OSError, UnicodeDecodeError) as error:
        raise errors.SettingError(f"the settings file {name} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise errors.SettingError(f"the settings file {name} is not TOML: {error}") from error


# Kubernetes puts these into every container beside a service whose name begins with covey or anka.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")


def _strangers(environ: Mapping[str, str]) -> list[str]:
    """One line for each variable that looks like ours and is not."""
    known = {spelled for row in TABLE for spelled in (row.name, *row.aliases)} | {settings_table.CONFIG}
    notices: list[str] = []
    for variable in sorted(environ):
        prefix, _, name = variable.partition("_")
        if prefix not in ("COVEY", "ANKA") or name in known or _SERVICE_LINK.search(variable):
            continue
        if name.startswith("TEST_"):  # the test suite's own
            continue
        notices.append(f"{variable} is not a setting and is ignored{_near(name, known, prefix + '_')}")
    return notices


def _near(name: str, known: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    return str(value)


# ---- what is set, for people -----------------------------------------------------------------------------------

HIDDEN = "(not shown)"
_LOGIN = re.compile(r"(?<=://)[^/@\s\"']*@")


class Row(NamedTuple):
    """One setting that is set on this machine, for whichever program. `text` of a secret is the secret."""

    name: str
    text: str
    source: str
    secret: bool


def overview(environ: Mapping[str, str]) -> tuple[list[Row], list[str]]:
    """Everything that is set in the environment and the settings file, and what is odd about it. Never raises."""
    try:
        file_name, file = _read_file(environ)
        notices = _strangers(environ)
    except errors.SettingError as error:
        file_name, file, notices = "", {}, [*_strangers(environ), str(error)]
    tables = {"": file, **{part.value: file[part.value] for part in Part if isinstance(file.get(part.value), dict)}}
    rows = []
    for row in TABLE:
        for spelled in (row.name, *row.aliases):
            found = {prefix + spelled: environ.get(prefix + spelled, "").strip() for prefix in ("COVEY_", "ANKA_")}
            for part, table in tables.items():
                where = f"{file_name}: {f'[{part}] ' if part else ''}{spelled.lower()}"
                found[where] = _as_text(table.get(spelled.lower(), ""))
            rows += [Row(row.name, text, where, row.secret) for where, text in found.items() if text]
    return rows, notices


def without_login(text: str) -> str:
    """A text whose URLs carry no user and password."""
    return _LOGIN.sub(f"{HIDDEN}@", text)


def shown(chosen: msgspec.Struct) -> dict[str, object]:
    """A program's settings as read, without secrets."""
    secret = {row.name.lower() for row in TABLE if row.secret}
    found: dict[str, object] = {}
    for name in chosen.__struct_fields__:
        value = getattr(chosen, name)
        if name in secret:
            found[name] = HIDDEN if value else ""
        elif isinstance(value, msgspec.Struct) and not isinstance(value, Address):
            found[name] = shown(value)
        elif isinstance(value, tuple):
            found[name] = [without_login(str(one)) for one in value]
        else:
            plain = value is None or isinstance(value, bool | int | float)
            found[name] = value if plain else without_login(str(value))
    return found
