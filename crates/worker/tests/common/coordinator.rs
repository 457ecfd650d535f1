//! A coordinator for tests: the coordinator's half of the step protocol, as short as it can be, written apart from
//! the real one. Everything that workers say lies open to the test, which may also cut streams and withhold credit.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use shanty_proto::v1::{worker_service_server::WorkerServiceServer, *};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_util::sync::CancellationToken;

pub use super::service::{Event, FromWorker, Job, ToWorker};
use super::service::{Service, Shared, send};

/// What came of a run.
#[derive(Debug, Default, Clone)]
pub struct Record {
    /// Loss of each applied step; equal on all ranks, or the test fails.
    pub losses: BTreeMap<u64, f64>,
    pub evaluations: BTreeMap<u64, f64>,
    pub checkpoints: Vec<u64>,
    pub generations: Vec<(u64, Vec<String>, StartPoint)>,
    pub lefts: Vec<Left>,
    pub failures: Vec<ErrorDetail>,
    pub broken: Vec<Broken>,
    pub finished: Option<Finished>,
    /// Rows of the steps that were dealt out again.
    pub requeued: Vec<u64>,
}

/// The coordinator of a test.
pub struct Coordinator {
    pub address: String,
    pub job: Job,
    pub record: Record,
    shared: Arc<Mutex<Shared>>,
    events: UnboundedReceiver<Event>,
    stop: CancellationToken,
    ready: BTreeSet<String>,
    waiting_for: BTreeSet<String>,
    lefts: BTreeMap<String, Left>,
    committed: u64,
    withhold: bool,
    /// Where the first generation starts.
    pub resume_from: Option<(u64, String)>,
    /// Whether a member whose stream is gone may come back.
    pub patient: bool,
    pub steps_ahead: u64,
    /// Ends [`Self::drive`] early.
    pub halt: bool,
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Coordinator {
    pub async fn start(job: Job) -> Self {
        let (sender, events) = unbounded_channel();
        let shared = Arc::new(Mutex::new(Shared { credit_ms: 20_000, ..Shared::default() }));
        let service = Service { shared: Arc::clone(&shared), events: sender, job: job.clone() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(WorkerServiceServer::new(service))
                .serve_with_incoming_shutdown(incoming, stopped)
                .await
        });
        Self {
            address,
            job,
            record: Record::default(),
            shared,
            events,
            stop,
            ready: BTreeSet::new(),
            waiting_for: BTreeSet::new(),
            lefts: BTreeMap::new(),
            committed: 0,
            withhold: false,
            resume_from: None,
            patient: false,
            steps_ahead: 4,
            halt: false,
        }
    }

    fn tell(&self, worker: &str, message: ToWorker) {
        if let Some((sender, _)) = self.shared.lock().unwrap().streams.get(worker) {
            send(sender, message);
        }
    }

    pub fn members(&self) -> Vec<String> {
        self.shared.lock().unwrap().members.clone()
    }

    pub fn generation(&self) -> u64 {
        self.shared.lock().unwrap().generation
    }

    /// Breaks all streams and answers nobody until [`Self::come_back`].
    pub fn go_away(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.away = true;
        for (_, cut) in shared.streams.values() {
            cut.cancel();
        }
    }

    pub fn come_back(&self) {
        self.shared.lock().unwrap().away = false;
    }

    pub fn set_credit_ms(&self, credit_ms: u32) {
        self.shared.lock().unwrap().credit_ms = credit_ms;
    }

    /// Gives no further credit, or gives it again.
    pub fn withhold_credit(&mut self, withhold: bool) {
        self.withhold = withhold;
        self.give_credit();
    }

    pub fn lie_at(&self, step: u64) {
        self.shared.lock().unwrap().lie_at = Some(step);
    }

    fn give_credit(&self) {
        self.shared.lock().unwrap().credit = (!self.withhold).then_some(self.committed + self.steps_ahead);
    }

    /// Runs the job with a crew of `world` until it ends; `watch` sees every event first.
    pub async fn drive(&mut self, world: usize, mut watch: impl FnMut(&Event, &mut Self)) {
        let whole = tokio::time::timeout(Duration::from_secs(60), async {
            while let Some(event) = self.events.recv().await {
                watch(&event, self);
                if self.handle(event, world) || self.halt {
                    break;
                }
            }
        });
        if whole.await.is_err() {
            panic!("the job did not end; so far: {:#?}", self.record);
        }
        if self.halt {
            return;
        }
        for worker in self.members() {
            let release =
                Release { job_id: "test-1".to_owned(), attempt: self.job.attempt, ..Release::default() };
            self.tell(&worker, ToWorker::Release(release));
        }
    }

    fn handle(&mut self, event: Event, world: usize) -> bool {
        match event {
            Event::Connected(worker) => {
                if !self.members().contains(&worker) {
                    self.tell(&worker, ToWorker::Assign(self.job.assign()));
                }
            }
            Event::Gone(worker) => {
                self.ready.remove(&worker);
                if self.members().contains(&worker) && !self.patient {
                    self.lose(&worker);
                }
            }
            Event::Said(worker, message) => return self.hear(worker, message, world),
        }
        false
    }

    fn hear(&mut self, worker: String, message: FromWorker, world: usize) -> bool {
        let current = self.generation();
        match message {
            FromWorker::BaseReady(_) => {
                self.ready.insert(worker);
                if current == 0 && self.ready.len() == world {
                    let members: Vec<String> = self.ready.iter().cloned().collect();
                    let (applied_step, source) = match self.resume_from.clone() {
                        Some((step, path)) => {
                            (step, start_point::Source::Checkpoint(FromCheckpoint { path }))
                        }
                        None => (0, start_point::Source::Fresh(Fresh {})),
                    };
                    let start = StartPoint { applied_step, source: Some(source), ..StartPoint::default() };
                    self.committed = applied_step;
                    self.form(members, start);
                }
            }
            FromWorker::Step(report) => {
                if report.generation != current {
                    return false;
                }
                self.committed = self.committed.max(report.step);
                self.give_credit();
                let loss = *self.record.losses.entry(report.step).or_insert(report.loss);
                assert_eq!(loss.to_bits(), report.loss.to_bits(), "ranks differ at step {}", report.step);
            }
            FromWorker::Evaluation(report) => {
                let loss = *self.record.evaluations.entry(report.step).or_insert(report.loss);
                assert_eq!(
                    loss.to_bits(),
                    report.loss.to_bits(),
                    "ranks differ at evaluation {}",
                    report.step
                );
            }
            FromWorker::Checkpoint(written) => self.record.checkpoints.push(written.step),
            FromWorker::Broken(broken) => {
                if broken.generation == current && self.waiting_for.is_empty() {
                    self.part("a member broke");
                }
                self.record.broken.push(broken);
            }
            FromWorker::Left(left) if left.generation == current && self.waiting_for.remove(&worker) => {
                self.record.lefts.push(left.clone());
                self.lefts.insert(worker, left);
                self.form_next();
            }
            FromWorker::Failure(failure) => {
                self.record.failures.extend(failure.error);
                return true;
            }
            FromWorker::Finished(finished) => {
                self.record.finished = Some(finished);
                return true;
            }
            _ => {}
        }
        false
    }

    fn lose(&mut self, worker: &str) {
        self.lefts.remove(worker);
        let parting = !self.waiting_for.is_empty() || !self.lefts.is_empty();
        let members: Vec<String> = self.members().into_iter().filter(|member| member != worker).collect();
        self.shared.lock().unwrap().members = members;
        if parting {
            self.waiting_for.remove(worker);
            self.form_next();
        } else {
            self.part("a member was lost");
        }
    }

    /// A worker counts as ready to join.
    pub fn ready(&mut self, worker: &str) {
        self.ready.insert(worker.to_owned());
    }

    /// [`Self::come_back`], later.
    pub fn come_back_after(&self, pause: Duration) {
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            shared.lock().unwrap().away = false;
        });
    }

    /// Takes in what is said until nothing but beats came for `quiet`; none if that does not happen.
    pub async fn until_silent(&mut self, quiet: Duration) -> Option<()> {
        for _ in 0..200 {
            match tokio::time::timeout(quiet, self.events.recv()).await {
                Ok(Some(event)) => {
                    self.handle(event, usize::MAX);
                }
                Ok(None) => return None,
                Err(_) => return Some(()),
            }
        }
        None
    }

    /// Sends `Leave` to all members.
    pub fn part(&mut self, reason: &str) {
        let leave = Leave {
            job_id: "test-1".to_owned(),
            attempt: self.job.attempt,
            generation: self.generation(),
            reason: reason.to_owned(),
            ..Leave::default()
        };
        self.lefts.clear();
        self.waiting_for = self.members().into_iter().collect();
        for worker in self.members() {
            self.tell(&worker, ToWorker::Leave(leave.clone()));
        }
    }

    fn form_next(&mut self) {
        if !self.waiting_for.is_empty() {
            return;
        }
        let lefts = std::mem::take(&mut self.lefts);
        // Joiners that are ready come after those that stayed.
        let stayed: Vec<String> = lefts.keys().cloned().collect();
        let joiners = self.ready.iter().filter(|worker| !lefts.contains_key(*worker)).cloned();
        let members: Vec<String> = stayed.into_iter().chain(joiners).collect();
        let with_state = |left: &Left| !left.state_hash.is_empty();
        let applied = lefts.values().filter(|left| with_state(left)).map(|left| left.applied_step).max();
        let applied = applied.expect("a member that holds state lives");
        let holds = |worker: &String| {
            lefts.get(worker).is_some_and(|left| with_state(left) && left.applied_step == applied)
        };
        let donor = members.iter().position(holds).unwrap() as u32;
        let receivers: Vec<u32> = members
            .iter()
            .enumerate()
            .filter(|(_, worker)| !holds(worker))
            .map(|(rank, _)| rank as u32)
            .collect();

        let mut rows = Vec::new();
        let mut open: Vec<u64> = self.job.order().step_rows(applied + 1);
        for (rank, worker) in members.iter().enumerate() {
            let kept: Vec<u64> = lefts
                .get(worker)
                .filter(|_| holds(worker))
                .and_then(|left| left.kept.clone())
                .filter(|kept| kept.step == applied + 1)
                .map(|kept| kept.row_ids)
                .unwrap_or_default();
            open.retain(|row| !kept.contains(row));
            rows.push(RankRows { rank: rank as u32, kept, compute: Vec::new() });
        }
        self.record.requeued.extend(&open);
        while let Some(row) = open.pop() {
            let least = rows.iter_mut().min_by_key(|rows| rows.kept.len() + rows.compute.len()).unwrap();
            least.compute.push(row);
        }
        if rows.iter().all(|rows| rows.kept.is_empty()) {
            rows.clear();
        }
        if applied >= self.job.steps {
            rows.clear();
        }
        let start = StartPoint {
            applied_step: applied,
            source: Some(start_point::Source::Members(FromMembers { donor, receivers })),
            rows,
            evaluated_step: self.record.evaluations.keys().last().copied(),
            checkpoint_step: self.record.checkpoints.iter().max().copied(),
            ..StartPoint::default()
        };
        self.committed = self.committed.max(applied);
        self.form(members, start);
    }

    fn form(&mut self, members: Vec<String>, start: StartPoint) {
        let (generation, announced) = {
            let mut shared = self.shared.lock().unwrap();
            shared.generation += 1;
            shared.members.clone_from(&members);
            let announced: Vec<GenerationMember> = members
                .iter()
                .enumerate()
                .map(|(rank, worker)| GenerationMember {
                    worker_id: worker.clone(),
                    rank: rank as u32,
                    collective_address: shared.hellos[worker].collective_address.clone(),
                })
                .collect();
            (shared.generation, announced)
        };
        self.give_credit();
        self.record.generations.push((generation, members.clone(), start.clone()));
        for (rank, worker) in members.iter().enumerate() {
            let form = Form {
                encrypted: false,
                job_id: "test-1".to_owned(),
                attempt: self.job.attempt,
                generation,
                rank: rank as u32,
                members: announced.clone(),
                token: vec![generation as u8; 32],
                start: Some(start.clone()),
            };
            self.tell(worker, ToWorker::Form(form));
        }
    }
}
