"""Words that have no place in the project's files."""

import re

import pytest

from tests.tidy import repo

# Each is written in two halves, so that this file does not hold what it forbids.
FORBIDDEN = {
    "a reminder instead of the work": r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b",
    "a path of one machine": r"(/wo" r"rk/|/ro" r"ot/\.|\.\./sha" r"red)",
    "the host of a package registry": r"(py"
    r"pi\.org|python"
    r"hosted|deb\.deb"
    r"ian\.org|npm"
    r"js\.org|snapshot\.deb"
    r"ian)",
    "a page that is not in this repository": r"api-cont" r"ract|test-bench\.m" r"d\b|stack\.m" r"d\b|qemu\.m" r"d\b",
    "a left-over of a merge": r"^(<<<<" r"<<<|>>>>" r">>>) ",
}
UNCHECKED = {"LICENSE", "requirements.lock"}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for path, text in repo.texts()
        if str(path) not in UNCHECKED
        for match in pattern.finditer(text)
    ]
    assert not found, f"{what}: {found}"


def test_no_lock_names_an_address() -> None:
    """Any mirror may serve the packages; their hashes make them right (docs/decisions/0002)."""
    assert "://" not in (repo.ROOT / "requirements.lock").read_text()


def test_every_locked_package_has_a_hash() -> None:
    lock = (repo.ROOT / "requirements.lock").read_text()
    pins = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert pins
    assert [pin.splitlines()[0] for pin in pins if "--hash=sha256:" not in pin] == []
