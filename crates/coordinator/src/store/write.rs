//! Carrying out durable changes.

use rusqlite::{Connection, params};
use serde::Serialize;

use super::LogLine;
use crate::machine::{Change, record::JobRecord};

/// Beyond this many steps of a job, every other of the older half is dropped.
const MOST_STEPS: u64 = 40_000;
/// The same for evaluations.
const MOST_EVALUATIONS: u64 = 10_000;
/// Checkpoints of a job that are remembered; far more than are kept.
const MOST_CHECKPOINTS: i64 = 200;
/// Lines of a job that are kept.
const MOST_LOG_LINES: i64 = 5_000;
/// Events of a job that are kept.
const MOST_EVENTS: i64 = 5_000;

fn json(record: &impl Serialize) -> String {
    serde_json::to_string(record).expect("records have string keys and plain values")
}

fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn apply(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
    match change {
        Change::Job(record) => job(connection, record),
        Change::Watermark(job, step) => connection
            .prepare_cached("UPDATE jobs SET watermark = ?2 WHERE id = ?1")?
            .execute(params![job.as_str(), number(step.0)])
            .map(drop),
        Change::Step(job, record) => {
            // The highest (attempt, generation) wins; a repeat of the same changes nothing.
            connection
                .prepare_cached(
                    "INSERT INTO steps VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (job, step) DO UPDATE
                     SET attempt = excluded.attempt, generation = excluded.generation, record = excluded.record
                     WHERE (excluded.attempt, excluded.generation) > (attempt, generation)",
                )?
                .execute(params![
                    job.as_str(),
                    number(record.step.0),
                    record.attempt.0,
                    number(record.generation.0),
                    json(record)
                ])?;
            if record.step.0 % 1000 == 0 {
                thin(connection, "steps", job.as_str(), MOST_STEPS)
            } else {
                Ok(())
            }
        }
        Change::Evaluation(job, record) => {
            connection
                .prepare_cached("INSERT OR REPLACE INTO evaluations VALUES (?1, ?2, ?3)")?
                .execute(params![job.as_str(), number(record.step.0), json(record)])?;
            thin(connection, "evaluations", job.as_str(), MOST_EVALUATIONS)
        }
        Change::Checkpoint(job, record) => {
            connection
                .prepare_cached("INSERT OR REPLACE INTO checkpoints VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![job.as_str(), record.path, number(record.step.0), json(record)])?;
            connection
                .prepare_cached(
                    "DELETE FROM checkpoints WHERE job = ?1 AND path NOT IN (
                         SELECT path FROM checkpoints WHERE job = ?1 ORDER BY step DESC LIMIT ?2)",
                )?
                .execute(params![job.as_str(), MOST_CHECKPOINTS])
                .map(drop)
        }
        Change::CheckpointsRemoved(job, paths) => {
            let mut delete =
                connection.prepare_cached("DELETE FROM checkpoints WHERE job = ?1 AND path = ?2")?;
            paths.iter().try_for_each(|path| delete.execute(params![job.as_str(), path]).map(drop))
        }
        Change::Event(job, record) => {
            connection
                .prepare_cached("INSERT INTO events (job, record) VALUES (?1, ?2)")?
                .execute(params![job.as_str(), json(record)])?;
            keep_newest(connection, "events", job.as_str(), 1, MOST_EVENTS)
        }
        Change::Token(record) => connection
            .prepare_cached("INSERT OR REPLACE INTO tokens VALUES (?1, ?2)")?
            .execute(params![record.id.as_str(), json(record)])
            .map(drop),
        Change::TokenGone(id) => {
            connection.prepare_cached("DELETE FROM tokens WHERE id = ?1")?.execute([id.as_str()]).map(drop)
        }
        Change::Truncate(job, step) => {
            for table in ["steps", "evaluations", "checkpoints"] {
                connection
                    .prepare_cached(&format!("DELETE FROM {table} WHERE job = ?1 AND step > ?2"))?
                    .execute(params![job.as_str(), number(step.0)])?;
            }
            Ok(())
        }
    }
}

fn job(connection: &Connection, record: &JobRecord) -> rusqlite::Result<()> {
    // The spec never changes and is the longest part: it is written once.
    let rest = JobRecord { spec_json: String::new(), ..record.clone() };
    connection
        .prepare_cached(
            "INSERT INTO jobs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12) ON CONFLICT (id) DO UPDATE SET
             sequence = excluded.sequence, state = excluded.state, reason = excluded.reason,
             attempt = excluded.attempt, data_hash = excluded.data_hash, watermark = excluded.watermark,
             generation = excluded.generation, evaluated = excluded.evaluated, record = excluded.record",
        )?
        .execute(params![
            record.id.as_str(),
            number(record.sequence),
            record.request_id,
            record.spec_json,
            record.state.as_str(),
            record.reason,
            record.attempt.0,
            record.facts.as_ref().map(|facts| facts.hash.as_str()),
            number(record.watermark.0),
            number(record.generation.as_ref().map_or(0, |generation| generation.generation.0)),
            record.evaluated.map(|step| number(step.0)),
            json(&rest),
        ])
        .map(drop)
}

/// Drops every other step of the older half of a table, once there are too many.
fn thin(connection: &Connection, table: &str, job: &str, most: u64) -> rusqlite::Result<()> {
    let count: i64 = connection
        .prepare_cached(&format!("SELECT count(*) FROM {table} WHERE job = ?1"))?
        .query_row([job], |row| row.get(0))?;
    if number(most) >= count {
        return Ok(());
    }
    connection
        .prepare_cached(&format!(
            "DELETE FROM {table} WHERE job = ?1 AND step IN (
                 SELECT step FROM (
                     SELECT step, row_number() OVER (ORDER BY step) AS place FROM {table} WHERE job = ?1
                 ) WHERE place <= ?2 AND place % 2 = 0)"
        ))?
        .execute(params![job, count / 2])
        .map(drop)
}

pub(super) fn logs(connection: &Connection, job: &str, lines: &[LogLine]) -> rusqlite::Result<()> {
    let mut insert = connection
        .prepare_cached("INSERT INTO logs (job, worker, unix_ms, level, text) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for line in lines {
        insert.execute(params![job, line.worker, number(line.unix_ms), line.level, line.text])?;
    }
    keep_newest(connection, "logs", job, lines.len(), MOST_LOG_LINES)
}

/// Drops the oldest rows of a job, in lots, so that not every insertion has to.
fn keep_newest(
    connection: &Connection,
    table: &str,
    job: &str,
    added: usize,
    most: i64,
) -> rusqlite::Result<()> {
    if connection.last_insert_rowid() % 256 >= added as i64 {
        return Ok(());
    }
    connection
        .prepare_cached(&format!(
            "DELETE FROM {table} WHERE job = ?1 AND number <= (
                 SELECT number FROM {table} WHERE job = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)"
        ))?
        .execute(params![job, most])
        .map(drop)
}
