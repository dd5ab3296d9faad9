"""The JSON that Apple carries: check it, build it, say what is wrong with it, shorten its text.

Bytes that a caller brought are never rewritten, but for alert text that `shorten` cuts.

| function | for | cost |
|---|---|---|
| `check` | admission: refuses what Apple, or every device, would refuse | one decode |
| `build` | callers who have fields and no JSON; refuses what cannot be meant as well | an encode, a decode, a look |
| `validate` | people: everything that is wrong, and all that will not do what was meant | the same without the encode |

Sources: Apple, "Generating a remote notification" (keys and sizes), "Pushing background updates to your App",
"Starting and updating Live Activities with ActivityKit push notifications", "Updating controls locally and remotely",
"Sending broadcast push notification requests to APNs". `action`, `action-loc-key`, `summary-arg` and `url-args` are of
former editions; Safari and old systems still read them.
"""

from heliograph.payload.building import build
from heliograph.payload.checking import (
    MAX_BROADCAST_BYTES,
    MAX_BYTES,
    MAX_NESTING,
    MAX_VOIP_BYTES,
    Problem,
    Size,
    check,
    limit,
    measure,
)
from heliograph.payload.fields import CriticalSound, InterruptionLevel, LiveActivity, Localized
from heliograph.payload.reviewing import validate
from heliograph.payload.shortening import shorten

__all__ = [
    "MAX_BROADCAST_BYTES",
    "MAX_BYTES",
    "MAX_NESTING",
    "MAX_VOIP_BYTES",
    "CriticalSound",
    "InterruptionLevel",
    "LiveActivity",
    "Localized",
    "Problem",
    "Size",
    "build",
    "check",
    "limit",
    "measure",
    "shorten",
    "validate",
]
