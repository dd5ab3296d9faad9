"""A whole server with an Apple-shaped proxy, a simulator as Apple, and callers that show what clients show."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from heliograph.config import ApiSettings, AppleProxySettings, Config
from heliograph.model import SigningKey
from heliograph.net.identity import AUTHORITY
from heliograph.protocols.provider_token import mint
from heliograph.service import Running, serving
from heliograph.simulator.apple import Verdict, Visit
from heliograph.simulator.server import Simulator, new_signing_key
from tests.peers.apple.contract import DEAD, FOREIGN, GOOD, OTHERS_TOPIC, SINCE, TOPIC, Push, listed
from tests.peers.foreign import run

PATIENCE_S = 30.0
"""After this a test gives up."""
BAD, ODD, SECOND = "ba" * 32, "abc", "a2b3c4d5" * 8
"""Of which Apple says that it is bad, which is none at all, and one more that is good."""


def the_pushes(folder: Path) -> list[Push]:
    """With the answer to each: Apple's, or, for `ODD` and the last two, heliograph's in Apple's words.

    The first has no id of its own.
    """
    small, large = folder / "small.json", folder / "large.json"
    small.write_text('{"aps":{"alert":"hello"}}')
    large.write_text(json.dumps({"aps": {"alert": "x" * 5000}}))
    pushes: list[tuple[str, str, Path, dict[str, Any]]] = [
        (SECOND, TOPIC, small, {"status": 200}),
        (GOOD, TOPIC, small, {"status": 200}),
        (DEAD, TOPIC, small, {"status": 410, "reason": "Unregistered", "timestamp": SINCE}),
        (BAD, TOPIC, small, {"status": 400, "reason": "BadDeviceToken"}),
        (ODD, TOPIC, small, {"status": 400, "reason": "BadDeviceToken"}),
        (FOREIGN, TOPIC, small, {"status": 400, "reason": "DeviceTokenNotForTopic"}),
        (GOOD, OTHERS_TOPIC, small, {"status": 400, "reason": "TopicDisallowed"}),
        (GOOD, TOPIC, large, {"status": 413, "reason": "PayloadTooLarge"}),
    ]
    ids = [None, *(f"0191d5a8-0000-7000-8000-{number:012d}" for number in range(1, len(pushes)))]
    return [Push(id_, *push) for id_, push in zip(ids, pushes, strict=True)]


class Asked(NamedTuple):
    """What Apple was asked, and by whom."""

    id: str
    token: str
    authorization: str
    showed_certificate: bool


class Attentive(Simulator):
    """It keeps every request."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []

    def judge(self, visit: Visit, fields: Sequence[tuple[bytes, bytes]], *others: Any, **more: Any) -> Verdict:
        verdict = super().judge(visit, fields, *others, **more)
        named = {name: value.decode() for name, value in fields}
        token = named[b":path"].rpartition("/")[2]
        authorization = named.get(b"authorization", "")
        self.asked.append(Asked(verdict.apns_id.decode(), token, authorization, visit.certificate is not None))
        return verdict


class House:
    """What a test speaks to."""

    def __init__(self, apple: Attentive, running: Running, session: aiohttp.ClientSession, folder: Path) -> None:
        self.apple = apple
        self.folder = folder
        self.port = running.ports["apple_proxy", "main", "port"]
        self.authority = folder / "data" / AUTHORITY
        self._running = running
        self._session = session

    async def ask(self, method: str, path: str, content: Any = None, *, patient: bool = False) -> Any:
        """The answer of the API. `patient`: while there is none, ask again."""
        headers = {"authorization": f"bearer {self._running.key}"}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with self._session.request(
                    method, self._running.url + path, json=content, headers=headers
                ) as answer:
                    said = await answer.json()
                    if answer.status < 300:
                        return said
                    assert answer.status == 404, said
                    assert patient, said
                await asyncio.sleep(0.02)

    async def heliograph(self, *arguments: str | Path) -> None:
        """The command line, as the operator of this server uses it."""
        where = {"HELIOGRAPH_URL": self._running.url, "HELIOGRAPH_KEY": self._running.key}
        await run(sys.executable, "-m", "heliograph", *arguments, more=where)

    # -- what a client is told -----------------------------------------------------------------------------------

    def told(self, pushes: Sequence[Push], key: SigningKey) -> dict[str, str]:
        """With a signing key, whether it is known or not."""
        file = self.folder / f"AuthKey_{key.key_id}.p8"
        file.write_bytes(key.pem)
        return {
            "APPLE_PORT": str(self.port),
            "APPLE_CA": str(self.authority),
            "APPLE_KEY_FILE": str(file),
            "APPLE_KEY_ID": key.key_id,
            "APPLE_TEAM_ID": key.team_id,
            "APPLE_PROVIDER_TOKEN": mint(key, time.time()),
            "APPLE_PUSHES": listed(pushes),
        }

    async def with_key(self, pushes: Sequence[Push]) -> dict[str, str]:
        """A signing key of the client's own, which the operator registers."""
        key = new_signing_key("CALLERKEY1", "CALLERTEAM")
        told = self.told(pushes, key)
        await self.heliograph("callers", "add", "shop", told["APPLE_KEY_FILE"], "--team-id", key.team_id)
        return told

    async def with_api_key(self, pushes: Sequence[Push]) -> dict[str, str]:
        """A key of heliograph's API in the place of a provider token."""
        made = await self.ask("POST", "/v1/keys", {"name": "a client", "scopes": ["send"], "apps": ["shop"]})
        return {**self.told(pushes, new_signing_key("NOBODYSKEY", "NOBODYTEAM")), "APPLE_PROVIDER_TOKEN": made["key"]}

    async def with_certificate(self, pushes: Sequence[Push]) -> dict[str, str]:
        """A certificate that heliograph makes."""
        prefix = self.folder / "own"
        await self.heliograph("legacy", "certificate", "shop", "--output", prefix)
        files = {"APPLE_PEM": f"{prefix}.pem", "APPLE_P12": f"{prefix}.p12"}
        return {**self.told(pushes, new_signing_key("NOBODYSKEY", "NOBODYTEAM")), **files}


def app_at(apple: Simulator, topic: str) -> dict[str, Any]:
    key = apple.signing_key
    ids = {"key_id": key.key_id, "team_id": key.team_id}
    place = {"host": "localhost", "port": apple.port, "ca": apple.ca_pem.decode()}
    return {"topic": topic, "key": key.pem.decode(), **ids, **place}


@asynccontextmanager
async def open_house(folder: Path, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[House]:
    """With the apps `shop` and `other`; the proxy listens there."""
    config = Config(
        data=str(folder / "data"),
        api=ApiSettings(port=0),
        apple_proxy={"main": AppleProxySettings(host=host, port=port)},
    )
    async with Attentive() as apple:
        apple.unregister(DEAD, since=SINCE)
        apple.register(FOREIGN, topic=OTHERS_TOPIC)
        apple.rejects(BAD, "BadDeviceToken")
        async with serving(config) as running, aiohttp.ClientSession() as session:
            house = House(apple, running, session, folder)
            for name, topic in (("shop", TOPIC), ("other", OTHERS_TOPIC)):
                apple.add_app(topic)
                await house.ask("PUT", f"/v1/apps/{name}", app_at(apple, topic))
            yield house
