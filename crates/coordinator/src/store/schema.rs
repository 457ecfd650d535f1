//! Tables and their versions.

use rusqlite::Connection;

use crate::error::{Error, Result};

/// The newest version, the one that is written.
pub(super) const VERSION: i64 = 2;

/// What brings a store from version `n` to `n + 1`, by `n`.
const UPGRADES: [&str; VERSION as usize] = [
    "
CREATE TABLE jobs (
    id          TEXT PRIMARY KEY,
    sequence    INTEGER NOT NULL,
    request_id  TEXT NOT NULL UNIQUE,
    spec        TEXT NOT NULL,
    state       TEXT NOT NULL,
    reason      TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    data_hash   TEXT,
    watermark   INTEGER NOT NULL,
    generation  INTEGER NOT NULL,
    evaluated   INTEGER,
    record      TEXT NOT NULL          -- the whole record but for spec and watermark, as JSON
) WITHOUT ROWID;
CREATE TABLE steps (
    job         TEXT NOT NULL,
    step        INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    generation  INTEGER NOT NULL,
    record      TEXT NOT NULL,
    PRIMARY KEY (job, step)
) WITHOUT ROWID;
CREATE TABLE evaluations (
    job         TEXT NOT NULL,
    step        INTEGER NOT NULL,
    record      TEXT NOT NULL,
    PRIMARY KEY (job, step)
) WITHOUT ROWID;
CREATE TABLE checkpoints (
    job         TEXT NOT NULL,
    path        TEXT NOT NULL,
    step        INTEGER NOT NULL,
    record      TEXT NOT NULL,
    PRIMARY KEY (job, path)
) WITHOUT ROWID;
CREATE TABLE events (
    number      INTEGER PRIMARY KEY,
    job         TEXT NOT NULL,
    record      TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job, number);
CREATE TABLE logs (
    number      INTEGER PRIMARY KEY,
    job         TEXT NOT NULL,
    worker      TEXT NOT NULL,
    unix_ms     INTEGER NOT NULL,
    level       TEXT NOT NULL,
    text        TEXT NOT NULL
);
CREATE INDEX logs_by_job ON logs (job, number);
",
    "
-- Of a token the hash alone: whoever reads this file cannot show what it was made of.
CREATE TABLE tokens (
    id          TEXT PRIMARY KEY,
    record      TEXT NOT NULL
) WITHOUT ROWID;
-- Secrets of generations were kept in the records of jobs; they are made anew from a key that lies elsewhere.
UPDATE jobs SET record = json_remove(record, '$.generation.token');
",
];

/// Brings the store to the newest version.
pub(super) fn upgrade(connection: &mut Connection) -> Result<()> {
    let failed = |source| Error::Store { action: "set up tables", source };
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    let done = usize::try_from(found).ok().filter(|done| *done <= UPGRADES.len());
    let Some(done) = done else { return Err(Error::StoreVersion { found, known: VERSION }) };
    let transaction = connection.transaction().map_err(failed)?;
    for upgrade in &UPGRADES[done..] {
        transaction.execute_batch(upgrade).map_err(failed)?;
    }
    transaction.pragma_update(None, "user_version", VERSION).map_err(failed)?;
    transaction.commit().map_err(failed)
}
