"""A client of the HTTP API that writes down what it does: singles, one payload for many, many payloads, mixed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import time
import uuid
from collections.abc import Sequence
from typing import Self

import aiohttp
import msgspec

from tests.faults.ledger import OWN_ID, ClientFile, Submitted, Taken
from tests.faults.server import TOPIC, Server

_WORKERS = 4
_LARGEST = 200
"""Notifications in one request, at most, where the case does not say otherwise."""
_AGAIN_S = 0.02
"""Pause after a connection broke."""


class Load:
    """Posts what it is given to post, at whatever process is up."""

    def __init__(self, server: Server, file: ClientFile, chance: random.Random) -> None:
        self._server = server
        self._file = file
        self._chance = chance
        self._next = 1
        self._left = 0
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._busy = 0
        self.taken: dict[str, Submitted] = {}
        """By apns-id: what got a 2xx."""
        self.refused: list[tuple[int, str]] = []
        """Answers that were neither a 2xx nor a plea for patience."""
        self.at_most_once = False
        self.repeats = False
        """Post again, as the same request (`Idempotency-Key`), until there is an answer."""
        self.largest = _LARGEST
        self.filler = 0
        """Octets that make payloads longer."""

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        await asyncio.wait((self._running,))

    async def _run(self) -> None:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for _ in range(_WORKERS):
                group.create_task(self._work(session))

    def give(self, count: int) -> None:
        """So many more notifications are to be posted."""
        self._left += count
        self._idle.clear()
        self._more.set()

    async def done(self) -> None:
        """Wait until all that was given was posted, whatever became of it."""
        idle = asyncio.create_task(self._idle.wait())
        await asyncio.wait((idle, self._running), return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()

    async def post(self, session: aiohttp.ClientSession, body: bytes, wanted: Sequence[Submitted]) -> bool:
        """Post until there is an answer; False where the connection broke first, and it is not to be repeated."""
        self.note(wanted)
        headers = {**self._server.authorization, "Content-Type": "application/json"}
        if self.repeats:
            headers["Idempotency-Key"] = str(uuid.UUID(int=self._chance.getrandbits(128)))
        while True:
            try:
                async with session.post(
                    f"{self._server.url}/v1/notifications",
                    data=io.BytesIO(body),  # aiohttp warns of large bodies that are whole
                    headers=headers,
                ) as response:
                    text = await response.read()
            except (aiohttp.ClientError, OSError):
                if not self.repeats:
                    return False
                await asyncio.sleep(_AGAIN_S)
                await self._server.up.wait()
                continue
            if response.status in (429, 503):
                await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
                continue
            if response.status not in (200, 202):
                self.refused.append((response.status, text.decode()))
                return True
            answer = msgspec.json.decode(text)
            self.note_taken(wanted, [answer["id"]] if "id" in answer else answer["ids"])
            return True

    def note(self, wanted: Sequence[Submitted]) -> None:
        """These are about to be submitted."""
        self._file.write(wanted)

    def note_taken(self, wanted: Sequence[Submitted], ids: Sequence[str]) -> None:
        """These got a 2xx."""
        now = time.time()
        self._file.write([Taken(each.client_id, name, now) for each, name in zip(wanted, ids, strict=True)])
        self.taken |= zip(ids, wanted, strict=True)

    def make(self, most: int) -> tuple[bytes, list[Submitted]]:
        """A request for at most so many, and what it submits."""
        shape = self._chance.choice(("one", "shared", "each")) if most > 1 else "one"
        if shape == "one":
            return self.make_one()
        count = self._chance.randint(2, min(most, self.largest))
        common = {"at_most_once": True} if self.at_most_once else {}
        if shape == "shared":
            payload = self._payload(self._next)
            wanted = [self._submitted(payload, OWN_ID) for _ in range(count)]
            post = {"tokens": [each.token for each in wanted], "payload": msgspec.Raw(payload), **common}
            return msgspec.json.encode(post), wanted
        items, wanted = [], []
        for _ in range(count):
            number = self._next
            kind = self._chance.choice(("alert", "collapsing", "background"))
            payload = self._payload(number, background=kind == "background")
            item = {"token": f"{number:064x}", "payload": msgspec.Raw(payload)}
            collapse_id: str | None = OWN_ID
            if kind == "collapsing":
                item["collapse_id"] = collapse_id = f"collapse {number}"
            elif kind == "background":
                item["push_type"] = kind
                collapse_id = None
            items.append(item)
            wanted.append(self._submitted(payload, collapse_id))
        return msgspec.json.encode({"notifications": items, **common}), wanted

    def make_one(self, token: str | None = None, *, at_most_once: bool = False) -> tuple[bytes, list[Submitted]]:
        payload = self._payload(self._next)
        wanted = self._submitted(payload, OWN_ID, token, at_most_once=at_most_once)
        post: dict[str, object] = {"token": wanted.token, "payload": msgspec.Raw(payload)}
        if wanted.at_most_once:
            post["at_most_once"] = True
        return msgspec.json.encode(post), [wanted]

    def _payload(self, number: int, *, background: bool = False) -> bytes:
        aps: dict[str, object] = {"content-available": 1} if background else {"alert": f"The kettle boils, {number}"}
        more = {"filler": "x" * self.filler} if self.filler else {}
        return msgspec.json.encode({"aps": aps, "number": number, **more})

    def _submitted(
        self, payload: bytes, collapse_id: str | None, token: str | None = None, *, at_most_once: bool = False
    ) -> Submitted:
        number = self._next
        self._next += 1
        return Submitted(
            number,
            token or f"{number:064x}",
            hashlib.sha256(payload).hexdigest(),
            TOPIC,
            collapse_id,
            at_most_once=at_most_once or self.at_most_once,
        )

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while True:
            while not self._left:
                if not self._busy:
                    self._idle.set()
                self._more.clear()
                await self._more.wait()
            await self._server.up.wait()
            if not self._left:
                continue
            body, wanted = self.make(self._left)
            self._left -= len(wanted)
            self._busy += 1
            try:
                if not await self.post(session, body, wanted):
                    await asyncio.sleep(_AGAIN_S)
            finally:
                self._busy -= 1
