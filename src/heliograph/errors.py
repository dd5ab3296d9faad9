"""Everything heliograph raises.

```
HeliographError
├── Refused            a caller asked for what cannot succeed; carries the reason and what to change
├── Overloaded         we cannot take more now; carries when to try again
├── Repeated           this request was taken before; its answer is kept
├── ConfigError        the configuration, a file or an argument is wrong; the text says what to change
└── StoreError         the store cannot be trusted or cannot be reached
    └── StoreBusy      another process holds the store; names its pid
```

Whatever Apple says, or does not say, is a value (`model.Outcome`).
"""

from __future__ import annotations


class HeliographError(Exception):
    """The base of everything heliograph raises on purpose."""


class Refused(HeliographError):
    """The notification cannot succeed as it is: nothing was taken.

    `reason` is Apple's word where there is one (see `reasons`), `detail` a sentence that says what to change,
    `index` its place in the caller's list (0-based), `field` the field at fault, as a path like `aps.badge`.
    """

    def __init__(self, reason: str, detail: str, *, index: int | None = None, field: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.index = index
        self.field = field


class Overloaded(HeliographError):
    """More is waiting than we promised to keep; nothing was taken."""

    def __init__(self, detail: str, *, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Repeated(HeliographError):
    """What was to be taken once was taken before; nothing was taken now. See `ports.Store.find_once`."""


class ConfigError(HeliographError):
    """The configuration, a file or an argument is wrong; the text says what to change."""


class StoreError(HeliographError):
    """The store cannot be reached or cannot be trusted."""


class StoreBusy(StoreError):
    """Another process holds this store."""
