"""The provider token of a signing key, as the `authorization` field."""

from __future__ import annotations

from heliograph.model import SigningKey
from heliograph.protocols import provider_token

Authorization = tuple[bytes, bytes]
"""The field."""

LEAST_S = 20 * 60.0
"""How long a connection has to keep a provider token before it may show another (Apple, "Establishing a token-based
connection to APNs")."""


class TokenSource:
    """One provider token at a time: minted once for each half hour, the same in every process."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self.issued_at = -1
        """Of the token that was given last, in UNIX seconds."""
        self._field = (b"authorization", b"")

    def field(self, now: float) -> Authorization:
        """The `authorization` field for this time (UNIX seconds). The same object until the half hour changes."""
        issued_at = provider_token.issue_time(now)
        if issued_at != self.issued_at:
            self._field = (b"authorization", b"bearer " + provider_token.mint(self._key, now).encode())
            self.issued_at = issued_at
        return self._field
