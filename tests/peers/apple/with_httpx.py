"""The Python library httpx with its extra `http2`. See `contract` for what it is told and tells."""

from __future__ import annotations

import json
import os
import ssl
from importlib import import_module
from pathlib import Path


def main() -> None:
    # By name: what the type checker says is not to hang on whether it is installed.
    httpx = import_module("httpx")
    tls = ssl.create_default_context(cafile=os.environ["APPLE_CA"])
    with httpx.Client(http1=False, http2=True, verify=tls) as client:
        for line in os.environ["APPLE_PUSHES"].splitlines():
            id_, token, topic, payload = line.split()
            named = {} if id_ == "-" else {"apns-id": id_}
            answer = client.post(
                f"https://localhost:{os.environ['APPLE_PORT']}/3/device/{token}",
                content=Path(payload).read_bytes(),
                headers={
                    "authorization": f"bearer {os.environ['APPLE_PROVIDER_TOKEN']}",
                    **named,
                    "apns-topic": topic,
                    "apns-push-type": "alert",
                },
            )
            no = answer.json() if answer.content else {}
            print(json.dumps({"status": answer.status_code, "id": answer.headers["apns-id"], **no}))  # noqa: T201


if __name__ == "__main__":
    main()
