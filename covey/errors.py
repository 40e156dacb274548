"""What can go wrong, as one small tree. A refusal is a value somewhere else; these are faults.

CoveyError
├── Refused            the request is understood and will not be done; the text names the field and the remedy
│   └── NotFound       the thing named does not exist
├── StoreError
│   ├── Unavailable    certainly not applied; may be tried again
│   │   └── NoSpace    the store's space is used up: reads and deletions go on, other writes do not (safety S25)
│   ├── Unsure         the reply was lost: it may or may not have been applied, or may still apply (safety S15)
│   ├── Compacted      the revision asked for is gone; list again
│   ├── LeaseLost      the lease is gone, by the server's word or by our own clock
│   └── Rejected       the store understood the request and will never take it (too large, bad auth, missing lease)
├── RemoteError        an HTTP peer could not be reached or answered nonsense
├── HypervisorError    the hypervisor could not do what was asked; the text is shown to the user
└── SettingError       a setting is wrong: stops the start with one sentence
"""


class CoveyError(Exception):
    """Root of every fault that Covey raises on purpose."""


class Refused(CoveyError):
    """A business refusal: shown to the caller as HTTP 200 + FAIL, its text unchanged."""


class NotFound(Refused):
    """The named thing does not exist (the API's text is exactly ``Not found``)."""


class StoreError(CoveyError):
    """Root of the store's faults."""


class Unavailable(StoreError):
    """Certainly not applied."""


class NoSpace(Unavailable):
    """The store's space quota is used up; certainly not applied."""


class Unsure(StoreError):
    """May have been applied, or may still be: re-send the same guarded transaction until the outcome is definite."""


class Compacted(StoreError):
    """The wanted revision is no longer kept. ``revision`` is the oldest one that is."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"compacted at revision {revision}")
        self.revision = revision


class LeaseLost(StoreError):
    """The lease ended, or may have ended by the holder's own clock."""


class Rejected(StoreError):
    """The store will never take this request as it is."""


class RemoteError(CoveyError):
    """An HTTP peer could not be reached, or did not answer as it should. ``status`` is 0 when there was no answer;
    ``retry_after_s`` is more than 0 when all peers asked to be left alone for so long."""

    def __init__(self, text: str, status: int = 0, *, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after_s = retry_after_s


class HypervisorError(CoveyError):
    """The hypervisor refused or failed; the text goes to the instance's message."""


class SettingError(CoveyError):
    """A setting is missing, malformed or names a feature that is not built."""
