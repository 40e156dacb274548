"""How Covey runs etcd (safety S28): one place for the flags, whoever starts it.

    fsync             on: there is no flag that switches it off among ours
    pre-vote          a member that was cut off does not depose the leader when it is back
    auto-compaction   periodic, of what is older than half an hour (docs/decisions/0011)
    quota             8 GiB, the most that etcd's authors advise

etcd refuses to start when its own ETCD_ variables contradict flags: `environment` leaves them out.
"""

from collections.abc import Mapping
from typing import NamedTuple

from covey import errors

QUOTA_BYTES = 8 * 1024**3
RETENTION_S = 30 * 60.0
TOKEN = "covey"  # noqa: S105 (the name of a cluster, no secret)


class Run(NamedTuple):
    """One member's flags. URLs are comma lists, as etcd takes them."""

    name: str
    data_dir: str
    listen_client: str
    advertise_client: str
    listen_peer: str
    advertise_peer: str
    cluster: str  # name=url,…
    state: str  # new | existing
    token: str = TOKEN
    retention_s: float = RETENTION_S
    quota_bytes: int = QUOTA_BYTES
    more: tuple[str, ...] = ()  # --flag=value

    def arguments(self) -> tuple[str, ...]:
        options = {
            "name": self.name,
            "data-dir": self.data_dir,
            "listen-client-urls": self.listen_client,
            "advertise-client-urls": self.advertise_client,
            "listen-peer-urls": self.listen_peer,
            "initial-advertise-peer-urls": self.advertise_peer,
            "initial-cluster": self.cluster,
            "initial-cluster-state": self.state,
            "initial-cluster-token": self.token,
            "auto-compaction-mode": "periodic",
            "auto-compaction-retention": f"{self.retention_s:.0f}s",
            "quota-backend-bytes": str(self.quota_bytes),
            "pre-vote": "true",
            "logger": "zap",
        }
        return (*(f"--{name}={value}" for name, value in options.items()), *self.more)


_OURS = frozenset(
    {
        *("name", "data-dir", "listen-client-urls", "advertise-client-urls", "listen-peer-urls"),
        *("initial-advertise-peer-urls", "initial-cluster", "initial-cluster-state", "initial-cluster-token"),
        *("auto-compaction-mode", "auto-compaction-retention", "quota-backend-bytes", "pre-vote", "logger"),
        *("force-new-cluster", "unsafe-no-fsync", "discovery", "discovery-srv", "config-file"),
    }
)


def further(words: tuple[str, ...]) -> dict[str, str]:
    """Flags of etcd that an operator adds, as name → value. Raises SettingError for one that is not theirs to set."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("-"):
            name, mark, value = word.lstrip("-").partition("=")
            found[name] = value if mark else "true"
            continue
        if not name:
            raise errors.SettingError(f"{word!r} is no flag of etcd: after -- come flags such as --cert-file=/etc/…")
        found[name], name = word, ""
    if wrong := sorted(_OURS & found.keys()):
        raise errors.SettingError(f"--{wrong[0]} is set by this command itself: leave it out after --")
    return found


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith("ETCD_")}
