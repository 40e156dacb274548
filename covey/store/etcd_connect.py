"""The way to etcd: a client made from settings, and one clear sentence when it leads nowhere.

`grpc` says of nearly everything that goes wrong with certificates that it failed to connect. `explain` looks itself,
with a handshake of its own that is used for nothing else, and names what is wrong and the setting that mends it.
"""

import asyncio
import contextlib
import pathlib
import socket
import ssl
from typing import NamedTuple, Protocol

from covey import errors, world
from covey.store import etcd, etcd_endpoints

_LOOK_S = 2.0


class Access(Protocol):
    """Those settings of a controller, and of `covey etcd`, that say where etcd is and who we are to it."""

    @property
    def etcd_endpoints(self) -> tuple[str, ...]: ...
    @property
    def etcd_request_timeout_s(self) -> float: ...
    @property
    def etcd_tls(self) -> bool: ...
    @property
    def etcd_ca_cert(self) -> pathlib.Path | None: ...
    @property
    def etcd_cert(self) -> pathlib.Path | None: ...
    @property
    def etcd_cert_key(self) -> pathlib.Path | None: ...
    @property
    def etcd_username(self) -> str: ...
    @property
    def etcd_password(self) -> str: ...


def connect(access: Access, world: world.World) -> etcd.Etcd:
    """A client; nothing is connected yet. Raises SettingError when a file cannot be read."""
    tls = login = None
    if access.etcd_tls:
        tls = etcd_endpoints.Tls(_pem(access.etcd_ca_cert), _pem(access.etcd_cert), _pem(access.etcd_cert_key))
    if access.etcd_username:
        login = etcd_endpoints.Login(access.etcd_username, access.etcd_password)
    return etcd.Etcd(access.etcd_endpoints, world=world, timeout_s=access.etcd_request_timeout_s, tls=tls, login=login)


def _pem(path: pathlib.Path | None) -> bytes:
    try:
        return b"" if path is None else path.read_bytes()
    except OSError as error:
        raise errors.SettingError(f"{path} cannot be read: {error.strerror}") from error


def ssl_context(access: Access) -> ssl.SSLContext:
    """The same trust and the same certificate for Python's own TLS. Raises SettingError."""
    context = ssl.create_default_context(cafile=access.etcd_ca_cert)
    if access.etcd_cert is not None:
        try:
            context.load_cert_chain(access.etcd_cert, access.etcd_cert_key)
        except (ssl.SSLError, OSError) as error:
            raise errors.SettingError(
                f"ETCD_CERT {access.etcd_cert} and ETCD_CERT_KEY {access.etcd_cert_key} do not belong together, or are"
                f" no PEM files ({_reason(error)})"
            ) from error
    return context


# ---- why not -------------------------------------------------------------------------------------------------------

_LOGINS = (
    ("invalid user ID or password", "etcd refuses the login of {user!r}: check ETCD_USERNAME and ETCD_PASSWORD"),
    (
        "authentication is not enabled",
        "etcd has no logins switched on (`etcdctl auth enable`), but USE_ETCD_LOGIN is true: unset it",
    ),
    (
        "user name is empty",
        "etcd asks for a login: set USE_ETCD_LOGIN=true, ETCD_USERNAME and ETCD_PASSWORD",
    ),
    (
        "asks for a user",
        "etcd asks for a login: set USE_ETCD_LOGIN=true, ETCD_USERNAME and ETCD_PASSWORD",
    ),
    (
        "permission denied",
        "etcd's user {user!r} may not do this: a controller needs readwrite on all keys (--from-key ''), and backups"
        " and the care of members the role root",
    ),
)


async def explain(access: Access, error: errors.StoreError) -> str:
    """`error` in one sentence with its remedy, as far as a look at etcd tells; else its own words."""
    text = str(error)
    for mark, sentence in _LOGINS:
        if mark in text:
            return sentence.format(user=access.etcd_username)
    if not isinstance(error, errors.Unavailable) or isinstance(error, errors.NoSpace):
        return text
    return await trouble(access) or text


async def trouble(access: Access) -> str:
    """What keeps every connection to etcd from being made, or one from being used; "" when nothing does."""
    looks = await asyncio.gather(*(asyncio.to_thread(_look, access, target) for target in access.etcd_endpoints))
    if all(look.away for look in looks):
        told = "; ".join(look.sentence for look in looks)
        return f"etcd cannot be reached: {told}; is it running, and is ETCD_ENDPOINTS right?"
    if any(not look.sentence for look in looks):
        return ""  # the others are made up for
    return next(look.sentence for look in looks if not look.away)


class _Look(NamedTuple):
    sentence: str  # "": nothing is wrong with the connection
    away: bool = False  # nobody listens there


def _look(access: Access, endpoint: str) -> _Look:
    """One connection to one member."""
    host, port = _split(endpoint)
    try:
        plain = socket.create_connection((host, port), timeout=_LOOK_S)
    except OSError as error:
        return _Look(f"{endpoint}: {_reason(error)}", away=True)
    with contextlib.closing(plain):
        return _look_at_tls(access, endpoint, host, plain)


def _look_at_tls(access: Access, endpoint: str, host: str, plain: socket.socket) -> _Look:
    if not access.etcd_tls:
        return _Look(
            f"etcd at {endpoint} speaks TLS: set USE_ETCD_TLS=true, and ETCD_CA_CERT to the authority that signed its"
            " certificate"
            if _speaks_tls(plain)
            else ""
        )
    try:
        with ssl_context(access).wrap_socket(plain, server_hostname=host) as secure:
            return _look_at_ours(access, endpoint, secure)
    except errors.SettingError as error:
        return _Look(str(error))
    except ssl.SSLCertVerificationError as error:
        return _Look(_not_believed(access, endpoint, error))
    except ssl.SSLError as error:
        if "alert" in str(error).lower():
            return _Look(_refused(access, endpoint, error))
        return _Look(_no_tls(endpoint))
    except OSError:
        return _Look(_no_tls(endpoint))


def _look_at_ours(access: Access, endpoint: str, secure: ssl.SSLSocket) -> _Look:
    """In TLS 1.3 the server judges our certificate after the handshake: its first word tells."""
    secure.settimeout(_LOOK_S / 4)
    try:
        secure.recv(1)
    except TimeoutError:
        return _Look("")  # it waits for us: all is well
    except ssl.SSLError as error:
        return _Look(_refused(access, endpoint, error))
    except OSError:
        pass
    return _Look("")


def _not_believed(access: Access, endpoint: str, error: ssl.SSLCertVerificationError) -> str:
    why = error.verify_message
    if "mismatch" in why or "not valid for" in why:
        return f"the certificate of etcd at {endpoint} is not for that address ({why}): use the name that it has"
    by = f"the authority in ETCD_CA_CERT {access.etcd_ca_cert}" if access.etcd_ca_cert else "an authority known here"
    sentence = f"the certificate of etcd at {endpoint} is not signed by {by} ({why})"
    return f"{sentence}: set ETCD_CA_CERT to the one that signed it"


def _no_tls(endpoint: str) -> str:
    return f"etcd at {endpoint} speaks no TLS: unset USE_ETCD_TLS, and say http:// in ETCD_ENDPOINTS"


def _refused(access: Access, endpoint: str, error: ssl.SSLError) -> str:
    if access.etcd_cert is None:
        return f"etcd at {endpoint} asks for a client certificate: set ETCD_CERT and ETCD_CERT_KEY"
    return (
        f"etcd at {endpoint} refuses the client certificate ETCD_CERT {access.etcd_cert} ({_reason(error)}): use one"
        " signed by the authority that it trusts"
    )


def _speaks_tls(plain: socket.socket) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only to see whether it is TLS; nothing is sent
    try:
        with context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "alert" in str(error).lower()  # it talks about certificates; else it hung up, or spoke HTTP
    except OSError:
        return False


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = etcd_endpoints.parse([endpoint], secure=False)[0].target.rpartition(":")
    return host.strip("[]"), int(port)


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error.strerror or error).lower()
