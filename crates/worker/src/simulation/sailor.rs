//! A worker's host: the session as it is, and the model of a trainer.

use std::sync::{Arc, mpsc::channel};

use shanty_proto::v1::{Hello, worker_service_client::WorkerServiceClient};
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    harbour::jumps,
    model::Model,
    sea::{Shared, lock},
    wire,
};
use crate::{control::Control, rows::RowClient, session::Session};

/// A worker's process, from its start until it crashes.
pub(super) async fn run(sea: Shared) -> turmoil::Result {
    let name = {
        let mut sea = lock(&sea);
        sea.workers += 1;
        format!("w-{:04}", sea.workers)
    };
    let client = WorkerServiceClient::new(wire::channel());
    let control = Arc::new(Control::default());
    let (commands, commanded) = channel();
    let (reports, reported) = mpsc::unbounded_channel();
    // Nobody logs; the channel stays open.
    let (_log, logs) = mpsc::channel(1);
    let hello = Hello {
        worker_id: name.clone(),
        host: name.clone(),
        pid: 1,
        device: "cpu".to_owned(),
        threads: 1,
        collective_address: format!("{name}:1"),
        ..Hello::default()
    };
    let rows = RowClient::new(client.clone(), Handle::current());
    let model = Model::new(Arc::clone(&sea), Arc::clone(&control), commanded, reports, rows);
    let session = Session {
        client,
        address: wire::HARBOUR.to_owned(),
        hello,
        control,
        commands,
        reports: reported,
        logs,
        facts: None,
        drain: CancellationToken::new(),
    };
    tokio::select! {
        biased;
        ended = Box::pin(session.run(CancellationToken::new())) => Ok(ended?),
        () = model.run() => Ok(()),
        () = jumps(sea) => Ok(()),
    }
}
