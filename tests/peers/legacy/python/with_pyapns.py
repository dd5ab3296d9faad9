"""PyAPNs, in the edition for Python 3. See ../contract.py."""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module

from tests.peers.legacy.python.common import HOST, messages, tell

library = import_module("apns3")
careful = sys.argv[1] == "careful"
# It asks for one file with both, and for no passphrase.
apns = library.APNs(cert_file=os.environ["LEGACY_PEM"], enhanced=careful)
if sys.argv[1] == "feedback":
    feedback = apns.feedback_server
    feedback.server, feedback.port = HOST, int(os.environ["LEGACY_FEEDBACK_PORT"])
    for token, at in feedback.items():
        tell(token=token.decode(), at=int((at - at.__class__(1970, 1, 1)).total_seconds()))
    sys.exit()

gateway = apns.gateway_server
gateway.server, gateway.port = HOST, int(os.environ["LEGACY_PORT"])
sent = messages()
refused = threading.Event()


def on_error(error: dict[str, int]) -> None:
    tell(status=error["status"], token=next(each.token for each in sent if each.identifier == error["identifier"]))
    refused.set()


if careful:
    gateway.register_response_listener(on_error)
for message in sent:
    payload = library.Payload(alert=json.loads(message.payload)["aps"]["alert"])
    gateway.send_notification(message.token, payload, identifier=message.identifier, expiry=message.expiry)
if careful:
    # It would go on by itself, but for a mistake in this edition: its thread ends with a TypeError.
    refused.wait()
