//! Reading the store.

use rusqlite::{Connection, params};
use serde::de::DeserializeOwned;
use shanty_proto::Step;

use super::LogLine;
use crate::{
    access::TokenRecord,
    error::{Error, Result},
    machine::{
        StoredJob,
        record::{CheckpointRecord, EvaluationRecord, EventRecord, JobRecord, StepRecord},
    },
};

/// Steps that a restarted machine is given: enough to tell repeats from news.
const STEPS_RESTORED: u32 = 300;
/// Events that a restarted machine is given.
const EVENTS_RESTORED: u32 = 100;

fn failed(source: rusqlite::Error) -> Error {
    Error::Store { action: "read", source }
}

fn parse<T: DeserializeOwned>(what: &str, json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|source| Error::Record { what: what.to_owned(), source })
}

/// Rows of one text column, each a record as JSON.
fn records<T: DeserializeOwned>(
    connection: &Connection,
    what: &str,
    query: &str,
    parameters: impl rusqlite::Params,
) -> Result<Vec<T>> {
    let mut statement = connection.prepare_cached(query).map_err(failed)?;
    let rows = statement.query_map(parameters, |row| row.get::<_, String>(0)).map_err(failed)?;
    rows.map(|json| parse(what, &json.map_err(failed)?)).collect()
}

pub(super) fn jobs(connection: &Connection) -> Result<Vec<StoredJob>> {
    let mut statement = connection
        .prepare("SELECT id, spec, watermark, record FROM jobs ORDER BY sequence")
        .map_err(failed)?;
    let rows = statement
        .query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, String>(1)?,
                row.get::<_, i64>(2)?,
                row.get::<_, String>(3)?,
            ))
        })
        .map_err(failed)?;
    let mut jobs = Vec::new();
    for row in rows {
        let (id, spec, watermark, json) = row.map_err(failed)?;
        let mut record: JobRecord = parse(&format!("job {id}"), &json)?;
        record.spec_json = spec;
        record.watermark = Step(watermark.unsigned_abs());
        // A crash may have come between a watermark and the rest.
        record.furthest = record.furthest.max(record.watermark);
        jobs.push(StoredJob {
            steps: last_steps(connection, &id)?,
            evaluations: evaluations(connection, &id)?,
            checkpoints: checkpoints(connection, &id)?,
            events: events(connection, &id, EVENTS_RESTORED)?,
            record,
        });
    }
    Ok(jobs)
}

pub(super) fn tokens(connection: &Connection) -> Result<Vec<TokenRecord>> {
    records(connection, "a token", "SELECT record FROM tokens ORDER BY id", [])
}

fn last_steps(connection: &Connection, job: &str) -> Result<Vec<StepRecord>> {
    let query = "SELECT record FROM (SELECT step, record FROM steps WHERE job = ?1 ORDER BY step DESC LIMIT ?2) ORDER BY step";
    records(connection, "a step", query, params![job, STEPS_RESTORED])
}

fn evaluations(connection: &Connection, job: &str) -> Result<Vec<EvaluationRecord>> {
    records(connection, "an evaluation", "SELECT record FROM evaluations WHERE job = ?1 ORDER BY step", [job])
}

fn checkpoints(connection: &Connection, job: &str) -> Result<Vec<CheckpointRecord>> {
    records(connection, "a checkpoint", "SELECT record FROM checkpoints WHERE job = ?1 ORDER BY step", [job])
}

pub(super) fn events(connection: &Connection, job: &str, limit: u32) -> Result<Vec<EventRecord>> {
    let query = "SELECT record FROM (
        SELECT number, record FROM events WHERE job = ?1 ORDER BY number DESC LIMIT ?2) ORDER BY number";
    records(connection, "an event", query, params![job, limit])
}

/// At most `limit` steps from `from` on, evenly spaced, the last among them.
pub(super) fn steps(connection: &Connection, job: &str, from: u64, limit: u32) -> Result<Vec<StepRecord>> {
    let query = "SELECT record FROM (
        SELECT step, record, row_number() OVER (ORDER BY step DESC) - 1 AS place, count(*) OVER () AS n
        FROM steps WHERE job = ?1 AND step >= ?2
    ) WHERE place % ((n + ?3 - 1) / ?3) = 0 ORDER BY step";
    let from = i64::try_from(from).unwrap_or(i64::MAX);
    records(connection, "a step", query, params![job, from, limit.max(1)])
}

/// The newest `limit` lines, oldest first; of one worker, if it is named.
pub(super) fn logs(connection: &Connection, job: &str, worker: &str, limit: u32) -> Result<Vec<LogLine>> {
    let query = "SELECT unix_ms, worker, level, text FROM (
        SELECT * FROM logs WHERE job = ?1 AND (?2 = '' OR worker = ?2) ORDER BY number DESC LIMIT ?3) ORDER BY number";
    let mut statement = connection.prepare_cached(query).map_err(failed)?;
    let rows = statement
        .query_map(params![job, worker, limit], |row| {
            let unix_ms: i64 = row.get(0)?;
            Ok(LogLine {
                unix_ms: unix_ms.unsigned_abs(),
                worker: row.get(1)?,
                level: row.get(2)?,
                text: row.get(3)?,
            })
        })
        .map_err(failed)?;
    rows.map(|row| row.map_err(failed)).collect()
}
