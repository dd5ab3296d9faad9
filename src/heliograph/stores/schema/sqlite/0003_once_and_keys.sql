-- What was taken once under a word of the caller's, and API keys.

CREATE TABLE once (
    key BLOB PRIMARY KEY,               -- 32 octets: which request it is
    request BLOB NOT NULL,              -- 32 octets: a digest of what was asked
    answer BLOB NOT NULL,               -- what the door makes its answer from
    kept_at REAL NOT NULL               -- UNIX seconds, by the store's own clock
) STRICT;

CREATE INDEX once_kept ON once (kept_at);

CREATE TABLE api_key (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    digest BLOB NOT NULL,               -- SHA-256 of the whole key
    scopes TEXT NOT NULL,               -- JSON: an array of names
    apps TEXT,                          -- JSON: an array of names; NULL: all
    created_at REAL NOT NULL,           -- UNIX seconds
    expires_at REAL                     -- likewise; NULL: never
) STRICT, WITHOUT ROWID;
