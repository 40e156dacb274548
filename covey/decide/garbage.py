"""What becomes of a blob, a right to read one, and a damaged one: the collector's rules (safety S32).

    on the shelf     needed, or touched within the grace → stays             else → to the trash
    in the trash     needed, or touched within the grace → back to the shelf  else, after the trash time → deleted
    in quarantine    whole again on the shelf → deleted    needed → stays     else, after the grace → deleted

Needed is what a manifest of any repository refers to, or a push that is being entered. Touched is what was stored,
mounted or asked for; whoever asks about a blob in order to leave it out of a push has the grace to finish that push.
Each ruling says why, in words for people.
"""

from collections.abc import Mapping
from enum import StrEnum

from covey import model


class Fate(StrEnum):
    STAY = "stay"
    TRASH = "trash"
    RESTORE = "restore"
    DELETE = "delete"


class Periods(model.Noun, frozen=True, kw_only=True):
    """How long things wait. `grace_s`: untouched on the shelf; `trash_s`: in the trash; `upload_s`: an upload in which
    nothing moves."""

    grace_s: float = 24 * 3600.0
    trash_s: float = 24 * 3600.0
    upload_s: float = 24 * 3600.0


class Blob(model.Noun, frozen=True, kw_only=True):
    """A blob as the collector found it. `since_s`: when it came to where it is; `touched_s`: when any repository last
    asked for it."""

    digest: model.Digest
    size_bytes: int
    since_s: float
    touched_s: float = 0.0


class Ruling(model.Noun, frozen=True, kw_only=True):
    """What shall become of a blob, and why."""

    digest: model.Digest
    size_bytes: int
    fate: Fate
    reason: str


Needs = Mapping[model.Digest, str]  # a digest that is needed → who needs it


def on_shelf(blob: Blob, needs: Needs, now_s: float, periods: Periods) -> Ruling:
    reason = _reason_to_stay(blob, needs, now_s, periods.grace_s)
    if reason:
        return _rule(blob, Fate.STAY, reason)
    age = _age(now_s - max(blob.since_s, blob.touched_s))
    return _rule(blob, Fate.TRASH, f"nothing needs it, and nobody asked for it for {age}")


def in_trash(blob: Blob, needs: Needs, now_s: float, periods: Periods) -> Ruling:
    touched = _touched(blob, now_s, periods.grace_s)
    if blob.digest in needs or touched:
        return _rule(blob, Fate.RESTORE, needs.get(blob.digest) or touched)
    age_s = now_s - blob.since_s
    if age_s < periods.trash_s:
        return _rule(blob, Fate.STAY, f"in the trash for {_age(age_s)} of {_age(periods.trash_s)}")
    return _rule(blob, Fate.DELETE, f"in the trash for {_age(age_s)}, and nothing needs it")


def in_quarantine(blob: Blob, needs: Needs, *, healed: bool, now_s: float, periods: Periods) -> Ruling:
    if healed:
        return _rule(blob, Fate.DELETE, "it was stored again")
    if reason := _reason_to_stay(blob, needs, now_s, periods.grace_s):
        return _rule(blob, Fate.STAY, f"damaged; {reason}")
    return _rule(blob, Fate.DELETE, "damaged, and nothing needs it")


def grant_stays(digest: model.Digest, touched_s: float, needs: Needs, now_s: float, periods: Periods) -> bool:
    """Whether a repository keeps the right to read a blob. `needs` are those of that repository and of pushes."""
    return digest in needs or now_s - touched_s < periods.grace_s


def _reason_to_stay(blob: Blob, needs: Needs, now_s: float, grace_s: float) -> str:
    if blob.digest in needs:
        return needs[blob.digest]
    if now_s - blob.since_s < grace_s:
        return f"stored {_age(now_s - blob.since_s)} ago"
    return _touched(blob, now_s, grace_s)


def _touched(blob: Blob, now_s: float, grace_s: float) -> str:
    age_s = now_s - blob.touched_s
    return f"asked for {_age(age_s)} ago" if age_s < grace_s else ""


def _rule(blob: Blob, fate: Fate, reason: str) -> Ruling:
    return Ruling(digest=blob.digest, size_bytes=blob.size_bytes, fate=fate, reason=reason)


def _age(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
