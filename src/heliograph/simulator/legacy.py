"""Apple as it was from 2009 to 2021: the binary gateway and the feedback service, beside the simulator's HTTP/2.

Both know the same devices, follow the same rules and show what they take in the same places as HTTP/2 does. They take
TLS 1.0 and later, as Apple once did, and ask for no client certificate unless told to: one that is asked for has to be
known beforehand, while a client that is not asked keeps its own to itself, whatever that is.

What the feedback service lists are device tokens that the gateway was given in vain, and those that it was told to
list. It forgets them when the client has ended its side in order, after ours; else the next read has them again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from heliograph.config import TlsVersion
from heliograph.net.streams import Stream, StreamListener, User
from heliograph.net.tls import legacy_context
from heliograph.protocols.binary import FrameReader, feedback_tuples
from heliograph.protocols.certificate import Particulars, load
from heliograph.simulator.apple import Visit
from heliograph.simulator.devices import Gone, check_topic
from heliograph.simulator.faults import Action, Close, Cut, Door, Handshake, StopReading, Trickle
from heliograph.simulator.gateway import GatewaySession, Voice
from heliograph.simulator.journal import Journal
from heliograph.simulator.reception import Reception, Treatment, Welcome, bind, cannot_listen

if TYPE_CHECKING:
    from heliograph.simulator.server import Simulator

TOPIC = "com.example.demo"

MAX_PAYLOAD_BYTES = 2048
"""Apple's limit since June 2014; with command 2 since there is one."""


class Legacy(Struct, frozen=True, kw_only=True):
    """What the old Apple is like. Raises Refused where the topic is none."""

    port: int = 0
    """Of the binary gateway; 0 is any free one."""
    feedback_port: int = 0
    topic: str = TOPIC
    """What clients send to: the protocol does not say it, a certificate did."""
    max_payload: int = MAX_PAYLOAD_BYTES
    """With commands 0 and 1, in octets; with command 2 it is 2048 where this is less. Before June 2014 it was 256."""
    client_pem: bytes | None = None
    """A certificate and its key for clients that cannot start without one; None: one that is made when asked for."""
    required: bool = False
    """Whether clients have to show that certificate."""

    def __post_init__(self) -> None:
        check_topic(self.topic)

    def __repr__(self) -> str:
        return f"<the old Apple for {self.topic}>"


class LegacyDoors:
    """The gateway and the feedback service, from `start` to `aclose`."""

    def __init__(self, apple: Simulator, options: Legacy, journal: Journal | None) -> None:
        self._apple = apple
        self._options = options
        self._journal = journal
        self._tls = self._context(apple.identity.certificate_pem, apple.identity.key_pem)
        nobody = Particulars("", "", None, None, (options.topic,), (apple.environment,), 0, 0, "")
        self._new_visit = partial(Visit, nobody)
        self._gateway: Reception | None = None
        self._feedback: Reception | None = None
        self._listeners: set[_Single] = set()
        self._sessions: set[GatewaySession] = set()

    async def start(self) -> None:
        """Raises ConfigError where a port cannot be had."""
        options = self._options
        self._gateway = await self._listen("The legacy gateway", options.port, "legacy", self._enter_gateway)
        try:
            self._feedback = await self._listen(
                "The feedback service", options.feedback_port, "feedback", self._enter_feedback
            )
        except BaseException:
            await self.aclose(0.0)
            raise

    @property
    def port(self) -> int:
        assert self._gateway is not None
        return self._gateway.port

    @property
    def feedback_port(self) -> int:
        assert self._feedback is not None
        return self._feedback.port

    async def aclose(self, grace_s: float) -> None:
        """Listen no more, tell clients of the gateway how far it came, and end all connections after `grace_s`."""
        for reception in (self._gateway, self._feedback):
            if reception is not None:
                await reception.aclose(grace_s)
        for session in tuple(self._sessions):
            session.shut_down()
        await asyncio.gather(*(listener.aclose(grace_s) for listener in tuple(self._listeners)))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _listen(
        self, what: str, port: int, door: Door, enter: Callable[[int, Action | None, Stream], User]
    ) -> Reception:
        host = self._apple.host
        try:
            return Reception(await bind(host, port), lambda: self._receive(door, enter))
        except OSError as error:
            raise cannot_listen(what, host, port, error) from None

    def _receive(self, door: Door, enter: Callable[[int, Action | None, Stream], User]) -> Welcome | Treatment:
        """What to do with the next connection."""
        number, action = self._apple.count_connection(door)
        tls = self._tls
        if isinstance(action, Handshake):
            match action.how:
                case "silent" | "closed" | "alert" as treatment:
                    return treatment
                case how:
                    tls, action = self._context(*self._apple.faulty_identity(how)), None
        listener = _Single(partial(enter, number, action), tls, self._refused_at(door), self._listeners)
        return Welcome(None, lambda: Stream(listener))

    def _refused_at(self, door: Door) -> Callable[[str, str], None]:
        return lambda address, why: self._apple.on_refused(door, address, why)

    def _enter_gateway(self, number: int, opening: Action | None, stream: Stream) -> User:
        limit = self._options.max_payload
        session = GatewaySession(
            self._apple,
            stream,
            self._new_visit(),
            self._options.topic.encode(),
            FrameReader(max_payload=limit, max_item_payload=max(limit, MAX_PAYLOAD_BYTES)),
            number,
            self._journal,
            opening,
            left=self._sessions.discard,
        )
        self._sessions.add(session)
        return session

    def _enter_feedback(self, _: int, opening: Action | None, stream: Stream) -> User:
        return FeedbackSession(self._apple, stream, opening)

    def _context(self, certificate: bytes, key: bytes) -> ssl.SSLContext:
        required = self._options.required
        anchors = [load(self._apple.client_pem).certificate_pem] if required else []
        context = legacy_context(certificate, key, anchors=anchors, minimum=TlsVersion.TLS_1_0, required=required)
        if not required:
            context.verify_mode = ssl.CERT_NONE
        return context


class _Single(StreamListener):
    """What a stream knows as its listener: one for each connection, as each may be treated in its own way."""

    def __init__(
        self,
        new_user: Callable[[Stream], User],
        tls: ssl.SSLContext,
        refused: Callable[[str, str], None],
        all_of_them: set[_Single],
    ) -> None:
        super().__init__(new_user, lambda: tls, 1, refused)
        self._all = all_of_them

    def enters(self, stream: Stream) -> bool:
        self._all.add(self)
        return super().enters(stream)

    def leaves(self, stream: Stream) -> None:
        super().leaves(stream)
        self._all.discard(self)


class FeedbackSession:
    """One read of the feedback service."""

    def __init__(self, apple: Simulator, stream: Stream, opening: Action | None) -> None:
        self._apple = apple
        self._stream = stream
        self._opening = opening
        self._voice = Voice(stream)
        self._told: list[Gone] = []
        self._over = False
        """All was told."""

    def on_open(self) -> None:
        action = self._opening
        if isinstance(action, Close):
            self._stream.close()
            return
        if isinstance(action, Cut):
            self._stream.reset()
            return
        if isinstance(action, Trickle):
            self._voice.manner = action
        elif isinstance(action, StopReading):
            self._stream.pause()
            if action.seconds is not None:
                asyncio.get_running_loop().call_later(action.seconds, self._stream.resume)
        self._told = self._apple.feedback
        columns = [each.at for each in self._told], [each.token.encode() for each in self._told]
        self._voice.say(feedback_tuples(*columns), self._end)

    def on_data(self, data: bytes) -> None:
        """Nothing is asked here."""

    def on_end(self) -> None:
        """Whether it got the list shows when the connection is gone."""

    def on_close(self, error: Exception | None) -> None:
        self._voice.fall_silent()
        if error is None and self._over and self._stream.ended:
            self._apple.forget_feedback(self._told)

    def _end(self) -> None:
        self._over = True
        self._stream.end()
