//! The task that runs the machine: one event at a time, what must be durable first, then everything else.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shanty_diagnostic::Diagnose;
use shanty_proto::{Attempt, JobId, Step, WorkerId, v1::CoordinatorMessage};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Access,
    error::{Error, Result},
    hub::Hub,
    leases::Leases,
    machine::{Effect, Event, Machine, Moment, Reply},
    outside::{Outside, Progress},
    services::wire,
    store::Store,
};

/// Inputs that may wait for the machine.
const QUEUE: usize = 4096;
/// How often the machine is told that time passes.
const TICK: Duration = Duration::from_millis(20);

/// Where a worker's messages go. Bounded: a worker that does not read is as good as gone.
///
/// What is told is written out as a wire message only when the worker's stream is ready for it: an announcement names
/// all members, and as many of them as there are members are not to lie in memory at once.
pub(crate) type Outgoing = mpsc::Sender<std::result::Result<Told, tonic::Status>>;

/// What a worker is told.
#[derive(Debug)]
pub(crate) struct Told {
    message: crate::machine::Message,
    terms: wire::Terms,
}

impl From<Told> for CoordinatorMessage {
    fn from(told: Told) -> Self {
        wire::message_out(told.message, told.terms)
    }
}

type Look = Box<dyn FnOnce(&Machine, Moment) + Send>;

enum Input {
    Event(Event),
    /// A session begins; the event is its Hello.
    Session {
        number: u64,
        outgoing: Outgoing,
        hello: Event,
    },
    /// A user's request, made into an event by the number of the request.
    Ask {
        make: Box<dyn FnOnce(u64) -> Event + Send>,
        answer: oneshot::Sender<Result<Reply>>,
    },
    Look(Look),
}

/// A way to the machine. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Engine {
    inputs: mpsc::Sender<Input>,
}

impl Engine {
    /// Tells the machine something.
    pub async fn tell(&self, event: Event) -> Result<()> {
        self.put(Input::Event(event)).await
    }

    /// Begins a session.
    pub async fn begin(&self, number: u64, outgoing: Outgoing, hello: Event) -> Result<()> {
        self.put(Input::Session { number, outgoing, hello }).await
    }

    /// Asks for something on a user's behalf; the answer comes when it is durable.
    pub async fn ask(&self, make: impl FnOnce(u64) -> Event + Send + 'static) -> Result<Reply> {
        let (answer, wait) = oneshot::channel();
        self.put(Input::Ask { make: Box::new(make), answer }).await?;
        wait.await.map_err(|_| Error::Stopping)?
    }

    /// Looks at the machine.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Machine, Moment) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, wait) = oneshot::channel();
        let look: Look = Box::new(move |machine, now| drop(answer.send(look(machine, now))));
        self.put(Input::Look(look)).await?;
        wait.await.map_err(|_| Error::Stopping)
    }

    async fn put(&self, input: Input) -> Result<()> {
        self.inputs.send(input).await.map_err(|_| Error::Stopping)
    }
}

/// What the task works with.
pub(crate) struct Works {
    pub machine: Machine,
    pub store: Store,
    pub hub: Arc<Hub>,
    pub leases: Arc<Leases>,
    pub outside: Arc<dyn Outside>,
    pub access: Arc<Access>,
    /// Whether collectives are encrypted.
    pub encrypted: bool,
    pub started: Instant,
}

pub(crate) fn now(started: Instant) -> Moment {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment { monotonic: started.elapsed(), unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX) }
}

/// The engine and the task that drives it.
pub(crate) fn build(works: Works) -> (Engine, Task) {
    let (inputs, queue) = mpsc::channel(QUEUE);
    let engine = Engine { inputs };
    let task = Task {
        works,
        engine: engine.clone(),
        queue,
        sessions: HashMap::new(),
        requests: HashMap::new(),
        next_request: 1,
        preparing: HashMap::new(),
        pending: VecDeque::new(),
        changed: BTreeSet::new(),
        helpers: TaskTracker::new(),
    };
    (engine, task)
}

/// The task: owns the machine and its channels.
pub(crate) struct Task {
    works: Works,
    engine: Engine,
    queue: mpsc::Receiver<Input>,
    sessions: HashMap<u64, Outgoing>,
    requests: HashMap<u64, oneshot::Sender<Result<Reply>>>,
    next_request: u64,
    preparing: HashMap<JobId, CancellationToken>,
    /// Events that follow from carrying out effects.
    pending: VecDeque<Event>,
    /// Jobs whose watchers are not yet told of their newest status.
    changed: BTreeSet<JobId>,
    helpers: TaskTracker,
}

impl Task {
    /// Runs until `shutdown`, or until the store fails.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<()> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let store = self.works.store.clone();
        let failed = store.failed();
        tokio::pin!(failed);
        let outcome = loop {
            let input = tokio::select! {
                biased;
                () = shutdown.cancelled() => break Ok(()),
                reason = &mut failed => {
                    tracing::error!(reason, "the state store failed; the coordinator stops");
                    break Err(Error::Stopping);
                }
                _ = ticks.tick() => Input::Event(Event::Tick),
                Some(input) = self.queue.recv() => input,
            };
            if let Err(error) = self.take(input).await {
                break Err(error);
            }
        };
        for stop in self.preparing.values() {
            stop.cancel();
        }
        // Whoever still wants to tell something is told that nobody listens.
        self.queue.close();
        self.helpers.close();
        self.helpers.wait().await;
        outcome
    }

    async fn take(&mut self, input: Input) -> Result<()> {
        // A status holds the whole crew, and while a crew gathers each member's every word changes it: watchers get the
        // newest at the next tick, not each one.
        if matches!(input, Input::Event(Event::Tick)) {
            self.tell_statuses();
        }
        match input {
            Input::Event(event) => self.pending.push_back(event),
            Input::Session { number, outgoing, hello } => {
                self.sessions.insert(number, outgoing);
                self.pending.push_back(hello);
            }
            Input::Ask { make, answer } => {
                let request = self.next_request;
                self.next_request += 1;
                self.requests.insert(request, answer);
                self.pending.push_back(make(request));
            }
            Input::Look(look) => look(&self.works.machine, now(self.works.started)),
        }
        while let Some(event) = self.pending.pop_front() {
            if let Event::Down { session, .. } = &event {
                self.sessions.remove(session);
            }
            let effects = self.works.machine.apply(now(self.works.started), event);
            self.carry_out(effects).await?;
        }
        Ok(())
    }

    fn tell_statuses(&mut self) {
        for job in std::mem::take(&mut self.changed) {
            if let Some(view) = self.works.machine.view(now(self.works.started), &job) {
                if view.state.is_final() {
                    self.works.access.job_ended(&job);
                }
                self.works.hub.set_status(view);
            }
        }
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) -> Result<()> {
        let mut durable = Vec::new();
        let mut records = Vec::new();
        let mut others = Vec::new();
        for effect in effects {
            match effect {
                Effect::Persist(change) => durable.push(change),
                Effect::Record(change) => records.push(change),
                other => others.push(other),
            }
        }
        if !durable.is_empty() {
            self.works.store.persist(durable).await?;
        }
        if !records.is_empty() {
            self.works.store.record(records).await?;
        }
        // Whoever is answered may look at once: what the answer tells of must be there to be seen.
        let (answers, others): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|effect| matches!(effect, Effect::Reply { .. }));
        for effect in others {
            self.carry_out_one(effect);
        }
        if !answers.is_empty() {
            self.tell_statuses();
        }
        for effect in answers {
            self.carry_out_one(effect);
        }
        Ok(())
    }

    fn carry_out_one(&mut self, effect: Effect) {
        match effect {
            // Taken out by the caller.
            Effect::Persist(_) | Effect::Record(_) => {}
            Effect::Send { worker, session, message } => self.send(worker, session, message),
            Effect::Close { worker, session, reason } => {
                if let Some(outgoing) = self.sessions.remove(&session) {
                    tracing::warn!(%worker, reason, "the worker's stream is ended");
                    // Best effort: the stream ends with the sender either way.
                    let _ = outgoing.try_send(Err(shanty_proto::to_status(&Error::StreamEnded { reason })));
                }
            }
            Effect::Prepare { job, attempt, known } => self.prepare(job, attempt, known),
            Effect::StopPrepare { job } => {
                if let Some(stop) = self.preparing.remove(&job) {
                    stop.cancel();
                }
            }
            Effect::FindCheckpoint { job, attempt, up_to } => self.find_checkpoint(job, attempt, up_to),
            Effect::Reply { request, outcome } => {
                if let Some(answer) = self.requests.remove(&request) {
                    // Whoever asked may have gone; what was asked for is done all the same.
                    let _ = answer.send(outcome.map_err(Error::from));
                }
            }
            Effect::StatusChanged(job) => {
                self.works.leases.allow(&job, self.works.machine.leasable(&job));
                self.changed.insert(job);
            }
            Effect::Publish(job, point) => {
                if let crate::machine::Point::Event(event) = &point {
                    let worker = event.worker.as_ref().map(WorkerId::as_str).unwrap_or_default();
                    tracing::info!(%job, kind = event.kind, worker, text = event.text, "job event");
                }
                self.works.hub.publish(&job, point);
            }
        }
    }

    fn send(&mut self, worker: WorkerId, session: u64, message: crate::machine::Message) {
        let Some(outgoing) = self.sessions.get(&session) else { return };
        // Rows are leased to a generation before its members hear of it.
        if let crate::machine::Message::Form { job, .. } = &message {
            self.works.leases.allow(job, self.works.machine.leasable(job));
        }
        let options = self.works.machine.options();
        let milliseconds = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let terms = wire::Terms {
            beat_ms: milliseconds(options.beat_interval),
            credit_ms: milliseconds(options.credit),
            encrypted: self.works.encrypted,
        };
        if let Err(error) = outgoing.try_send(Ok(Told { message, terms })) {
            let reason = match error {
                mpsc::error::TrySendError::Full(_) => "it does not read what it is told",
                mpsc::error::TrySendError::Closed(_) => "its stream broke",
            };
            self.pending.push_back(Event::Down { worker, session, reason: reason.to_owned() });
        }
    }

    fn prepare(&mut self, job: JobId, attempt: Attempt, known: Option<String>) {
        let Some(spec) = self.works.machine.spec(&job) else { return };
        let stop = CancellationToken::new();
        if let Some(before) = self.preparing.insert(job.clone(), stop.clone()) {
            before.cancel();
        }
        let (engine, leases) = (self.engine.clone(), Arc::clone(&self.works.leases));
        let outside = Arc::clone(&self.works.outside);
        self.helpers.spawn(async move {
            let reused = match known {
                Some(hash) => leases.open(&job, &spec, Some(hash)).await.ok(),
                None => None,
            };
            let outcome = match reused {
                Some(facts) => Ok(facts),
                None => {
                    let (inputs, named) = (engine.inputs.clone(), job.clone());
                    let progress: Progress = Box::new(move |text| {
                        let event = Event::PrepareProgress { job: named.clone(), attempt, text };
                        // Words for people; the next ones come soon.
                        let _ = inputs.try_send(Input::Event(event));
                    });
                    match outside.prepare(Arc::clone(&spec), stop.clone(), progress).await {
                        // What was written is opened and looked at before anybody relies on it.
                        Ok(facts) => leases
                            .open(&job, &spec, Some(facts.hash))
                            .await
                            .map_err(|error| error.diagnostic()),
                        Err(error) => Err(error),
                    }
                }
            };
            if !stop.is_cancelled() {
                // The task that would hear it ends only with the coordinator.
                let _ = engine.tell(Event::PrepareEnded { job, attempt, outcome }).await;
            }
        });
    }

    fn find_checkpoint(&mut self, job: JobId, attempt: Attempt, up_to: Option<Step>) {
        let Some(spec) = self.works.machine.spec(&job) else { return };
        let data_hash = self.works.machine.data_hash(&job);
        let engine = self.engine.clone();
        let found = self.works.outside.newest_good(job.clone(), spec, data_hash, up_to);
        self.helpers.spawn(async move {
            let found = found.await;
            let (outcome, damaged) = match found {
                Ok((checkpoint, damaged)) => (Ok(checkpoint), damaged),
                Err(error) => (Err(error.diagnostic()), Vec::new()),
            };
            let _ = engine.tell(Event::CheckpointFound { job, attempt, outcome, damaged }).await;
        });
    }
}
