"""Who a client of the doors for old scripts is: an app, by what its TLS handshake shows.

In this order: the client's certificate, where it is one that was registered; the server name that it asked for; the
listener's own app. What is shown opens our door only: Apple is shown the app's own credentials.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from heliograph.callers import Callers, certificate_id
from heliograph.config import LegacySettings
from heliograph.model import App, Environment
from heliograph.net.tls import legacy_context


class Guest(Struct, frozen=True):
    """Who a connection is."""

    app: str
    environment: Environment
    topic: str | None
    """With suffix; None: the app's only bundle id."""
    id: str
    """Of the certificate its SHA-256, else `name:` with the server name, or `port:` with the listener's name."""

    @property
    def trace(self) -> str:
        """The id, short enough for a log line."""
        return self.id if ":" in self.id else self.id[:16]


class NotAdmitted(Exception):
    """Nobody that we know. `hint` says what to do about it."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.hint = hint


class Shown(Protocol):
    """What a handshake leaves behind."""

    @property
    def certificate(self) -> bytes | None:
        """DER; one of those that are known, or the handshake would have failed."""
        ...

    @property
    def server_name(self) -> str | None: ...


class Admittance:
    """Of one listener."""

    def __init__(
        self,
        name: str,
        settings: LegacySettings,
        callers: Callers,
        apps: Mapping[str, App],
        identity: tuple[bytes, bytes],
    ) -> None:
        """`apps` may change. `identity`: what the listener shows, certificate chain and key, as PEM."""
        self._name = name
        self._settings = settings
        self._names = {server_name.lower(): app for server_name, app in settings.names.items()}
        self._callers = callers
        self._apps = apps
        self._identity = identity
        self._context: ssl.SSLContext | None = None
        self._version: int | None = None

    @property
    def version(self) -> int:
        """Another one whenever a client that was admitted may have to go."""
        return self._callers.version

    def context(self) -> ssl.SSLContext:
        """For the next handshake: it knows the certificates that are registered by now. Raises ConfigError."""
        if self._context is None or self._version != self._callers.version:
            self._version = self._callers.version
            settings = self._settings
            self._context = legacy_context(
                *self._identity,
                anchors=self._callers.certificates(),
                minimum=settings.minimum_tls,
                required=not (settings.app or settings.names),
            )
        return self._context

    def admit(self, shown: Shown) -> Guest:
        """Raises NotAdmitted."""
        settings, server_name = self._settings, (shown.server_name or "").lower()
        environment, topic = settings.environment, None
        if shown.certificate is not None:
            caller = self._callers.by_certificate(shown.certificate)
            if caller is None:
                former = self._callers.get(certificate_id(shown.certificate))
                if former is not None:
                    raise NotAdmitted(
                        f"its certificate is that of the app {former.app}, which is gone",
                        "add the app again, or remove the caller (heliograph callers remove) and register the "
                        "certificate for another one",
                    )
                raise NotAdmitted(
                    "its certificate is not registered any more",
                    "register it again (heliograph callers add), or give the client one that is",
                )
            app, topic, known_as = caller.app, caller.topic, caller.id
            environment = caller.environment or environment
        elif server_name in self._names:
            app, known_as = self._names[server_name], f"name:{server_name}"
        elif settings.app is not None:
            app, known_as = settings.app, f"port:{self._name}"
        else:
            asked = f"asks for the server name {server_name}" if server_name else "names no server (SNI)"
            raise NotAdmitted(
                f"it shows no certificate, and {asked}" if self._names else "it shows no certificate",
                f"give the client one (heliograph legacy certificate), or set app or names in [legacy.{self._name}]",
            )
        return Guest(app, self._choose_environment(app, environment), topic, known_as)

    def _choose_environment(self, app: str, environment: Environment | None) -> Environment:
        known = self._apps.get(app)
        if known is None:
            raise NotAdmitted(f"there is no app {app}", "add the app, or register the client for one that there is")
        if environment is None:
            if len(known.environments) != 1:
                raise NotAdmitted(
                    f"the app {app} has both environments and nothing says which is meant",
                    f"set environment in [legacy.{self._name}], or register the certificate with one",
                )
            return known.environments[0]
        if environment not in known.environments:
            raise NotAdmitted(
                f"the app {app} is not set up for {environment}",
                f"add credentials for {environment} to the app, or change the environment of the listener or caller",
            )
        return environment
