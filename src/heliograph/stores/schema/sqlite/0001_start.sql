-- Three tables in step, one row a batch in each, by how often a row changes: never, at each lease, at each settling.
-- So a lease writes some 40 octets, and nothing ever writes a body again.

CREATE TABLE batch (
    row INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,            -- 16 octets: a UUIDv7 whose last 16 bits are zero
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    created_at REAL NOT NULL,           -- UNIX seconds
    size INTEGER NOT NULL,              -- notifications
    body BLOB NOT NULL                  -- see stores/body.py; last, so that its overflow pages are read only when asked for
) STRICT;

CREATE TABLE job (
    row INTEGER PRIMARY KEY,            -- that of batch
    size INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, -- how often it was leased
    due_at REAL,                        -- NULL: nothing is left to do
    leased_until REAL                   -- NULL: nobody holds it
) STRICT;

CREATE INDEX job_due ON job (due_at) WHERE due_at IS NOT NULL AND leased_until IS NULL;
CREATE INDEX job_leased ON job (leased_until) WHERE leased_until IS NOT NULL;

CREATE TABLE outcome (
    row INTEGER PRIMARY KEY,            -- that of batch; no row: nothing is known yet
    attempt INTEGER NOT NULL,
    states BLOB NOT NULL,
    times_ms BLOB NOT NULL,
    details BLOB                        -- msgpack: an array of model.Detail; NULL: none
) STRICT;

CREATE TABLE removal (
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    token BLOB NOT NULL,                -- the octets that its hex digits spell
    since INTEGER NOT NULL,             -- UNIX seconds
    PRIMARY KEY (app, environment, token)
) STRICT, WITHOUT ROWID;
