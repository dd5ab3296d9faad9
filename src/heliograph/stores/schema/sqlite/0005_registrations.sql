-- When device tokens were registered, as far as that was told: what Apple says of them that is not newer holds nothing
-- back, also where it comes to be known later.

CREATE TABLE registration (
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    token BLOB NOT NULL,                -- the octets that its hex digits spell
    at INTEGER NOT NULL,                -- UNIX seconds, of the last registration
    PRIMARY KEY (app, environment, token)
) STRICT, WITHOUT ROWID;

CREATE INDEX registration_at ON registration (at);
