"""NFS is refused unless its options keep what is written, and show what others wrote."""

from pathlib import Path

import pytest

from covey import errors
from covey.registry import mounts

LOCAL = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
BASE = Path("/srv/my registry/data")


def table(options: str) -> str:
    return LOCAL + rf"40 22 0:50 / /srv/my\040registry rw,relatime shared:1 - nfs4 server:/export rw,{options}" + "\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("vers=4.2,hard,lookupcache=none", ""),
        ("vers=4.2,hard", "lookupcache=none"),
        ("vers=4.2,hard,lookupcache=pos", "lookupcache=none"),
        ("vers=4.2,soft,lookupcache=none", "-o hard"),
    ],
)
def test_options_of_nfs(options: str, complaint: str) -> None:
    found = mounts.find(BASE, table(options))
    if not complaint:
        mounts.refuse(BASE, *found)
        return
    with pytest.raises(errors.SettingError, match=complaint):
        mounts.refuse(BASE, *found)


def test_a_local_file_system_is_fine() -> None:
    assert mounts.find(Path("/var/lib/covey"), table("soft"))[0] == "ext4"
    mounts.refuse(Path("/var/lib/covey"), *mounts.find(Path("/var/lib/covey"), table("soft")))
    mounts.check(Path("/tmp"))
