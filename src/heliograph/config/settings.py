"""What may be configured: frozen structs, and what is wrong with a table whatever file it is from."""

from __future__ import annotations

import re
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from msgspec import Meta, Struct
from msgspec.structs import replace

from heliograph.model import Environment

MAX_CREDENTIALS = 16
"""Of one app: opening each may take some time."""

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_is_host_name = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?").fullmatch
_is_topic = re.compile(r"[!-~]{1,255}").fullmatch
is_app_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch
"""Whether an app may be called so."""

Port = Annotated[int, Meta(ge=0, le=65535)]

APPLE_PORTS = (443, 2197)
"""Apple listens on both (Apple, "Sending notification requests to APNs")."""


class Environments(StrEnum):
    """Which of Apple's environments an app is sent to."""

    PRODUCTION = "production"
    DEVELOPMENT = "development"
    BOTH = "both"

    def each(self) -> tuple[Environment, ...]:
        return tuple(Environment) if self is Environments.BOTH else (Environment(self.value),)


class ApiSettings(Struct, frozen=True):
    """`[api]`: where the HTTP API listens."""

    host: str = "127.0.0.1"
    port: Port = 8080
    """0: any free one."""
    key: str | None = None
    """The API key, as `file:PATH` or `credential:NAME`; None: `api-key` in the data folder, made on the first start."""


class StoreSettings(Struct, frozen=True):
    """`[store]`: how much is kept, and for how long."""

    receipts_days: Annotated[int, Meta(ge=1, le=3650)] = 7
    """How long receipts are kept after the end of what they tell of."""
    max_waiting: Annotated[int, Meta(ge=1)] = 5_000_000
    """Unfinished notifications at most; more are refused until some have left."""
    master_key: str | None = None
    """What seals stored apps, as `file:PATH` or `credential:NAME`; None: `master-key` in the data folder, made on the
    first start."""


class TlsVersion(StrEnum):
    """Of a TLS connection, at least."""

    TLS_1_0 = "1.0"
    TLS_1_1 = "1.1"
    TLS_1_2 = "1.2"
    TLS_1_3 = "1.3"


class LegacySettings(Struct, frozen=True, kw_only=True):
    """`[legacy.NAME]`: a listener for clients of the binary protocol that Apple switched off, and for its feedback."""

    host: str = "127.0.0.1"
    port: Port = 2195
    """Of the gateway. 0: any free one, here and in the next."""
    feedback_port: Port = 2196
    """Of the feedback service."""
    environment: Environment | None = None
    """Which environment clients send to whose certificate leaves it open; None: their app's only one."""
    app: str | None = None
    """The app of clients that show no certificate. Whoever reaches the port may send to it! None: they are refused."""
    names: dict[str, str] = {}
    """The same by the server name that a client asked for in its TLS handshake (SNI): name, in lower case after `load`,
    to app. In the file only."""
    certificate: str | None = None
    """What the listener shows, with its chain, as PEM: a path (`file:PATH` after `load`) or `credential:NAME`; None:
    one that is made on the first start."""
    certificate_key: str | None = None
    """The private key, where it is in a file of its own; as `certificate`."""
    minimum_tls: TlsVersion = TlsVersion.TLS_1_2
    """Below 1.2 anybody on the way can read along, and perhaps change what is sent: only for clients that know no
    better, on networks that you trust."""
    max_payload: Annotated[int, Meta(ge=1, le=5120)] = 5120
    """Octets of a payload with commands 0 and 1. Apple's limit was 256 until 2014, then 2048."""
    max_item_payload: Annotated[int, Meta(ge=1, le=5120)] = 5120
    """The same with command 2. Apple's limit was 2048."""
    refuse_removed: bool = True
    """Whether a device token that Apple called dead draws an error packet, where the client gave its frame an
    identifier. False: it is sent to again, as Apple's gateway did, for clients that never read errors."""
    max_connections: Annotated[int, Meta(ge=1)] = 10_000

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _check_listener(self.host, self.certificate, self.certificate_key)
        if self.port == self.feedback_port != 0:
            raise ValueError(f"has port and feedback_port {self.port}: give the feedback service another, as 2196")
        if self.app is not None:
            _check_app("app", self.app)
        for name, app in self.names.items():
            if not _is_server_name(name):
                raise ValueError(
                    f"has the server name {name!r} in names: write names of the DNS, as "
                    '"gateway.example.com" = "shop"; clients send no addresses as server names'
                )
            _check_app("names", app)
        if len({name.lower() for name in self.names}) < len(self.names):
            raise ValueError("has a server name twice in names, in capitals and small letters: keep one")


class AppleProxySettings(Struct, frozen=True, kw_only=True):
    """`[apple_proxy.NAME]`: a listener that speaks as Apple's own servers do, for APNs libraries."""

    host: str = "127.0.0.1"
    port: Port = 2197
    """0: any free one."""
    environment: Environment | None = None
    """Which environment is sent to; None: the app's only one, else what the name says that the client called."""
    tls: bool = True
    """False: HTTP/2 without TLS, with prior knowledge; on loopback addresses only."""
    certificate: str | None = None
    """As in `LegacySettings`, like the next."""
    certificate_key: str | None = None
    durable: tuple[str, ...] = ()
    """Apps whose notifications are answered with 200 as soon as they are safe here, before Apple's word."""
    max_connections: Annotated[int, Meta(ge=1)] = 10_000

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _check_listener(self.host, self.certificate, self.certificate_key)
        if not self.tls and not is_loopback(self.host):
            raise ValueError(
                f"has tls = false and host {self.host}, so anybody on the way could read API keys: write host = "
                '"127.0.0.1", or remove tls = false'
            )
        if not self.tls and self.certificate is not None:
            raise ValueError("has tls = false and a certificate, which goes with TLS: remove one of them")
        for app in self.durable:
            _check_app("durable", app)


class CredentialSettings(Struct, frozen=True, kw_only=True):
    """`[[apps.NAME.credentials]]`: a signing key, or a certificate. Secrets are references after `load`."""

    key: str | None = None
    """The .p8 file that Apple issued: a path (`file:PATH` after `load`), or `credential:NAME`."""
    key_id: str | None = None
    """None: as in the name of the file, AuthKey_<key id>.p8."""
    team_id: str | None = None
    certificate: str | None = None
    """A .p12 or .pem file, as `key`."""
    certificate_key: str | None = None
    """The certificate's private key, where it is in a file of its own; as `key`."""
    passphrase: str | None = None
    """Of the .p12, the private key or the .p8: `file:PATH` or `credential:NAME`."""
    environment: Environments | None = None
    """None: production for a key, what the certificate says for a certificate."""

    def __repr__(self) -> str:
        return "<settings of credentials>"  # before `load` has looked, a secret may stand where a reference should


class AppSettings(CredentialSettings, frozen=True, kw_only=True):
    """`[apps.NAME]`: an app, and what Apple knows us by."""

    topic: str | None = None
    topics: tuple[str, ...] = ()
    """Bundle ids; `topic` where there is one only. A certificate says them itself."""
    credentials: tuple[CredentialSettings, ...] = ()
    """Where one key or certificate is not enough; the first that fits is used."""
    host: str | None = None
    """Send there and not to Apple; None: Apple."""
    port: Port = 443
    """Apple listens on 443 and 2197."""
    ca: str | None = None
    """A PEM file with the certificates to trust on `host`; None: those of the system."""
    proxy: str | None = None
    """An HTTP proxy to go through: http://HOST:PORT, or a reference to a file with the URL."""

    def __repr__(self) -> str:
        return "<settings of an app>"

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if len(self.credentials) > MAX_CREDENTIALS:
            raise ValueError(f"has {len(self.credentials)} credentials, and {MAX_CREDENTIALS} are enough: remove some")
        for number, each in enumerate(self.each_credentials(), 1):
            try:
                check_credentials(each)
            except ValueError as error:
                raise ValueError(f"(credentials, table {number}) {error}" if self.credentials else str(error)) from None
        if self.topic is not None and self.topics:
            raise ValueError("has both topic and topics: keep one of them")
        if not self.bundle_ids and not any(each.certificate for each in self.each_credentials()):
            raise ValueError("needs either topic, the app's bundle id, or topics, a list of them")
        if not all(map(_is_topic, self.bundle_ids)):
            raise ValueError(
                "has a topic that is not 1 to 255 printable ASCII characters without blanks: write the app's bundle "
                "id, as com.example.shop"
            )
        check_target(self.host, self.port, ca=self.ca is not None)
        if self.proxy is not None and not is_reference(self.proxy):
            check_proxy(self.proxy)

    @property
    def bundle_ids(self) -> tuple[str, ...]:
        return self.topics if self.topic is None else (self.topic,)

    def each_credentials(self) -> tuple[CredentialSettings, ...]:
        """One at least. What the app says of team and environment holds where a table does not say it."""
        own = CredentialSettings(
            **{name: getattr(self, name) for name in CredentialSettings.__struct_fields__}  # msgspec knows no upcast
        )
        if not self.credentials:
            return (own,)
        alone = ("key", "key_id", "certificate", "certificate_key", "passphrase")
        stray = next((name for name in alone if getattr(own, name) is not None), None)
        if stray is not None:
            raise ValueError(f"has {stray} beside [[credentials]] tables: move it into a table of its own")
        return tuple(
            replace(
                each,
                team_id=each.team_id or (own.team_id if each.key else None),
                environment=each.environment or own.environment,
            )
            for each in self.credentials
        )


class Setting(Struct, frozen=True):
    """A setting that has a value, which never is a secret."""

    way: tuple[str, ...]
    """To it: `("apps", "shop", "credentials[1]", "key")`."""
    value: Any
    origin: str
    """The file, the variable, or `default`."""


class Config(Struct, frozen=True):
    """Everything that can be set. Paths are absolute after `load`."""

    data: str = "heliograph-data"
    """The folder of the database, the API key and the master key."""
    api: ApiSettings = ApiSettings()
    store: StoreSettings = StoreSettings()
    apps: dict[str, AppSettings] = {}
    legacy: dict[str, LegacySettings] = {}
    apple_proxy: dict[str, AppleProxySettings] = {}

    def addresses(self) -> dict[tuple[str, ...], tuple[str, int]]:
        """Host and port of all that listens, by the way to the port's setting."""
        found: dict[tuple[str, ...], tuple[str, int]] = {("api", "port"): (self.api.host, self.api.port)}
        for name, old in self.legacy.items():
            found["legacy", name, "port"] = old.host, old.port
            found["legacy", name, "feedback_port"] = old.host, old.feedback_port
        for name, proxy in self.apple_proxy.items():
            found["apple_proxy", name, "port"] = proxy.host, proxy.port
        return found


class CredentialContent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As `CredentialSettings`, with what the files hold."""

    key: bytes | None = None
    key_id: str | None = None
    team_id: str | None = None
    certificate: bytes | None = None
    certificate_key: bytes | None = None
    passphrase: bytes | None = None
    environment: Environments | None = None
    file: str | None = None
    """Where it is from, for people."""

    def __repr__(self) -> str:
        return "<credentials>"


class AppContent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """As `AppSettings`, with what the files hold: all that an app is made of."""

    topics: tuple[str, ...] = ()
    credentials: tuple[CredentialContent, ...]
    host: str | None = None
    port: Port = 443
    ca: bytes | None = None
    proxy: str | None = None

    def __repr__(self) -> str:
        return f"<app with {len(self.credentials)} credentials>"


def _check_listener(host: str, certificate: str | None, certificate_key: str | None) -> None:
    """Raises ValueError."""
    if not _is_host(host):
        raise ValueError(
            "has a host that is neither a name nor an address: write 127.0.0.1 for this machine alone, 0.0.0.0 for all "
            "that reach it, or one of its addresses; the port goes into port"
        )
    if certificate_key is not None and certificate is None:
        raise ValueError("has certificate_key, but no certificate that it could belong to: add certificate")


def _check_app(setting: str, name: str) -> None:
    """Whether an app may be called so. Raises ValueError."""
    if not is_app_name(name):
        raise ValueError(f"has {name!r} in {setting}, which is no name of an app: write one, as in [apps.NAME]")


def _is_server_name(text: str) -> bool:
    """What may come as a server name: no address (RFC 6066, section 3)."""
    return _is_host_name(text) is not None and not text.endswith(".") and _address(text) is None


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches what listens there."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def are_same(one: str, other: str) -> bool:
    """Whether who listens on one of these hosts keeps others from the same port on the other one."""
    if one.lower() == other.lower():
        return True
    return any(
        here == there or (here.version == there.version and (here.is_unspecified or there.is_unspecified))
        for here in _addresses(one)
        for there in _addresses(other)
    )


def _addresses(host: str) -> list[IPv4Address | IPv6Address]:
    """What is known of a name without asking for it."""
    if host.lower() == "localhost":
        return [IPv4Address("127.0.0.1"), IPv6Address("::1")]
    address = _address(host)
    return [] if address is None else [address]


_OF_CERTIFICATES = (".p12", ".pfx", ".cer", ".crt")


def check_credentials(given: CredentialSettings) -> None:
    """Whether they belong together. Raises ValueError."""
    if given.key is not None and given.certificate is not None:
        raise ValueError("has both a key and a certificate: keep one, or give each a [[credentials]] table")
    if given.key is None and given.certificate is None:
        raise ValueError("has no credentials: add key, the .p8 file that Apple issued, or certificate, a .p12 or .pem")
    if given.key is not None:
        if given.certificate_key is not None:
            raise ValueError("has certificate_key, which goes with a certificate and not with a key: remove it")
        if given.team_id is None and given.key.lower().endswith(_OF_CERTIFICATES):
            raise ValueError("has a key whose name is that of a certificate: if it is one, write certificate, not key")
        if given.team_id is None:
            raise ValueError(
                "has a key but no team_id: write the 10 characters that the developer account shows as Team ID"
            )
    elif given.key_id is not None or given.team_id is not None:
        raise ValueError("has a key_id or a team_id, which go with a key and not with a certificate: remove them")


def check_target(host: str | None, port: int, *, ca: bool) -> None:
    """Whether an app can be sent there. Raises ValueError."""
    if host is None and port not in APPLE_PORTS:
        raise ValueError(f"has port {port}, but Apple listens on 443 and 2197: take one of these, or add host")
    if port == 0:
        raise ValueError("has port 0, where nobody can listen: write the port of host")
    if host is None and ca:
        raise ValueError("has a ca, but no host that it could be for: add host")
    if host is not None and not _is_host(host):
        raise ValueError(
            "has a host that is neither a name nor an address: write it alone, without http://, brackets and blanks; a "
            "port goes into port"
        )


def _is_host(text: str) -> bool:
    """A name of the DNS (RFC 1123, with the underscores that containers have; IDNs as xn--), or an IP address."""
    if ":" not in text:
        return _is_host_name(text) is not None
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text or _is_host_name(text.partition("%")[2]) is not None


def check_proxy(url: str, *, secret: bool = False) -> None:
    """Whether it is the URL of a proxy. Raises ValueError, which never repeats it.

    `secret`: it is kept as one, so there may be a password in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme != "http" or not parts.hostname or port is None or parts.path.strip("/") or parts.query:
        raise ValueError("has a proxy that is not like http://proxy.example.com:3128: correct it")
    if parts.password is not None and not secret:
        raise ValueError(
            "has a proxy with a password in it: put the URL into a file, and write file:PATH or credential:NAME"
        )


def is_reference(text: str) -> bool:
    """Whether it says where something is, not what it is."""
    return text.startswith(("file:", "credential:"))
