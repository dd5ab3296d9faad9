"""What a foreign client of the binary protocol in this folder is told, and what it tells.

Told, in its environment: LEGACY_PORT and LEGACY_FEEDBACK_PORT on localhost; its certificate and key, together as
LEGACY_PEM and as LEGACY_P12, with LEGACY_PASSPHRASE, which may be empty; LEGACY_CA, the authority of the server's
certificate; LEGACY_PUSHES, a file with a line for each notification: identifier, expiration, priority, device token,
payload.

`careless` ones write these and are gone. `careful` ones wait for the error that will come, and go on behind the
notification that it is about if they are of the kind that does.
They tell, a line of JSON each: the errors they got, `status` and `token`; from the feedback service `token` and `at`.
"""
