"""An identity belongs to one directory of one host; what the cloud said of its controllers is kept beside it."""

import shutil
from pathlib import Path

import msgspec
import pytest

from covey import errors, wire, world
from covey.agent import identity
from tests.support import nouns


def home(data: Path, machine: str = "this-host") -> identity.Home:
    return identity.Home.of(data, machine)


def file(data: Path) -> identity.File:
    data.mkdir(exist_ok=True)
    return identity.File(data, world.System())


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """The directory of a node."""
    data = tmp_path / "first"
    mine = file(data)
    mine.settle(home(data), explicit=True)
    mine.joined(nouns.joined(), "secret", wire.Seen())
    return data


def test_a_restart_is_at_home(joined: Path) -> None:
    file(joined).settle(home(joined), explicit=False)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_copy_on_another_host_does_not_begin(joined: Path, explicit: bool) -> None:
    """(safety S7) Not even by the operator's word: the first one may run."""
    with pytest.raises(errors.SettingError, match=r"copy of node node-1.*covey leave.*covey join"):
        file(joined).settle(home(joined, "another-host"), explicit=explicit)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_copy_from_before_the_first_join_is_another_node(tmp_path: Path, explicit: bool) -> None:
    """(safety S7) An image in which an agent had begun: the node's id follows from the key."""
    data = tmp_path / "first"
    mine = file(data)
    mine.settle(home(data), explicit=False)
    mine.pend("secret")
    copy = file(data)
    assert copy.now.host_key == mine.now.host_key
    copy.settle(home(data), explicit=explicit)
    assert copy.pend("newer") == ("secret",), "this is its own directory"
    copy.settle(home(data, "another-host"), explicit=explicit)
    assert copy.now.host_key != mine.now.host_key
    assert copy.pend("newest") == ()


def test_a_node_whose_file_is_damaged_does_not_become_another_one_by_itself(joined: Path) -> None:
    """Its VMs run on, and another node's would be removed as wanted by nobody (promise I4)."""
    good = (joined / "node.json").read_bytes()
    (joined / "node.json").write_bytes(good[:-20])
    for _ in range(2):  # also the second time, when there is no file any more
        with pytest.raises(errors.SettingError, match=r"which node this is cannot be read .*node\.json\.corrupt"):
            file(joined).settle(home(joined), explicit=False)
    file(joined).settle(home(joined), explicit=True)
    (joined / "node.json").write_bytes(good)
    file(joined).settle(home(joined), explicit=False)


def test_a_copy_on_this_host_does_not_begin_by_itself(joined: Path, tmp_path: Path) -> None:
    """(safety S7)"""
    copy = tmp_path / "copy"
    shutil.copytree(joined, copy)
    with pytest.raises(errors.SettingError, match=r"is a copy of .*first, or was moved"):
        file(copy).settle(home(copy), explicit=False)
    file(copy).settle(home(copy), explicit=True)
    file(copy).settle(home(copy), explicit=False)  # its home from now on


def test_a_renamed_directory_is_at_home(joined: Path, tmp_path: Path) -> None:
    joined.rename(tmp_path / "moved")
    file(tmp_path / "moved").settle(home(tmp_path / "moved"), explicit=False)


def test_a_restored_directory_is_at_home(joined: Path, tmp_path: Path) -> None:
    joined.rename(tmp_path / "old")
    shutil.copytree(tmp_path / "old", joined)
    file(joined).settle(home(joined), explicit=False)


def test_where_the_system_does_not_tell_hosts_apart_nothing_is_claimed(joined: Path) -> None:
    file(joined).settle(home(joined, ""), explicit=False)


def test_an_identity_of_an_earlier_version_gets_its_home(joined: Path) -> None:
    old = file(joined)
    old.write(msgspec.structs.replace(old.now, home=None))
    file(joined).settle(home(joined), explicit=False)
    assert file(joined).now.home == home(joined)
    assert file(joined).now.secret == "secret"


def test_learnt_controllers_are_kept(tmp_path: Path) -> None:
    mine = file(tmp_path)
    assert identity.learnt(tmp_path) == ()
    mine.learn(("http://a", "http://b"))
    assert identity.learnt(tmp_path) == ("http://a", "http://b")
    before = (tmp_path / "controllers.json").stat().st_ino
    mine.learn(("http://a", "http://b"))
    assert (tmp_path / "controllers.json").stat().st_ino == before  # no write without news
    mine.learn(("http://c",))
    assert identity.learnt(tmp_path) == ("http://c",)


def test_without_a_directory_nothing_is_kept() -> None:
    identity.File(None, world.System()).learn(("http://a",))
    assert identity.learnt(None) == ()
