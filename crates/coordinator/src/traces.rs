//! The coordinator's part in the trace of a step: the step itself, and its leases. Workers hang theirs below it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use shanty_proto::{Attempt, JobId, Step};
use shanty_telemetry::trace::{Context, Span, Tracer};

use crate::{
    leases::LeaseRequest,
    machine::{Point, record::StepRecord},
};

/// Steps whose end is waited for; of more than these, the oldest will not come to one.
const OPEN: usize = 4096;

/// Steps that are leased and not committed.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    tracer: Tracer,
    steps: Mutex<Steps>,
}

#[derive(Debug, Default)]
struct Steps {
    open: BTreeMap<(JobId, Attempt, Step), (Context, SystemTime)>,
    /// When a job's last step was committed.
    committed: BTreeMap<JobId, SystemTime>,
}

impl Traces {
    /// Sends spans by `tracer`.
    pub fn new(tracer: Tracer) -> Self {
        Self { tracer, steps: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Steps> {
        // Maps of whole entries are whole after any panic.
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows of a step were leased; gives the place in its trace, as it travels. Empty where nothing is traced.
    pub fn leased(&self, request: &LeaseRequest, rows: usize, began: SystemTime) -> String {
        if !self.tracer.is_on() || request.split != shanty_data::Split::Train {
            return String::new();
        }
        let context = {
            let mut steps = self.lock();
            if steps.open.len() >= OPEN {
                steps.open.pop_first();
            }
            let key = (request.job.clone(), request.attempt, Step(request.step));
            steps.open.entry(key).or_insert_with(|| (Context::new_trace(), began)).0.clone()
        };
        let attributes = vec![
            ("shanty.job", request.job.to_string().into()),
            ("shanty.step", number(request.step)),
            ("shanty.generation", number(request.generation.0)),
            ("shanty.rows", number(rows as u64)),
        ];
        let end = SystemTime::now();
        self.tracer.record(&context, Span { name: "lease", start: began, end, attributes, error: None });
        context.to_string()
    }

    /// Something happened to a job. A step begins with the commit of the one before it, or with its lease if that is later.
    pub fn point(&self, job: &JobId, point: &Point) {
        if let (true, Point::Step(step)) = (self.tracer.is_on(), point) {
            self.committed(job, step);
        }
    }

    fn committed(&self, job: &JobId, step: &StepRecord) {
        let end = SystemTime::now();
        let (context, start) = {
            let mut steps = self.lock();
            let before = steps.committed.insert(job.clone(), end);
            let key = (job.clone(), step.attempt, step.step);
            let Some((context, leased)) = steps.open.remove(&key) else { return };
            // Those before it will not be committed any more.
            steps.open.retain(|(of, attempt, number), _| of != job || (*attempt, *number) > (key.1, key.2));
            (context, before.map_or(leased, |before| before.max(leased)))
        };
        let attributes = vec![
            ("shanty.job", job.to_string().into()),
            ("shanty.step", number(step.step.0)),
            ("shanty.attempt", i64::from(step.attempt.0).into()),
            ("shanty.generation", number(step.generation.0)),
            ("shanty.workers", i64::from(step.workers).into()),
            ("shanty.tokens", number(step.tokens)),
            ("shanty.loss", step.loss.into()),
        ];
        let error = step.skipped.then(|| "the step was passed over".to_owned());
        self.tracer.record_root(&context, Span { name: "step", start, end, attributes, error });
    }

    /// Sends what is left.
    pub async fn flush(&self) {
        let tracer = self.tracer.clone();
        if tracer.is_on() {
            let _ = tokio::task::spawn_blocking(move || tracer.flush()).await;
        }
    }
}

fn number(number: u64) -> shanty_telemetry::trace::Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}
