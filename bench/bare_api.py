"""The least that an HTTP API in Python can do for a single notification: decode its JSON, answer 202, keep nothing.

`python -m bench.bare_api PORT`: starlette, msgspec and uvicorn with httptools and uvloop, as the product has them.
"""

from __future__ import annotations

import sys
import uuid

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Post(msgspec.Struct):
    app: str
    token: str
    payload: msgspec.Raw


_decode = msgspec.json.Decoder(Post).decode


async def take(request: Request) -> Response:
    _decode(await request.body())
    new_id = str(uuid.uuid4())
    where = f"/v1/notifications/{new_id}"
    body = msgspec.json.encode({"id": new_id, "receipt": where})
    return Response(body, 202, {"location": where, "content-type": "application/json"})


if __name__ == "__main__":
    uvicorn.run(
        Starlette(routes=[Route("/v1/notifications", take, methods=["POST"])]),
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
    )
