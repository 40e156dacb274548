"""Looks at how a storage is mounted (safety S30): NFS is safe for several servers with certain options only.

Source: proc(5), /proc/[pid]/mountinfo; nfs(5), `hard`, `lookupcache`. With `soft` a write may fail after it was taken;
with the usual look-up cache one server does not see for seconds what another one has stored.
"""

from pathlib import Path

from covey import errors

_TABLE = Path("/proc/self/mountinfo")


def check(base: Path) -> None:
    """Raises SettingError, in one sentence, when `base` lies on an NFS mount that loses or hides what is written."""
    try:
        table = _TABLE.read_text()
    except OSError:  # not Linux
        return
    refuse(base, *find(base, table))


def find(base: Path, table: str) -> tuple[str, frozenset[str]]:
    """Kind and options of the file system that `base` lies on, by the text of mountinfo."""
    found, longest = ("", frozenset[str]()), -1
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        place = Path(left.split()[4].encode().decode("unicode_escape"))  # a space is \\040
        kind, _, options = right.split()[:3]
        if base.absolute().is_relative_to(place) and len(place.parts) >= longest:  # of two at one place the later
            longest, found = len(place.parts), (kind, frozenset({*left.split()[5].split(","), *options.split(",")}))
    return found


def refuse(base: Path, kind: str, options: frozenset[str]) -> None:
    if not kind.startswith("nfs"):
        return
    if "hard" not in options:
        raise errors.SettingError(f"BASE_PATH {base} is on an NFS mount that may lose writes; mount it with -o hard")
    if "lookupcache=none" not in options:
        text = f"BASE_PATH {base} is on an NFS mount that hides other servers' files; mount it with -o lookupcache=none"
        raise errors.SettingError(text)
