"""What `heliograph doctor` sees of the listeners for old scripts and for APNs libraries. Nothing is changed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509

from heliograph.commands.findings import Finding, holder_of, no_port, ok, problem, warning
from heliograph.config import AppleProxySettings, Config, Environments, LegacySettings, TlsVersion, is_loopback
from heliograph.errors import ConfigError
from heliograph.net import identity

_SOON_DAYS = 30
_OLD = TlsVersion.TLS_1_0, TlsVersion.TLS_1_1


def of_listeners(config: Config) -> Iterator[Finding]:
    """Their ports, their certificates, and what is dangerous of how they are set."""
    is_running = holder_of(config) is not None
    for way, (host, port) in config.addresses().items():
        if way[0] == "api":
            continue
        about, where = ".".join(way), f"{host}:{port}"
        why = None if port == 0 or is_running else no_port(host, port)
        if why is not None:
            yield problem(
                about, f"{where} cannot be listened on ({why}): stop what is there, or set another host or port"
            )
    for name, legacy in config.legacy.items():
        about = f"legacy.{name}"
        yield _of_certificate(about, config, legacy)
        yield from _of_dangers(about, legacy)
        for app in _apps_without_proof(legacy):
            known = config.apps.get(app)
            if legacy.environment is None and known is not None and known.environment is Environments.BOTH:
                yield problem(
                    about, f"the app {app} has both environments, so its clients are refused: set environment"
                )
    for name, proxy in config.apple_proxy.items():
        about = f"apple_proxy.{name}"
        if proxy.tls:
            yield _of_certificate(about, config, proxy)
        else:
            yield ok(about, "without TLS, for programs on this machine")


def _of_certificate(about: str, config: Config, settings: LegacySettings | AppleProxySettings) -> Finding:
    data = Path(config.data)
    if settings.certificate is not None:
        try:
            chain, _ = identity.server_identity(data, settings.certificate, settings.certificate_key)
        except ConfigError as error:
            return problem(about, str(error))
        return _of_days(about, "its certificate", chain, "put a new one there, and restart the server")
    made = data / identity.SERVER
    what = f"its certificate, made by heliograph, which clients verify with {data / identity.AUTHORITY}"
    try:
        return _of_days(about, what, made.read_bytes(), "restart the server, which makes a new one")
    except FileNotFoundError:
        return ok(about, "its certificate is made on the first start")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is damaged"
        return problem(about, f"{made} cannot be read ({why}): remove it, and the next start makes it anew")


def _of_days(about: str, what: str, chain: bytes, advice: str) -> Finding:
    """Raises ValueError."""
    ends_at = x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc.timestamp()
    days = int((ends_at - time.time()) // 86_400)
    if days < 0:
        return problem(about, f"{what}: it ended {-days} days ago, {advice}")
    if days < _SOON_DAYS:
        return warning(about, f"{what}: {days} days left, {advice}")
    return ok(about, f"{what}: {days} days left")


def _apps_without_proof(settings: LegacySettings) -> Sequence[str]:
    """Those of clients that show no certificate."""
    return sorted({*settings.names.values(), *filter(None, [settings.app])})


def _of_dangers(about: str, settings: LegacySettings) -> Iterator[Finding]:
    apps = _apps_without_proof(settings)
    if apps and not is_loopback(settings.host):
        yield warning(
            about,
            f"whoever reaches {settings.host} may send for {' and '.join(apps)} without a certificate, as app or names "
            "say so: see that a firewall lets in only who should, or give clients certificates and remove these",
        )
    if settings.minimum_tls in _OLD:
        yield warning(
            about,
            f'minimum_tls = "{settings.minimum_tls}": whoever is on the way can read along, and perhaps change what is '
            "sent: only on networks that you trust, and only for clients that know no better",
        )
