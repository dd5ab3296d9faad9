-- Which connection brought a batch, ids that callers brought, removals in the order of their coming, callers with a
-- certificate or a signing key of their own.

ALTER TABLE batch ADD COLUMN connection TEXT;   -- NULL: none that has a name

CREATE INDEX batch_connection ON batch (connection, id) WHERE connection IS NOT NULL;

-- Of the notifications alone that are sent under an id of their caller's.
CREATE TABLE apns_id (
    row INTEGER NOT NULL,               -- that of batch
    place INTEGER NOT NULL,             -- in it, counted from 0
    id BLOB NOT NULL,                   -- 16 octets
    PRIMARY KEY (row, place)
) STRICT, WITHOUT ROWID;

CREATE INDEX apns_id_id ON apns_id (id, row, place);

ALTER TABLE removal RENAME TO former_removal;
DROP INDEX removal_recorded;

-- Rows are written by one connection, so numbers become visible in their order: whoever has read up to one has missed
-- none below it.
CREATE TABLE removal (
    number INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used again; a new one where the token died again
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    token BLOB NOT NULL,                -- the octets that its hex digits spell
    since INTEGER NOT NULL,             -- UNIX seconds
    recorded_at REAL NOT NULL,          -- UNIX seconds, by the store's own clock
    UNIQUE (app, environment, token)
) STRICT;

INSERT INTO removal (app, environment, token, since, recorded_at)
SELECT app, environment, token, since, recorded_at FROM former_removal ORDER BY recorded_at, since, token;

DROP TABLE former_removal;

CREATE INDEX removal_number ON removal (app, environment, number);
CREATE INDEX removal_recorded ON removal (recorded_at);

-- What the feedback service told. Nothing so far: removals from before are told the first time that somebody asks.
CREATE TABLE told (
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    number INTEGER NOT NULL,            -- of the last removal that was
    PRIMARY KEY (app, environment)
) STRICT, WITHOUT ROWID;

CREATE TABLE caller (
    id TEXT PRIMARY KEY,
    record BLOB NOT NULL                -- JSON: model.KnownCaller; nothing in it is secret
) STRICT, WITHOUT ROWID;
