//! Rows by lease: asked for ahead of time, checked on arrival.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    time::Duration,
};

use shanty_access::Channel;
use shanty_data::order::row_hash;
use shanty_proto::error::UNREACHABLE;
use shanty_proto::v1::{
    Announcement, LeaseRowsRequest, LeaseRowsResponse, worker_service_client::WorkerServiceClient,
};
use tokio::{runtime::Handle, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{debug, warn};

use crate::{
    Error,
    control::Interrupted,
    engine::{Row, Segment},
};

/// Rows of one request. A longer slice takes several, so that messages stay small.
const ROWS_A_REQUEST: usize = 64;
/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// First pause after a request that failed; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Asks the coordinator for rows.
#[derive(Debug, Clone)]
pub(crate) struct RowClient {
    client: WorkerServiceClient<Channel>,
    runtime: Handle,
}

/// Rows of one slice and what the whole step must amount to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Leased {
    pub(crate) announcement: Announcement,
    pub(crate) rows: Vec<Row>,
}

/// Rows that are on their way.
#[derive(Debug)]
pub(crate) struct Lease {
    receiver: Receiver<Result<Leased, Error>>,
}

impl Lease {
    /// Waits for the rows.
    ///
    /// # Errors
    /// `Err(Interrupted)` if the generation was left, `Ok(Err(…))` if the rows cannot be had or are wrong.
    pub(crate) fn wait(self) -> Result<Result<Leased, Error>, Interrupted> {
        self.receiver.recv().map_err(|_| Interrupted)
    }

    /// The rows, if they are there; a model of a trainer must not block.
    #[cfg(all(test, feature = "simulation"))]
    pub(crate) fn look(&self) -> Result<Option<Result<Leased, Error>>, Interrupted> {
        match self.receiver.try_recv() {
            Ok(leased) => Ok(Some(leased)),
            Err(std::sync::mpsc::TryRecvError::Empty) => Ok(None),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Err(Interrupted),
        }
    }
}

impl RowClient {
    /// Requests go over `client`, in tasks of `runtime`.
    pub(crate) fn new(client: WorkerServiceClient<Channel>, runtime: Handle) -> Self {
        Self { client, runtime }
    }

    /// Begins to fetch rows. Goes on trying while the coordinator is away, until `cancel`.
    pub(crate) fn lease(&self, request: LeaseRowsRequest, cancel: CancellationToken) -> Lease {
        let (sender, receiver) = sync_channel(1);
        self.runtime.spawn(fetch(self.client.clone(), request, cancel, sender));
        Lease { receiver }
    }
}

async fn fetch(
    client: WorkerServiceClient<Channel>,
    request: LeaseRowsRequest,
    cancel: CancellationToken,
    sender: SyncSender<Result<Leased, Error>>,
) {
    tokio::select! {
        leased = lease_all(client, request) => {
            // Nobody listens any more if the trainer left meanwhile.
            let _ = sender.try_send(leased);
        }
        () = cancel.cancelled() => {}
    }
}

async fn lease_all(
    mut client: WorkerServiceClient<Channel>,
    request: LeaseRowsRequest,
) -> Result<Leased, Error> {
    let mut rows = Vec::with_capacity(request.row_ids.len());
    let mut announcement = None;
    let parts: Vec<&[u64]> = match request.row_ids.as_slice() {
        // A rank without rows asks all the same: for the announcement.
        [] => vec![&[]],
        ids => ids.chunks(ROWS_A_REQUEST).collect(),
    };
    for ids in parts {
        let part = LeaseRowsRequest { row_ids: ids.to_vec(), ..request.clone() };
        let response = lease_part(&mut client, &part).await?;
        let wrong = |reason: String| Error::WrongRows { step: request.step, reason };
        let announced =
            response.announcement.ok_or_else(|| wrong("the announcement is missing".to_owned()))?;
        if announcement.get_or_insert(announced) != &announced {
            return Err(wrong("two announcements of one step differ".to_owned()));
        }
        rows.extend(check(request.step, ids, response.rows)?);
    }
    let announcement = announcement.expect("there is at least one part, and each sets it");
    Ok(Leased { announcement, rows })
}

async fn lease_part(
    client: &mut WorkerServiceClient<Channel>,
    part: &LeaseRowsRequest,
) -> Result<LeaseRowsResponse, Error> {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut request = tonic::Request::new(part.clone());
        request.set_timeout(REQUEST_WITHIN);
        match client.lease_rows(request).await {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) if may_pass(&status) => {
                debug!(step = part.step, code = ?status.code(), reason = status.message(), "rows are not to be had yet");
            }
            Err(status) => {
                warn!(step = part.step, code = ?status.code(), reason = status.message(), "rows were refused");
                return Err(Error::Part(Box::new(shanty_proto::from_status(&status))));
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether the coordinator may answer otherwise later: it is away, has just started, or has not noted a generation.
/// A status without our error detail comes from the connection, whatever its code, and so passes.
fn may_pass(status: &Status) -> bool {
    let error = shanty_proto::from_status(status);
    error.code == UNREACHABLE
        || error.kind.is_retryable()
        // A token that is just being exchanged: if there is no other, the session ends the worker.
        || matches!(status.code(), Code::NotFound | Code::FailedPrecondition | Code::Unauthenticated)
}

fn check(step: u64, ids: &[u64], rows: Vec<shanty_proto::v1::Row>) -> Result<Vec<Row>, Error> {
    let wrong = |reason: String| Error::WrongRows { step, reason };
    if rows.len() != ids.len() {
        return Err(wrong(format!("{} rows were asked for, {} came", ids.len(), rows.len())));
    }
    let mut checked = Vec::with_capacity(rows.len());
    for (id, row) in ids.iter().zip(rows) {
        if row.id != *id {
            return Err(wrong(format!("row {id} was asked for, row {} came", row.id)));
        }
        checked.push(take_over(row).map_err(|reason| wrong(format!("row {id}: {reason}")))?);
    }
    Ok(checked)
}

/// The wire's row as the engine takes it.
fn take_over(row: shanty_proto::v1::Row) -> Result<Row, &'static str> {
    let segments: Vec<Segment> = row
        .segments
        .iter()
        .map(|segment| Segment { sample_id: segment.sample_id, length: segment.length })
        .collect();
    let length: u64 = segments.iter().map(|segment| u64::from(segment.length)).sum();
    if length != row.token_ids.len() as u64 {
        return Err("its segments do not add up to its tokens");
    }
    if !row.trained.len().is_multiple_of(2) {
        return Err("a trained range has no end");
    }
    let trained = row.trained.chunks_exact(2).map(|ends| ends[0]..ends[1]).collect();
    Ok(Row { id: row.id, token_ids: row.token_ids, segments, trained })
}

/// The wrapping sum of the hashes of some rows.
pub(crate) fn hash_of_rows(ids: impl IntoIterator<Item = u64>) -> u64 {
    ids.into_iter().map(row_hash).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use shanty_diagnostic::{Diagnostic, Kind};
    use shanty_proto::v1;

    use super::*;

    fn wire_row(id: u64) -> v1::Row {
        v1::Row {
            id,
            token_ids: vec![5, 6, 7],
            segments: vec![v1::Segment { sample_id: 1, length: 3 }],
            trained: vec![1, 3],
        }
    }

    #[test]
    fn rows_are_taken_over_as_they_were_sent() {
        let rows = check(1, &[9], vec![wire_row(9)]).unwrap();
        assert_eq!(rows[0].trained_tokens(), 2);
        assert_eq!(rows[0].segments, [Segment { sample_id: 1, length: 3 }]);
    }

    #[test]
    fn only_the_coordinators_own_refusal_is_taken_at_its_word() {
        let refusal = |kind| shanty_proto::to_status(&Diagnostic::new("SH0775", "no such row").kind(kind));
        assert!(!may_pass(&refusal(Kind::User)));
        assert!(may_pass(&refusal(Kind::Transient)), "a generation that it has not noted yet");
        // What tonic makes of a connection that broke in the middle of an answer.
        assert!(may_pass(&Status::internal("h2 protocol error: http2 error")));
        assert!(may_pass(&Status::unavailable("connection refused")));
    }

    #[test]
    fn rows_that_nobody_asked_for_are_refused() {
        let refuse = |ids: &[u64], rows| check(1, ids, rows).unwrap_err().to_string();
        assert!(refuse(&[1, 2], vec![wire_row(1)]).contains("2 rows were asked for, 1 came"));
        assert!(refuse(&[1], vec![wire_row(2)]).contains("row 1 was asked for, row 2 came"));
        let torn = v1::Row { trained: vec![1], ..wire_row(1) };
        assert!(refuse(&[1], vec![torn]).contains("has no end"));
        let short = v1::Row { segments: Vec::new(), ..wire_row(1) };
        assert!(refuse(&[1], vec![short]).contains("do not add up"));
    }
}
