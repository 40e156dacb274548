"""What tells this host from others, and where it is."""

from pathlib import Path

import pytest

from covey.agent import host


@pytest.mark.parametrize("text", ["", "\n", "uninitialized\n"])
def test_an_image_without_a_machine_id_of_its_own_claims_none(text: str, tmp_path: Path) -> None:
    """Else the host that is made of it would be another one after its first boot (safety S7)."""
    file = tmp_path / "machine-id"
    assert host.machine(file) == ""
    file.write_text(text)
    assert host.machine(file) == ""
    file.write_text("0123456789abcdef0123456789abcdef\n")
    assert len(host.machine(file)) == 64


@pytest.mark.parametrize("wrong", ["http://[c1", "http://c1:80x90", "http://c1:808080", "http://" + "a" * 70 + ".c"])
def test_a_url_that_is_none_keeps_nobody_from_finding_the_address(wrong: str) -> None:
    """One may have been learnt of the cloud and be on disk."""
    assert host.address_towards((wrong, "http://127.0.0.1:8090")) == "127.0.0.1"
