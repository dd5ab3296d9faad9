"""The provider token of a signing key, as the `authorization` field."""

from __future__ import annotations

from heliograph.model import SigningKey
from heliograph.protocols import provider_token


class TokenSource:
    """One provider token at a time: minted once for each half hour, the same in every process."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self._issued_at = -1
        self._field = (b"authorization", b"")

    def field(self, now: float) -> tuple[bytes, bytes]:
        """The `authorization` field for this time (UNIX seconds). The same object until the half hour changes."""
        issued_at = provider_token.issue_time(now)
        if issued_at != self._issued_at:
            self._issued_at = issued_at
            self._field = (b"authorization", b"bearer " + provider_token.mint(self._key, now).encode())
        return self._field
