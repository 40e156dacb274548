"""What a server that speaks TLS shows and takes: one context, made of its settings, faults in one clear line.

TLS 1.2 and 1.3, no older ones. Ciphers are chosen for 1.2 only: those of 1.3 are three, all good, and no switch of the
TLS library that Python reaches takes one away; naming some of them does no harm. Names are OpenSSL's or those of the
IANA registry (https://www.iana.org/assignments/tls-parameters), which other programs use.
"""

import re
import ssl

from covey import errors, settings

_SHARED = re.compile("PSK|SRP")  # for peers that share a secret: not with a certificate
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def of(chosen: settings.Tls) -> ssl.SSLContext:
    """Raises SettingError for files that do not fit and for ciphers that nobody knows."""
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.minimum_version, made.maximum_version = _VERSIONS[chosen.lowest], _VERSIONS[chosen.highest]
    if chosen.ciphers:
        _choose(made, chosen)
    try:
        made.load_cert_chain(chosen.cert, chosen.key)
    except (OSError, ssl.SSLError) as error:
        text = f"SERVER_CERT {chosen.cert} and SERVER_KEY {chosen.key} are no certificate and its key in PEM: {error}"
        raise errors.SettingError(text) from error
    return made


def _choose(made: ssl.SSLContext, chosen: settings.Tls) -> None:
    known = {one["name"]: one["protocol"] for one in made.get_ciphers() if not _SHARED.search(one["name"])}
    wanted = []
    for name in chosen.ciphers:
        spelled = name if name in known else _of_openssl(name)
        if spelled not in known:
            raise errors.SettingError(
                f"CIPHER_SUITES names {name}, which is no cipher that this server offers;"
                f" choose of {', '.join(sorted(known))}"
            )
        if known[spelled] != "TLSv1.3":
            wanted.append(spelled)
    if wanted:
        made.set_ciphers(":".join(wanted))
    elif chosen.lowest == "1.2":
        raise errors.SettingError(
            "CIPHER_SUITES names ciphers of TLS 1.3 only, so that TLS 1.2 would have none; set MIN_TLS_VERSION=1.3"
        )


def _of_openssl(name: str) -> str:
    """TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 as OpenSSL spells it: ECDHE-RSA-AES128-GCM-SHA256."""
    text = name.upper().removeprefix("TLS_").replace("_WITH_", "_")
    text = re.sub(r"(AES|CAMELLIA|ARIA)_(128|256)", r"\1\2", text).replace("_CBC_", "_")
    text = re.sub(r"(CHACHA20_POLY1305)_SHA256$", r"\1", text).removeprefix("RSA_")
    return text.replace("_", "-")
