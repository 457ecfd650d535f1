//! Serving prepared rows, and what a step must amount to.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use shanty_config::JobSpec;
use shanty_data::{
    Row, Split,
    order::{self, Order},
};
use shanty_proto::{Attempt, Generation, JobId, Step};

use crate::{
    error::{Error, Result},
    machine::{Announcement, record::DataFacts},
    outside::{Outside, Rows},
};

/// Steps whose rows are remembered, a job.
const REMEMBERED: usize = 64;
/// Rows in one lease.
const MOST_ROWS: usize = 65_536;

/// Where a job's prepared data lies.
pub(crate) fn prepared_folder(spec: &JobSpec) -> PathBuf {
    spec.checkpoint.folder(&spec.name).join("prepared")
}

/// A job's prepared data, open.
struct Open {
    rows: Box<dyn Rows>,
    eval_rows: u64,
    order: Order,
    steps: Mutex<BTreeMap<(bool, u64), Arc<StepRows>>>,
    /// Held while a step's rows are looked up: its whole crew asks at the same time, one looks.
    looking: Mutex<()>,
}

/// The rows of a step, and what they amount to.
#[derive(Debug)]
struct StepRows {
    announcement: Announcement,
    ids: HashSet<u64>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(crate) struct LeaseRequest {
    pub job: JobId,
    pub attempt: Attempt,
    pub generation: Generation,
    pub split: Split,
    pub step: u64,
    pub row_ids: Vec<u64>,
}

type Allowed = (Attempt, Generation, Step);

/// The prepared data of jobs, and to which generation their rows are leased.
pub(crate) struct Leases {
    outside: Arc<dyn Outside>,
    open: Mutex<HashMap<JobId, Arc<Open>>>,
    allowed: Mutex<HashMap<JobId, Allowed>>,
}

impl Leases {
    /// Leases rows that `outside` opens.
    pub fn new(outside: Arc<dyn Outside>) -> Self {
        Self { outside, open: Mutex::default(), allowed: Mutex::default() }
    }

    /// Sets the generation that a job's rows are leased to.
    pub fn allow(&self, job: &JobId, to: Option<Allowed>) {
        let mut allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        match to {
            Some(to) => drop(allowed.insert(job.clone(), to)),
            None => drop(allowed.remove(job)),
        }
    }

    /// Opens a job's prepared data; fails if it is not what `hash` says. Opens anew where it is open already:
    /// it may have been prepared again.
    pub async fn open(&self, job: &JobId, spec: &JobSpec, hash: Option<String>) -> Result<DataFacts> {
        let (seed, batch) = (spec.train.seed, spec.train.global_batch_size as u64);
        let rows = self.outside.open(spec).await?;
        let facts = rows.facts();
        let order = Order::mixed(seed, facts.train_rows, &facts.train_mix, batch)?;
        let eval_rows = facts.eval_rows;
        let open = Open { rows, eval_rows, order, steps: Mutex::default(), looking: Mutex::new(()) };
        if let Some(expected) = hash.filter(|expected| *expected != facts.hash) {
            let what =
                format!("the prepared data of job {job} has hash {}, expected was {expected}", facts.hash);
            return Err(Error::Prepare { what });
        }
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(job.clone(), Arc::new(open));
        Ok(facts)
    }

    fn opened(&self, job: &JobId) -> Result<Arc<Open>> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.get(job).cloned().ok_or_else(|| Error::bad(format!("job {job} has no prepared data")))
    }

    /// What a training step must amount to; from memory, if it was leased before.
    pub async fn announcement(&self, job: &JobId, step: Step) -> Result<Announcement> {
        let open = self.opened(job)?;
        let known = match open.remembered(Split::Train, step.0) {
            Some(known) => known,
            None => open.off_the_path(move |open| open.step(Split::Train, step.0)).await?,
        };
        Ok(known.announcement)
    }

    /// The rows of a lease, and what their step must amount to.
    pub async fn lease(&self, request: LeaseRequest) -> Result<(Announcement, Vec<Row>)> {
        let allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner).get(&request.job).copied();
        let steps = match allowed {
            Some((attempt, generation, steps))
                if (attempt, generation) == (request.attempt, request.generation) =>
            {
                steps
            }
            Some((attempt, generation, _)) => {
                let what = format!(
                    "attempt {} generation {} asks, attempt {attempt} generation {generation} runs",
                    request.attempt, request.generation
                );
                return Err(Error::StaleLease { what });
            }
            None => {
                let what = format!("job {} has no generation", request.job);
                return Err(Error::StaleLease { what });
            }
        };
        if request.row_ids.len() > MOST_ROWS {
            return Err(Error::bad(format!("{} rows in one lease", request.row_ids.len())));
        }
        let first = u64::from(request.split == Split::Train);
        if request.step < first || request.step > steps.0 {
            return Err(Error::bad(format!("step {} of {steps} is leased to nobody", request.step)));
        }
        let open = self.opened(&request.job)?;
        let look = move |open: &Open| {
            let step = open.step(request.split, request.step)?;
            if let Some(foreign) = request.row_ids.iter().find(|id| !step.ids.contains(id)) {
                return Err(Error::bad(format!(
                    "row {foreign} is not of {} step {}",
                    request.split, request.step
                )));
            }
            let rows: Result<Vec<Row>, _> =
                request.row_ids.iter().map(|id| open.rows.row(request.split, *id)).collect();
            Ok((step.announcement, rows?))
        };
        open.off_the_path(look).await
    }
}

impl Open {
    /// Rows of a training step; for an evaluation all held-out rows, whatever the step.
    fn rows_of(&self, split: Split, step: u64) -> Vec<u64> {
        match split {
            Split::Train => self.order.step_rows(step),
            Split::Eval => (0..self.eval_rows).collect(),
        }
    }

    fn key(split: Split, step: u64) -> (bool, u64) {
        // All evaluations are of the same rows.
        if split == Split::Eval { (true, 0) } else { (false, step) }
    }

    fn remembered(&self, split: Split, step: u64) -> Option<Arc<StepRows>> {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        steps.get(&Self::key(split, step)).cloned()
    }

    /// A step's rows; from memory, if anybody asked before.
    fn step(&self, split: Split, step: u64) -> Result<Arc<StepRows>> {
        if let Some(known) = self.remembered(split, step) {
            return Ok(known);
        }
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        match self.remembered(split, step) {
            Some(known) => Ok(known),
            None => self.look_up(split, step),
        }
    }

    fn look_up(&self, split: Split, step: u64) -> Result<Arc<StepRows>> {
        let mut announcement = Announcement::default();
        let mut ids = HashSet::new();
        for id in self.rows_of(split, step) {
            announcement.tokens += u64::from(self.rows.trained_tokens(split, id)?);
            announcement.rows += 1;
            announcement.row_hash = announcement.row_hash.wrapping_add(order::row_hash(id));
            ids.insert(id);
        }
        let rows = Arc::new(StepRows { announcement, ids });
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if steps.len() >= REMEMBERED {
            // The lowest training step is the one that is over longest.
            steps.pop_first();
        }
        steps.insert(Self::key(split, step), Arc::clone(&rows));
        Ok(rows)
    }

    /// Runs what reads files where it holds nobody up.
    async fn off_the_path<T: Send + 'static>(
        self: Arc<Self>,
        look: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.rows.are_at_hand() {
            return look(&self);
        }
        match tokio::task::spawn_blocking(move || look(&self)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Stopping),
        }
    }
}
