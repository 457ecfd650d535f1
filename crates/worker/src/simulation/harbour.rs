//! The coordinator's host.

use std::{sync::Arc, time::Duration};

use shanty_config::JobSpec;
use shanty_coordinator::{
    Result as CoordinatorResult, machine,
    machine::record::DataFacts,
    outside::{Found, Later, Outside, Progress, Rows},
    simulation::{Surroundings, serve},
};
use shanty_data::{Row, Split};
use shanty_diagnostic::Diagnostic;
use shanty_proto::{JobId, Step};
use tokio_util::sync::CancellationToken;

use super::{
    sea::{Shared, lock},
    wire,
};

/// Time-outs that make a schedule short; their order is that of the defaults.
pub(super) fn protocol() -> machine::Options {
    let milliseconds = Duration::from_millis;
    machine::Options {
        beat_interval: milliseconds(100),
        lost_after: milliseconds(900),
        credit: milliseconds(3000),
        gather: milliseconds(200),
        leave_within: milliseconds(4000),
        join_gather: milliseconds(150),
        steps_ahead: 3,
        retry_worker_after: milliseconds(400),
        total_losses: 1000,
        fruitless_generations: 1000,
        ..machine::Options::default()
    }
}

/// A coordinator, from its start to its end.
pub(super) async fn run(sea: Shared) -> turmoil::Result {
    let database = lock(&sea).database.clone();
    let surroundings = Surroundings {
        database,
        outside: Arc::new(MadeUp(Arc::clone(&sea))),
        protocol: protocol(),
        seed: [7; 32],
    };
    let incoming = wire::incoming().await?;
    tokio::select! {
        biased;
        served = serve(surroundings, incoming, CancellationToken::new()) => Ok(served?),
        () = jumps(sea) => Ok(()),
    }
}

/// Now and then this host's clock jumps ahead, as after a suspension.
pub(super) async fn jumps(sea: Shared) {
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let jump = {
            let mut sea = lock(&sea);
            let times = sea.faults.jump / 2;
            sea.strikes(times).then(|| sea.chance.milliseconds(50, 4000))
        };
        if let Some(jump) = jump {
            lock(&sea).note("jump", &[jump.as_millis() as u64]);
            tokio::time::advance(jump).await;
        }
    }
}

/// Data and checkpoints that nobody made.
struct MadeUp(Shared);

impl MadeUp {
    fn facts(&self) -> DataFacts {
        let rows = lock(&self.0).order.rows();
        DataFacts {
            hash: "data".to_owned(),
            tokenizer_hash: "tokenizer".to_owned(),
            train_rows: rows,
            eval_rows: 0,
            train_tokens: rows * 4,
            train_trained_tokens: rows * 3,
            train_mix: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl Outside for MadeUp {
    fn prepare(
        &self,
        _: Arc<JobSpec>,
        _: CancellationToken,
        mut progress: Progress,
    ) -> Later<Result<DataFacts, Diagnostic>> {
        let (facts, time) = (self.facts(), lock(&self.0).chance.milliseconds(5, 200));
        Box::pin(async move {
            tokio::time::sleep(time).await;
            progress("tokenises train".to_owned());
            Ok(facts)
        })
    }

    fn open(&self, _: &JobSpec) -> Later<CoordinatorResult<Box<dyn Rows>>> {
        let rows: Box<dyn Rows> = Box::new(RowsOf(self.facts()));
        Box::pin(async move { Ok(rows) })
    }

    fn newest_good(
        &self,
        _: JobId,
        _: Arc<JobSpec>,
        _: Option<String>,
        up_to: Option<Step>,
    ) -> Later<CoordinatorResult<Found>> {
        let (sea, time) = (Arc::clone(&self.0), lock(&self.0).chance.milliseconds(5, 100));
        Box::pin(async move {
            tokio::time::sleep(time).await;
            Ok((lock(&sea).newest_checkpoint(up_to), Vec::new()))
        })
    }
}

struct RowsOf(DataFacts);

impl Rows for RowsOf {
    fn facts(&self) -> DataFacts {
        self.0.clone()
    }

    fn are_at_hand(&self) -> bool {
        true
    }

    fn trained_tokens(&self, _: Split, _: u64) -> CoordinatorResult<u32> {
        Ok(3)
    }

    fn row(&self, _: Split, id: u64) -> CoordinatorResult<Row> {
        let segments = vec![shanty_data::Segment { sample_id: id, length: 4 }];
        Ok(Row {
            id,
            token_ids: vec![1, 2, 3, id as u32],
            segments,
            trained: std::iter::once(1..4).collect(),
        })
    }
}
