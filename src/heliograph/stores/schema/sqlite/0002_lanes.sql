-- Lanes that take turns, the buried that are found and sent again, device tokens that are held back for a while, apps.

CREATE TABLE lane (
    number INTEGER PRIMARY KEY,
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    UNIQUE (app, environment)
) STRICT;

INSERT INTO lane (app, environment) SELECT DISTINCT app, environment FROM batch;

ALTER TABLE job RENAME TO former_job;

-- What is left to do: a batch that is finished has no row here.
CREATE TABLE job (
    row INTEGER PRIMARY KEY,            -- that of batch
    line INTEGER NOT NULL,              -- twice lane.number, and 1 more where the batch is large (stores/turns.py)
    size INTEGER NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, -- how often it was leased
    ended INTEGER NOT NULL DEFAULT 0,   -- the newest attempt whose lease was ended
    due_at REAL NOT NULL,               -- UNIX seconds, by the store's own clock
    leased_until REAL                   -- likewise; NULL: nobody holds it, or somebody did for too long
) STRICT;

INSERT INTO job
SELECT former_job.row, 2 * number + (batch.size > 32), batch.size,
    attempt, attempt - (leased_until IS NOT NULL), due_at, leased_until
FROM former_job JOIN batch USING (row) JOIN lane USING (app, environment) WHERE due_at IS NOT NULL;

DROP TABLE former_job;

CREATE INDEX job_due ON job (line, due_at) WHERE leased_until IS NULL;

-- Both are set where at least one of the batch is buried: what is looked for is then only what is there.
ALTER TABLE outcome ADD COLUMN buried_id BLOB;  -- the batch's id
ALTER TABLE outcome ADD COLUMN buried_app TEXT;

UPDATE outcome SET buried_id = batch.id, buried_app = batch.app
FROM batch WHERE batch.row = outcome.row AND instr(states, x'05') > 0;

CREATE INDEX outcome_buried ON outcome (buried_id) WHERE buried_id IS NOT NULL;
CREATE INDEX outcome_buried_app ON outcome (buried_app, buried_id) WHERE buried_id IS NOT NULL;

ALTER TABLE removal ADD COLUMN recorded_at REAL NOT NULL DEFAULT 0; -- UNIX seconds, by the store's own clock

UPDATE removal SET recorded_at = unixepoch();

CREATE INDEX removal_recorded ON removal (recorded_at);

CREATE TABLE quarantine (
    app TEXT NOT NULL,
    environment TEXT NOT NULL,
    token BLOB NOT NULL,                -- as in removal
    until REAL NOT NULL,                -- UNIX seconds, by the store's own clock
    PRIMARY KEY (app, environment, token)
) STRICT, WITHOUT ROWID;

CREATE INDEX quarantine_until ON quarantine (until);

CREATE TABLE app (
    name TEXT PRIMARY KEY,
    record BLOB NOT NULL
) STRICT, WITHOUT ROWID;
