//! The simulated workers.

use std::{sync::Arc, time::Duration};

use prost::Message as _;
use shanty_access::{Channel, Credentials};
use shanty_data::order;
use shanty_proto::v1::{
    coordinator_message::Message as Out, job_service_client::JobServiceClient, worker_message::Message as In,
    worker_service_client::WorkerServiceClient, *,
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, Interval, MissedTickBehavior, sleep_until},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use crate::{Result, stage::Stage};

/// Workers that connect at the same time.
const CONNECTING: usize = 64;

/// What is played.
#[derive(Debug, Clone)]
pub struct Plan {
    pub workers: usize,
    /// Steps that are measured.
    pub steps: u64,
    /// Steps before those.
    pub warm_up: u64,
    /// Time from one step to the next.
    pub step: Duration,
}

/// When a worker reported a step, and when it held the credit for the next.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    pub reported: Instant,
    pub credited: Instant,
}

/// What a worker noted.
#[derive(Debug, Default)]
pub struct Log {
    /// One a measured step.
    pub turns: Vec<Turn>,
    /// Rows that came by lease.
    pub rows: u64,
    /// Messages of the stream that came, and their bytes, in the measured steps.
    pub messages: u64,
    pub message_bytes: u64,
    /// From the request for rows to the rows.
    pub leases: Vec<Duration>,
}

/// A crew whose generation is formed.
pub struct Crew {
    sailors: Vec<Sailor>,
    plan: Plan,
    stage_rows: Arc<Vec<Vec<u64>>>,
    begin: Instant,
}

/// A connection that shows a token, as every worker's does.
async fn connect(url: &str, credentials: &Credentials) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.tcp_nodelay(true);
    let (endpoint, bearer) = credentials.prepare(&url.parse()?, endpoint)?;
    Ok(Channel::new(endpoint.connect().await?, bearer))
}

/// Connects a crew, submits the job, and waits until its generation is formed and everybody holds a credit.
pub async fn board(url: &str, credentials: &Credentials, stage: &Stage, plan: &Plan) -> Result<Crew> {
    let channel = connect(url, credentials).await?;
    let submit = SubmitJobRequest { request_id: "load".to_owned(), spec_json: stage.spec_json.clone() };
    JobServiceClient::new(channel).submit_job(submit).await?;
    let gangway = Semaphore::new(CONNECTING);
    let mustering = (0..plan.workers).map(|number| Sailor::muster(url, credentials, number, &gangway));
    let sailors = futures::future::try_join_all(mustering).await?;
    let last = plan.warm_up + plan.steps;
    let stage_rows = (1..=last).map(|step| stage.order.step_rows(step)).collect();
    // Time to spawn all tasks.
    let begin = Instant::now() + Duration::from_millis(200);
    Ok(Crew { sailors, plan: plan.clone(), stage_rows: Arc::new(stage_rows), begin })
}

impl Crew {
    /// When the first step begins.
    pub fn begin(&self) -> Instant {
        self.begin
    }

    /// Makes all steps.
    pub async fn work(self) -> Result<Vec<Log>> {
        let tasks: Vec<_> = self
            .sailors
            .into_iter()
            .map(|sailor| {
                let (plan, rows) = (self.plan.clone(), Arc::clone(&self.stage_rows));
                tokio::spawn(sailor.work(plan, rows, self.begin))
            })
            .collect();
        // A stream that ends is a worker that is lost: all stay open until the last one has made its last step.
        let mut done = Vec::with_capacity(tasks.len());
        for task in tasks {
            done.push(task.await??);
        }
        Ok(done.into_iter().map(|sailor| sailor.log).collect())
    }
}

/// A simulated worker.
struct Sailor {
    number: usize,
    client: WorkerServiceClient<Channel>,
    say: mpsc::UnboundedSender<WorkerMessage>,
    hear: Streaming<CoordinatorMessage>,
    beats: u64,
    beat_every: Duration,
    form: Form,
    applied: u64,
    log: Log,
}

impl Sailor {
    /// From the connection to the first credit. Whoever is there says so while the others come.
    async fn muster(
        url: &str,
        credentials: &Credentials,
        number: usize,
        gangway: &Semaphore,
    ) -> Result<Self> {
        let place = gangway.acquire().await?;
        let sailor = Self::board(url, credentials, number).await?;
        drop(place);
        sailor.load().await?.form().await
    }

    async fn board(url: &str, credentials: &Credentials, number: usize) -> Result<Self> {
        let channel = connect(url, credentials).await?;
        let mut client = WorkerServiceClient::new(channel).max_decoding_message_size(64 << 20);
        let (say, messages) = mpsc::unbounded_channel();
        let hear = client.session(UnboundedReceiverStream::new(messages)).await?.into_inner();
        let mut sailor = Self {
            number,
            client,
            say,
            hear,
            beats: 0,
            beat_every: Duration::ZERO,
            form: Form::default(),
            applied: 0,
            log: Log::default(),
        };
        sailor.say(In::Hello(Hello {
            worker_id: format!("w{number:05}"),
            host: format!("host-{}", number / 8),
            pid: 1,
            device: format!("cuda:{}", number % 8),
            collective_address: format!("10.0.{}.{}:40000", number / 256, number % 256),
            ..Hello::default()
        }));
        match sailor.hear().await? {
            Out::Welcome(welcome) => {
                sailor.beat_every = Duration::from_millis(welcome.beat_interval_ms.into());
                Ok(sailor)
            }
            other => Err(format!("{other:?} for a welcome").into()),
        }
    }

    fn say(&self, message: In) {
        // A stream that broke is noticed by whoever reads it.
        let _ = self.say.send(WorkerMessage { message: Some(message) });
    }

    async fn hear(&mut self) -> Result<Out> {
        let message = self.hear.message().await?.ok_or("the stream ended")?;
        self.log.messages += 1;
        self.log.message_bytes += message.encoded_len() as u64;
        message.message.ok_or_else(|| "an unknown message".into())
    }

    async fn load(mut self) -> Result<Self> {
        let assign = loop {
            if let Out::Assign(assign) = self.hear_beating().await? {
                break assign;
            }
        };
        self.say(In::BaseReady(BaseReady {
            job_id: assign.job_id,
            attempt: assign.attempt,
            base_hash: "base".to_owned(),
            trainable_parameters: 1,
            ..BaseReady::default()
        }));
        Ok(self)
    }

    async fn form(mut self) -> Result<Self> {
        self.form = loop {
            if let Out::Form(form) = self.hear_beating().await? {
                break form;
            }
        };
        let wanted = self.beat();
        loop {
            if let Out::BeatAck(BeatAck { sequence, credit: Some(_) }) = self.hear_beating().await?
                && sequence >= wanted
            {
                return Ok(self);
            }
        }
    }

    /// What comes next; says now and then that it lives.
    async fn hear_beating(&mut self) -> Result<Out> {
        loop {
            tokio::select! {
                message = self.hear.message() => {
                    let message = message?.ok_or("the stream ended")?;
                    return message.message.ok_or_else(|| "an unknown message".into());
                }
                () = tokio::time::sleep(self.beat_every) => drop(self.beat()),
            }
        }
    }

    fn beat(&mut self) -> u64 {
        self.beats += 1;
        let attachment = (self.form.generation > 0).then(|| Attachment {
            job_id: self.form.job_id.clone(),
            attempt: self.form.attempt,
            generation: self.form.generation,
            rank: self.form.rank,
            applied_step: self.applied,
        });
        // It gets something done between any two beats.
        let (sequence, progress) = (self.beats, self.beats);
        self.say(In::Beat(Beat { sequence, phase: MemberPhase::Computing.into(), attachment, progress }));
        self.beats
    }

    async fn work(mut self, plan: Plan, steps: Arc<Vec<Vec<u64>>>, begin: Instant) -> Result<Self> {
        let share = |of: u32| plan.step * of / 1000;
        // Spread over the period as the beats of processes are that started at different times.
        let phase = self.beat_every.mul_f64((self.number * 7919 % 1000) as f64 / 1000.0);
        let mut beats = tokio::time::interval_at(begin + phase, self.beat_every);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for (index, rows) in steps.iter().enumerate() {
            let step = index as u64 + 1;
            if step == plan.warm_up + 1 {
                self.log = Log::default();
            }
            let from = begin + plan.step * u32::try_from(index)?;
            // Rows are asked for somewhere in the middle of the step that they belong to.
            let lease_at =
                from + share(200) + share(600).mul_f64((self.number * 104_729 % 1000) as f64 / 1000.0);
            self.idle_until(lease_at, &mut beats).await?;
            let announcement = self.lease(step, rows).await?;
            self.idle_until(from + plan.step, &mut beats).await?;
            let turn = self.report(step, announcement).await?;
            if step > plan.warm_up {
                self.log.turns.push(turn);
            }
        }
        Ok(self)
    }

    async fn idle_until(&mut self, until: Instant, beats: &mut Interval) -> Result<()> {
        loop {
            tokio::select! {
                biased;
                message = self.hear() => self.must_be_an_answer(&message?)?,
                () = sleep_until(until) => return Ok(()),
                _ = beats.tick() => drop(self.beat()),
            }
        }
    }

    fn must_be_an_answer(&self, message: &Out) -> Result<()> {
        match message {
            Out::BeatAck(_) => Ok(()),
            other => Err(format!("worker {} was told {other:?} in the middle of a run", self.number).into()),
        }
    }

    async fn lease(&mut self, step: u64, rows: &[u64]) -> Result<Announcement> {
        let world_size = u32::try_from(self.form.members.len())?;
        let mine = order::slice(rows, world_size, self.form.rank);
        let request = LeaseRowsRequest {
            job_id: self.form.job_id.clone(),
            attempt: self.form.attempt,
            generation: self.form.generation,
            split: Split::Train.into(),
            step,
            row_ids: mine.to_vec(),
        };
        let asked = Instant::now();
        let response = self.client.lease_rows(request).await?.into_inner();
        self.log.leases.push(asked.elapsed());
        if !response.rows.iter().map(|row| row.id).eq(mine.iter().copied()) {
            return Err(format!("worker {} got other rows than it asked for", self.number).into());
        }
        self.log.rows += response.rows.len() as u64;
        let announcement = response.announcement.ok_or("a lease without an announcement")?;
        if announcement.rows != rows.len() as u64 {
            return Err(format!("step {step} is announced with {} rows", announcement.rows).into());
        }
        Ok(announcement)
    }

    /// Reports a step and asks for the next credit; returns once it is there.
    async fn report(&mut self, step: u64, reduced: Announcement) -> Result<Turn> {
        let reported = Instant::now();
        self.applied = step;
        self.say(In::Step(StepReport {
            job_id: self.form.job_id.clone(),
            attempt: self.form.attempt,
            generation: self.form.generation,
            step,
            rank: self.form.rank,
            loss: 2.0,
            reduced: Some(reduced),
            gradient_norm: 0.5,
            learning_rate: 1e-4,
            seconds: 1.0,
            timings: Some(StepTimings::default()),
            ..StepReport::default()
        }));
        let wanted = self.beat();
        loop {
            let message = self.hear().await?;
            self.must_be_an_answer(&message)?;
            let Out::BeatAck(BeatAck { sequence, credit }) = message else { continue };
            if sequence < wanted {
                continue;
            }
            let credit = credit.ok_or_else(|| format!("no credit after step {step}"))?;
            if credit.up_to_step <= step {
                return Err(format!("a credit up to step {} after step {step}", credit.up_to_step).into());
            }
            return Ok(Turn { reported, credited: Instant::now() });
        }
    }
}
