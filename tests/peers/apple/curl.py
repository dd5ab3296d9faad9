"""curl. See `contract` for what a client is told and tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def config(told: Mapping[str, str]) -> str:
    """What `curl --config` is given: one request after the other."""
    return "\nnext\n".join(_transfer(told, *line.split()) for line in told["APPLE_PUSHES"].splitlines())


def read(output: str) -> list[dict[str, Any]]:
    """What curl printed, as a client tells it."""
    lines = (line.rsplit(" ", 2) for line in output.splitlines())
    return [{"status": int(status), "id": id_, **json.loads(body or "{}")} for body, status, id_ in lines]


def _transfer(told: Mapping[str, str], id_: str, token: str, topic: str, payload: str) -> str:
    named = "" if id_ == "-" else f'header = "apns-id: {id_}"'
    if "APPLE_PEM" in told:
        who = f'cert = "{told["APPLE_PEM"]}"'
    else:
        who = f'header = "authorization: bearer {told["APPLE_PROVIDER_TOKEN"]}"'
    return f"""
        url = "https://localhost:{told["APPLE_PORT"]}/3/device/{token}"
        http2
        cacert = "{told["APPLE_CA"]}"
        {who}
        {named}
        header = "apns-topic: {topic}"
        header = "apns-push-type: alert"
        data-binary = "@{payload}"
        write-out = " %{{http_code}} %header{{apns-id}}\\n"
    """
