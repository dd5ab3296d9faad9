"""What an app is made of: from settings to the contents of files, and from these to credentials and routes."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec import Struct
from msgspec.structs import replace

from heliograph import credentials
from heliograph.carriers.apns import Endpoint, Route
from heliograph.config import (
    MAX_CREDENTIALS,
    AppContent,
    AppSettings,
    CredentialContent,
    CredentialSettings,
    Environments,
    check_proxy,
    is_reference,
    read_file,
    read_secret,
    secret_path,
)
from heliograph.errors import ConfigError
from heliograph.model import Access, App, ClientCertificate, Credentials, Environment, PushType, SigningKey
from heliograph.net.proxy import parse_proxy
from heliograph.net.tls import client_context
from heliograph.protocols import certificate
from heliograph.protocols.apns import topic_for
from heliograph.protocols.certificate.files import Sort, items, unpack
from heliograph.protocols.provider_token import key_id_from_filename, parse_signing_key

APPLE = {
    Environment.PRODUCTION: "api.push.apple.com",
    Environment.DEVELOPMENT: "api.sandbox.push.apple.com",
}

MAX_CA_BYTES = 4 * 1024 * 1024
"""Of a file of authorities; those that systems trust are about a quarter of a megabyte."""

_SUFFIXES = tuple(filter(None, (topic_for("", push_type) for push_type in PushType)))
_LOCKED = "is under a passphrase"
_CREDENTIAL_FILES = ("key", "certificate", "certificate_key", "passphrase")


class Instead(Struct, frozen=True):
    """Where everything goes that was meant for Apple: a simulator in this process."""

    host: str
    port: int
    ca: bytes
    key: SigningKey
    """In place of certificates, which it does not ask for."""
    learn: Callable[[App], None]
    """Is told of each app that is new or has changed."""


class Entry(Struct, frozen=True):
    """An app, and the ways to Apple of its credentials."""

    app: App
    content: AppContent
    routes: Mapping[tuple[Environment, Credentials], Route]
    stored: bool
    """It came by the API, and not from the configuration."""


class Contexts:
    """TLS contexts, one for the same authority and certificate: what differs in nothing else shares connections."""

    def __init__(self) -> None:
        self._made: dict[tuple[bytes | None, ClientCertificate | None], ssl.SSLContext] = {}

    def find(self, ca: bytes | None, shown: ClientCertificate | None) -> ssl.SSLContext:
        """Raises ConfigError."""
        made = self._made.get((ca, shown))
        if made is None:
            made = self._made[ca, shown] = client_context(ca, shown)
        return made

    def keep(self, used: Iterable[ssl.SSLContext]) -> None:
        """Forget all others."""
        kept = {id(each) for each in used}
        self._made = {key: made for key, made in self._made.items() if id(made) in kept}


def kind_and_name(found: Credentials) -> tuple[str, str]:
    """What credentials are, and how people know them: a key's id, a certificate's common name."""
    return ("signing key", found.key_id) if isinstance(found, SigningKey) else ("certificate", found.name)


def credential_id(found: Credentials) -> str:
    """What an app's credentials are told apart by: a key's id, 16 hex digits of a certificate's fingerprint.

    The same key or certificate twice, for an environment each, has one.
    """
    return found.key_id if isinstance(found, SigningKey) else found.fingerprint[:16]


def ended(entry: Entry, now: float) -> list[ClientCertificate]:
    """The certificates that Apple does not take any more."""
    shown = (access.credentials for access in entry.app.access)
    return [each for each in shown if isinstance(each, ClientCertificate) and each.not_after <= now]


def show_entry(entry: Entry, now: float) -> dict[str, Any]:
    """An app as JSON, without secrets. Times are RFC 3339, in UTC."""
    content = entry.content
    return {
        "name": entry.app.name,
        "source": "api" if entry.stored else "configuration",
        "topics": entry.app.topics,
        "environments": entry.app.environments,
        "host": content.host,
        "port": content.port,
        "proxy": None if content.proxy is None else _without_password(content.proxy),
        "credentials": [_show_access(access, now) for access in entry.app.access],
    }


def _show_access(access: Access, now: float) -> dict[str, Any]:
    found = access.credentials
    kind, name = kind_and_name(found)
    common = {
        "id": credential_id(found),
        "kind": kind,
        "name": name,
        "environments": access.environments,
        "topics": access.topics,
    }
    if isinstance(found, SigningKey):
        return {**common, "team_id": found.team_id, "ends_at": None, "days_left": None}
    return {
        **common,
        "fingerprint": found.fingerprint,
        "ends_at": datetime.fromtimestamp(found.not_after, UTC).isoformat().replace("+00:00", "Z"),
        "days_left": credentials.days_left(found, now),
    }


# -- from files to contents ------------------------------------------------------------------------------------------


def read_content(name: str, settings: AppSettings) -> AppContent:
    """What an app of the configuration is made of, read from its files. Raises ConfigError."""
    where = f"apps.{name}"
    tables = [
        _read_credentials(f"{where}.credentials[{number}]" if settings.credentials else where, each)
        for number, each in enumerate(settings.each_credentials(), 1)
    ]
    proxy = settings.proxy
    if proxy is not None and is_reference(proxy):
        proxy = read_secret(proxy, f"{where}.proxy").decode("utf-8", "replace").strip()
        try:
            check_proxy(proxy, secret=True)
        except ValueError as error:
            raise ConfigError(f"{where} {error}") from None
    return AppContent(
        topics=settings.bundle_ids,
        credentials=tuple(tables),
        host=settings.host,
        port=settings.port,
        ca=None if settings.ca is None else read_file(Path(settings.ca), f"{where}.ca", most=MAX_CA_BYTES),
        proxy=proxy,
    )


def _read_credentials(where: str, given: CredentialSettings) -> CredentialContent:
    references = {name: getattr(given, name) for name in _CREDENTIAL_FILES}
    contents = {
        name: read_secret(reference, f"{where}.{name}")
        for name, reference in references.items()
        if reference is not None
    }
    if "passphrase" in contents:
        contents["passphrase"] = contents["passphrase"].rstrip(b"\r\n")
    main = "key" if given.key is not None else "certificate"
    path = secret_path(references[main], f"{where}.{main}")
    key_id = given.key_id
    if given.key is not None:
        _refuse_certificate(f"{where}.key: {path}", contents["key"])
    if given.key is not None and key_id is None:
        key_id = key_id_from_filename(path.name)
        if key_id is None:
            raise ConfigError(
                f"{where}.key_id is missing, and the file's name {path.name} does not say it as AuthKey_<key id>.p8 "
                "would: add key_id"
            )
    return CredentialContent(
        **contents, key_id=key_id, team_id=given.team_id, environment=given.environment, file=str(path)
    )


def _refuse_certificate(place: str, content: bytes) -> None:
    """Raises ConfigError where it stands for a signing key."""
    try:
        sorts = {item.sort for item in items(content)}
    except ConfigError:  # which whoever opens it tells better
        return
    if Sort.P12 in sorts or (Sort.CERTIFICATE in sorts and sorts & {Sort.KEY, Sort.LOCKED_KEY}):
        raise ConfigError(
            f"{place} is a certificate with its private key: name it in certificate instead, and leave out key_id and "
            "team_id, which go with a .p8"
        )
    if Sort.CERTIFICATE in sorts:
        raise ConfigError(
            f"{place} is a certificate, and has no private key: in Keychain Access select the certificate and its key, "
            "export both as .p12, and name that in certificate, without key_id and team_id"
        )


def files_of(settings: AppSettings) -> Iterator[Path]:
    """All files that an app is made of, as far as they can be named."""
    references = [getattr(each, name) for each in settings.each_credentials() for name in _CREDENTIAL_FILES]
    references += [settings.proxy] if settings.proxy and is_reference(settings.proxy) else []
    for reference in references:
        if reference is not None:
            with contextlib.suppress(ConfigError):
                yield secret_path(reference, "")
    if settings.ca is not None:
        yield Path(settings.ca)


# -- from contents to an app -----------------------------------------------------------------------------------------


def build(
    name: str, content: AppContent, where: str, contexts: Contexts, *, stored: bool, instead: Instead | None = None
) -> Entry:
    """Raises ConfigError; `where` is for its text, empty where there is one app only that could be meant."""
    prefix = f"{where}: " if where else ""
    access: list[Access] = []
    normal: list[CredentialContent] = []
    for number, given in enumerate(content.credentials, 1):
        table = f", credentials table {number}" if len(content.credentials) > 1 else ""
        place = f"{where}{table}" + (f" ({given.file})" if given.file else "")
        opened, settled = _open_at(place, given, content.topics, stored=stored)
        access.append(opened)
        normal.append(settled)
    topics = content.topics or tuple(
        dict.fromkeys(topic for each in access for topic in bundle_ids(each.topics or ())),
    )
    if not topics:
        raise ConfigError(
            f"{prefix}nothing says which topics the app has, as a certificate would: give the app a topic"
        )
    for topic in topics:
        if not any(each.topics is None or topic in bundle_ids(each.topics) for each in access):
            raise ConfigError(
                f"{prefix}nothing that is given opens the topic {topic}: add its credentials, or leave it out"
            )
    for number, each in enumerate(access):
        if all(any(_covers(other, each, one) for other in access[:number]) for one in each.environments):
            kind, called = kind_and_name(each.credentials)
            raise ConfigError(
                f"{prefix}the {kind} {called} is never used, as what stands before it opens the same: put it first, or "
                "leave it out"
            )
    if content.proxy is not None:
        try:
            parse_proxy(content.proxy)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from None
    content = replace(content, credentials=tuple(normal))
    try:
        routes = {
            (environment, each.credentials): _route(content, environment, each.credentials, contexts, instead)
            for each in access
            for environment in each.environments
        }
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
    return Entry(App(name, topics, tuple(access)), content, routes, stored)


def with_credentials(entry: Entry, given: CredentialContent, instead_of: str | None) -> tuple[AppContent, Credentials]:
    """What a stored app is made of with these in it too, and what they are.

    They come in the place of those with the id `instead_of` or with their own, else behind all; whether there are some
    with the id `instead_of` is for the caller to see. Raises ConfigError.
    """
    opened, settled = _open_at("", given, entry.content.topics, stored=True)
    made = opened.credentials
    gone = {credential_id(made), instead_of}
    kept: list[CredentialContent | None] = [
        None if credential_id(access.credentials) in gone else each
        for access, each in zip(entry.app.access, entry.content.credentials, strict=True)
    ]
    if None not in kept and instead_of is None:
        if len(kept) >= MAX_CREDENTIALS:
            raise ConfigError(f"The app has {MAX_CREDENTIALS} credentials, which are enough: remove some first")
        _check_use(entry, opened)
    place = kept.index(None) if None in kept else len(kept)
    kept[place : place + 1] = [settled]
    return replace(entry.content, credentials=tuple(filter(None, kept))), made


def _check_use(entry: Entry, new: Access) -> None:
    """Raises ConfigError where credentials behind those of an app would never be used."""
    before = [
        next((other for other in entry.app.access if _covers(other, new, environment)), None)
        for environment in new.environments
    ]
    if None not in before:
        ids = " and ".join(dict.fromkeys(credential_id(each.credentials) for each in before if each is not None))
        raise ConfigError(
            f"The {' '.join(kind_and_name(new.credentials))} would never be used, as {ids} stands before it and opens "
            f"the same: have it replace {ids}, or leave it out"
        )


def without_credentials(entry: Entry, gone: str) -> AppContent:
    """What an app is made of without those with this id."""
    pairs = zip(entry.app.access, entry.content.credentials, strict=True)
    kept = tuple(each for access, each in pairs if credential_id(access.credentials) != gone)
    return replace(entry.content, credentials=kept)


def bundle_ids(topics: Iterable[str]) -> tuple[str, ...]:
    """The topics of a certificate without the suffixes of push types."""
    listed = list(topics)
    found: dict[str, None] = {}
    for topic in listed:
        suffix = next((each for each in _SUFFIXES if topic.endswith(each)), "")
        # A bundle id may end like a suffix itself; then it stands there with more of them.
        own = any(topic + each in listed for each in _SUFFIXES)
        found[topic if own else topic.removesuffix(suffix)] = None
    return tuple(found)


def suffixed(topics: Iterable[str], certified: Iterable[str]) -> list[str]:
    """Bundle ids that end as the topic of a push type does, and are rather such a topic.

    They may end so: a certificate says it, in its topics `certified`.
    """
    sure = bundle_ids(certified)
    return [topic for topic in topics if topic.endswith(_SUFFIXES) and topic not in sure]


def _open_at(
    place: str, given: CredentialContent, topics: tuple[str, ...], *, stored: bool
) -> tuple[Access, CredentialContent]:
    """As `_open`; `place` is for the text of errors."""
    try:
        return _open(given, topics)
    except ConfigError as error:
        told = f"{place}: {error}" if place else str(error)
        if given.passphrase is None and _LOCKED in told:
            told += ", as passphrase" if stored else ', as passphrase = "file:PATH"'
        raise ConfigError(told) from None


def _open(given: CredentialContent, topics: tuple[str, ...]) -> tuple[Access, CredentialContent]:
    """Credentials and what they open, and how they are kept. Raises ConfigError."""
    environments = None if given.environment is None else given.environment.each()
    if given.key is not None:
        if b"ENCRYPTED" in given.key:
            keys = unpack(given.key, passphrase=given.passphrase).keys
            if len(keys) == 1:
                plain = keys[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                given = replace(given, key=plain, passphrase=None)
        key = parse_signing_key(given.key or b"", key_id=given.key_id or "", team_id=given.team_id or "")
        return Access(key, environments or Environments.PRODUCTION.each()), given
    assert given.certificate is not None
    found = certificate.load(given.certificate, key=given.certificate_key, passphrase=given.passphrase)
    for environment in environments or ():
        if environment not in found.environments:
            raise ConfigError(
                f"The certificate is for {' and '.join(found.environments)}, not for {environment}: correct "
                "environment, or leave it out"
            )
    its = bundle_ids(found.topics)
    if topics and not set(topics) & set(its):
        raise ConfigError(
            f"The certificate is for {', '.join(its)}, not for {', '.join(topics)}: correct topic, or leave it out"
        )
    kept = CredentialContent(
        certificate=found.certificate_pem,
        certificate_key=found.key_pem,
        environment=given.environment,
        file=given.file,
    )
    return Access(found, environments or found.environments, found.topics), kept


def _covers(other: Access, one: Access, environment: Environment) -> bool:
    if environment not in other.environments:
        return False
    return other.topics is None or (one.topics is not None and set(one.topics) <= set(other.topics))


def _route(
    content: AppContent, environment: Environment, found: Credentials, contexts: Contexts, instead: Instead | None
) -> Route:
    unique_ids = environment is Environment.DEVELOPMENT
    if instead is not None:
        tls = contexts.find(instead.ca, None)
        with_key = found if isinstance(found, SigningKey) else instead.key
        return Route(Endpoint(instead.host, instead.port, tls, unique_ids), with_key)
    key, shown = (found, None) if isinstance(found, SigningKey) else (None, found)
    host = content.host or APPLE[environment]
    return Route(Endpoint(host, content.port, contexts.find(content.ca, shown), unique_ids, content.proxy), key)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"http://{host}:{parts.port}"
