"""Apple in a box as a server: `Apple` behind HTTP/2 over TLS.

    async with Simulator() as apple:
        connect(..., port=apple.port, tls=client_context(apple.ca_pem))
        apple.rejects(token, "Unregistered", since=1_700_000_000_000)
        ...
        assert apple.received[-1].payload == payload

A connection may open one stream at a time until a good provider token came, then a thousand (Apple, "Sending
notification requests to APNs"); with a client certificate a thousand at once. All requests that one read brings are
judged together and answered in one write; delayed answers share one timer a connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from cryptography.x509 import load_der_x509_certificate
from msgspec import Struct

from heliograph import reasons
from heliograph.errors import ConfigError
from heliograph.model import Environment, SigningKey
from heliograph.net.http2 import Link, Listener, listen
from heliograph.net.tls import Identity, good_until, server_context, throwaway_identity
from heliograph.protocols import apns, http2
from heliograph.protocols.certificate import Particulars, particulars
from heliograph.protocols.http2 import Cancelled, Event, Field, Limits, Request, ServerConnection
from heliograph.protocols.provider_token import parse_signing_key
from heliograph.simulator.apple import KEEP, Apple, Verdict, Visit, addressed_to
from heliograph.simulator.faults import Answer, Close, Cut, Delay, GoAway, Immediate, Reset, StreamLimit, Withhold

KEY_ID = "HELIOGRAPH"
TEAM_ID = "SIMULATION"
"""Of the signing key that a simulator makes for itself."""

STREAMS = 1000

# Apple leaves connections open for hours; 8000 octets of header fields is what its SETTINGS say.
_LIMITS = Limits(idle_s=3600.0, header_octets=8000)
_GRACE_S = 0.1
"""How long open streams and slow clients may take when the simulator ends."""
_LEAST_LIFETIME = timedelta(days=1)


class Judged(Struct, frozen=True, omit_defaults=True):
    """A line of the journal: one request, and what it was answered."""

    at: float
    """UNIX seconds."""
    connection: int
    """Counted from 1."""
    stream: int
    token: str
    sha256: str
    """Of the body, as hex."""
    apns_id: str | None = None
    """The client's, or the one that it was answered with."""
    collapse_id: str | None = None
    status: int | None = None
    """None where the request was not judged."""
    reason: str | None = None
    fault: str | None = None
    """`withheld`, `cut`: judged, not answered. `closed`: not judged. `reset`: judged or not, as `status` says."""
    code: int | None = None
    """Of the reset."""
    topic: str = ""


class _Journal:
    """A file of `Judged` lines. What was written survives the end of this process."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: int | None = _open_private(path, os.O_APPEND)
        except OSError as error:
            raise ConfigError(f"The journal {path} cannot be written ({error.strerror}): name another file") from None

    def write(self, lines: Sequence[Judged]) -> None:
        if self._file is not None:  # a connection may outlive the simulator by a turn of the loop
            os.write(self._file, b"".join([msgspec.json.encode(line) + b"\n" for line in lines]))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Simulator(Apple):
    """An `Apple` that listens, from `async with` on."""

    def __init__(
        self,
        environment: Environment = Environment.PRODUCTION,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        identity: Identity | None = None,
        signing_key: SigningKey | None = None,
        first_streams: int = 1,
        streams: int = STREAMS,
        keep: int = KEEP,
        journal: Path | None = None,
        client_authorities: bytes | None = None,
    ) -> None:
        """Port 0 is any free one. `identity` and `signing_key` are made where they are not given.

        `first_streams`: what a connection may open at once before it brought a good provider token; `streams`: after.
        `journal`: a file that gets a JSON line (`Judged`) for each request, before it is answered.
        `client_authorities`: PEM. A client may show a certificate of theirs in place of provider tokens, and no other.

        Raises ConfigError where key, identity, port or journal cannot be used: here, or from `async with`.
        """
        super().__init__(environment, keep=keep)
        self.host = host
        self.port = port
        """Where it listens; the real one once it does."""
        self.identity = identity or throwaway_identity(datetime.now(UTC))
        self.signing_key = signing_key or new_signing_key()
        """Its provider tokens are good here."""
        self.add_key(self.signing_key)
        self.first_streams = first_streams
        self.streams = streams
        self.connections = 0
        """How many there have been."""
        self._client_authorities = client_authorities
        self._journal_path = journal
        self._journal: _Journal | None = None
        self._listener: Listener | None = None

    @property
    def ca_pem(self) -> bytes:
        """The authority that clients have to trust."""
        return self.identity.ca_pem

    def add_app(self, bundle_id: str, team_id: str | None = None) -> None:
        """As `Apple.add_app`; the team is that of `signing_key` where none is named."""
        super().add_app(bundle_id, team_id or self.signing_key.team_id)

    async def __aenter__(self) -> Self:
        tls = server_context(self.identity.certificate_pem, self.identity.key_pem)
        if self._client_authorities is not None:
            try:
                tls.load_verify_locations(cadata=self._client_authorities.decode("ascii"))
            except (ssl.SSLError, ValueError):
                raise ConfigError("The authorities of clients are not PEM: give certificates as text") from None
            tls.verify_mode = ssl.CERT_OPTIONAL
        if self._journal_path is not None:
            self._journal = _Journal(self._journal_path)
        try:
            self._listener = await listen(
                self._new_session, host=self.host, port=self.port, tls=tls, new_core=self._new_core
            )
        except OSError as error:
            self._close_journal()
            raise ConfigError(
                f"The simulator cannot listen on {self.host}:{self.port} ({error.strerror}): name another port"
            ) from None
        self.port = self._listener.port
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._listener is not None
        await self._listener.aclose(_GRACE_S)
        self._close_journal()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _new_session(self, link: Link[ServerConnection]) -> _Session:
        self.connections += 1
        return _Session(self, link, self.connections, self._journal)

    def _new_core(self, now: float) -> ServerConnection:
        return ServerConnection(now, max_streams=self.first_streams, limits=_LIMITS)


class _Session:
    """One connection: hands requests to Apple, and does what the faults say."""

    def __init__(self, apple: Simulator, link: Link[ServerConnection], number: int, journal: _Journal | None) -> None:
        self._apple = apple
        self._journal = journal
        self._link = link
        self._core = link.core
        self._number = number
        self._visit = Visit()
        self._raised = apple.first_streams == apple.streams
        """The client may open all streams."""
        self._allowed = apple.first_streams
        """The stream limit that the client was told last."""
        self._acted = 0
        """The highest stream that was acted on."""
        self._last_served: int | None = None
        """After a GOAWAY that named one: the last stream that is acted on."""
        self._leaving = False
        """We said GOAWAY."""
        self._closed = False
        self._waiting: list[tuple[float, int, list[Request], Immediate | None]] = []
        """Delayed requests as a heap: loop time, a number that keeps their order, what to do with them."""
        self._waits = 0
        self._cancelled: set[int] = set()
        """Streams that were cancelled while requests were waiting."""
        self._timer: asyncio.TimerHandle | None = None
        certificate = link.peer_certificate
        if certificate is not None:
            self._receive(particulars(load_der_x509_certificate(certificate)))

    def _receive(self, shown: Particulars) -> None:
        """The client showed a certificate: there is no need to wait for a provider token, and none is looked at."""
        if self._apple.environment not in shown.environments:
            no = reasons.BAD_CERTIFICATE_ENVIRONMENT if shown.environments else reasons.BAD_CERTIFICATE
            self._core.goaway(0, apns.answer_body(no.word), 0)
            self._leaving = True
            self._last_served = 0
            return
        self._visit.certificate = shown
        self._raised = True
        self._allow(self._apple.streams)

    # -- the link calls these ------------------------------------------------------------------------------------

    def on_events(self, events: Sequence[Event]) -> None:
        apple, judge, visit = self._apple, self._apple.judge, self._visit
        now = time.time()
        answers: list[http2.Answer] = []
        special = apple.misbehaving or self._journal is not None or self._last_served is not None
        lines: list[Judged] = []
        delayed: dict[Delay, list[Request]] = {}
        for event in events:
            if self._closed:
                return
            if type(event) is Request:
                if not special:
                    answers.append(_answer(event.stream_id, judge(visit, event.fields, event.body, now)))
                    continue
                action = apple.find_fault(*addressed_to(event.fields), self._number, event.stream_id, now)
                if isinstance(action, StreamLimit):
                    self._raised = True
                    self._allow(action.count)
                    action = action.then
                if isinstance(action, Delay):
                    delayed.setdefault(action, []).append(event)
                else:
                    self._treat(event, action, now, answers, lines)
            elif type(event) is Cancelled and (self._waiting or delayed):
                self._cancelled.add(event.stream_id)
        for delay, requests in delayed.items():
            self._wait(delay, requests)
        if answers:
            self._acted = max(self._acted, answers[-1].stream_id)
        self._answer(answers, lines)

    def on_writable(self) -> None:
        """Answers are small: nothing waits for this."""

    def on_close(self) -> None:
        self._closed = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    # -- inside --------------------------------------------------------------------------------------------------

    def _treat(
        self, request: Request, action: Immediate | None, now: float, answers: list[http2.Answer], lines: list[Judged]
    ) -> None:
        """Do with a request what `action` says, now; adds to `answers` and `lines`."""
        stream_id = request.stream_id
        if isinstance(action, GoAway):
            self._say_goodbye(action, stream_id)
        if self._last_served is not None and stream_id > self._last_served:
            return
        verdict: Verdict | None = None
        fault = _FAULTS.get(type(action))
        if not (isinstance(action, Close) or (isinstance(action, Reset) and not action.acted)):
            instead = action if isinstance(action, Answer) else None
            verdict = self._apple.judge(self._visit, request.fields, request.body, now, instead)
            self._acted = max(self._acted, stream_id)
        if self._journal is not None:
            code = action.code if isinstance(action, Reset) else None
            lines.append(_line(now, self._number, request, verdict, fault, code))
        if fault is None:
            assert verdict is not None
            answers.append(_answer(stream_id, verdict))
        elif isinstance(action, Reset):
            self._core.reset((stream_id,), action.code)
        elif isinstance(action, Close | Cut):
            self._answer(answers, lines)
            self._closed = True
            if isinstance(action, Close):
                self._link.close()
            else:
                self._link.abort()

    def _say_goodbye(self, action: GoAway, stream_id: int) -> None:
        last = action.last_stream_id
        if action.newest:
            last = max(self._acted, stream_id - 2 * action.newest)
        self._core.goaway(action.code, b"" if action.reason is None else apns.answer_body(action.reason), last)
        self._leaving = True
        if last is not None:
            self._last_served = last if self._last_served is None else min(last, self._last_served)

    def _allow(self, streams: int) -> None:
        if streams != self._allowed and not self._core.over:
            self._allowed = streams
            self._core.set_max_streams(streams)

    def _answer(self, answers: list[http2.Answer], lines: list[Judged]) -> None:
        if self._closed:
            return
        if self._journal is not None and lines:
            self._journal.write(lines)
        self._core.respond(answers)
        if not self._raised and self._visit.key_id is not None and not self._core.over:
            self._raised = True
            self._allow(self._apple.streams)
        if self._leaving and not self._core.open_streams:
            self._closed = True
            self._link.close()

    def _wait(self, delay: Delay, requests: list[Request]) -> None:
        self._waits += 1
        due = asyncio.get_running_loop().time() + delay.seconds
        heappush(self._waiting, (due, self._waits, requests, delay.then))
        self._set_timer()

    def _set_timer(self) -> None:
        due = self._waiting[0][0]
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._release)

    def _release(self) -> None:
        """Treat what is due."""
        self._timer = None
        now, until = time.time(), asyncio.get_running_loop().time()
        answers: list[http2.Answer] = []
        lines: list[Judged] = []
        while self._waiting and self._waiting[0][0] <= until:
            _, _, requests, action = heappop(self._waiting)
            for request in requests:
                if request.stream_id in self._cancelled:
                    continue
                self._treat(request, action, now, answers, lines)
                if self._closed:
                    return
        self._answer(answers, lines)
        self._link.flush()
        if self._waiting:
            self._set_timer()
        else:
            self._cancelled.clear()


_FAULTS: dict[type, str] = {Withhold: "withheld", Reset: "reset", Close: "closed", Cut: "cut"}
"""What the journal calls those that leave a request without an answer."""


def _answer(stream_id: int, verdict: Verdict) -> http2.Answer:
    if verdict.reason is None and verdict.unique_id is None:
        return http2.Answer(stream_id, verdict.status, ((b"apns-id", verdict.apns_id),))
    fields: list[Field] = [(b"apns-id", verdict.apns_id)]
    if verdict.unique_id is not None:
        fields.append((b"apns-unique-id", verdict.unique_id))
    if verdict.reason is None:
        return http2.Answer(stream_id, verdict.status, tuple(fields))
    fields.append((b"content-type", b"application/json"))
    if verdict.retry_after_s is not None:
        fields.append((b"retry-after", b"%d" % verdict.retry_after_s))
    return http2.Answer(stream_id, verdict.status, tuple(fields), apns.answer_body(verdict.reason, verdict.since))


def _line(
    now: float, connection: int, request: Request, verdict: Verdict | None, fault: str | None, code: int | None
) -> Judged:
    fields = dict(request.fields)
    token, topic = addressed_to(request.fields)
    apns_id = fields.get(b"apns-id") if verdict is None else verdict.apns_id
    collapse_id = fields.get(b"apns-collapse-id")
    return Judged(
        now,
        connection,
        request.stream_id,
        token.decode("ascii", "replace"),
        hashlib.sha256(request.body).hexdigest(),
        None if apns_id is None else apns_id.decode("ascii", "replace"),
        None if collapse_id is None else collapse_id.decode("utf-8", "replace"),
        None if verdict is None else verdict.status,
        None if verdict is None else verdict.reason,
        fault,
        code,
        topic.decode("utf-8", "replace"),
    )


# -- for the command line ----------------------------------------------------------------------------------------


def new_signing_key(key_id: str = KEY_ID, team_id: str = TEAM_ID) -> SigningKey:
    """A signing key as Apple hands them out, made here."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return SigningKey(key_id, team_id, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


async def run(
    host: str,
    port: int,
    folder: Path,
    say: Callable[[str], None],
    *,
    environment: Environment = Environment.PRODUCTION,
    journal: Path | None = None,
) -> None:
    """Listen until cancelled. What clients need is written into `folder`, or taken from there if it is there already.

    `say` gets lines for people. Raises ConfigError where the folder or the port cannot be used.
    """
    identity, key = _settle(folder)
    simulator = Simulator(environment, host=host, port=port, identity=identity, signing_key=key, journal=journal)
    async with simulator:
        say(f"Apple's simulator listens on https://{host}:{simulator.port} ({environment})")
        say(f"  trust        {folder / 'ca.pem'}")
        say(f"  signing key  {folder / _key_name()}  (key id {key.key_id}, team id {key.team_id})")
        await asyncio.Event().wait()


def _key_name() -> str:
    return f"AuthKey_{KEY_ID}.p8"


def _settle(folder: Path) -> tuple[Identity, SigningKey]:
    """The identity and signing key in `folder`, made where they are not there or about to expire."""
    names = ("ca.pem", "server.pem", "server.key")
    paths = [folder / name for name in names]
    key_path = folder / _key_name()
    now = datetime.now(UTC)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if all(path.exists() for path in paths) and good_until(paths[1].read_bytes()) > now + _LEAST_LIFETIME:
            identity = Identity(*(path.read_bytes() for path in paths))
        else:
            identity = throwaway_identity(now)
            pems = (identity.ca_pem, identity.certificate_pem, identity.key_pem)
            for path, pem in zip(paths, pems, strict=True):
                _write_private(path, pem)
        if key_path.exists():
            key = parse_signing_key(key_path.read_bytes(), key_id=KEY_ID, team_id=TEAM_ID)
        else:
            key = new_signing_key()
            _write_private(key_path, key.pem)
    except OSError as error:
        raise ConfigError(f"The folder {folder} cannot be used ({error.strerror}): name another one") from None
    return identity, key


def _write_private(path: Path, content: bytes) -> None:
    file = _open_private(path, os.O_TRUNC)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _open_private(path: Path, how: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
