//! Places where a test may kill this worker.
//!
//! `SHANTY_FAILPOINT` holds one or more plans, separated by `;`, each `point` or `point@key=value,…`:
//!
//! ```text
//! after_reduction@step=5,rank=1
//! ring_hop_2@step=7,rank=0;before_manifest@step=10
//! ```
//!
//! With `hang:` ahead of the point, the thread stays there for ever instead, as in a driver that does not come back:
//! `hang:mid_backward@step=5,rank=1`.
//!
//! Keys are `step`, `rank` and `generation`; a key that is absent matches everything. The worker that reaches the
//! place sends itself SIGKILL: no destructor runs, no buffer is flushed, as when a machine loses its process.
//! Without the variable a failpoint is one branch on a flag that never changes.

use std::{fmt, str::FromStr, sync::Arc};

use crate::Error;

/// The environment variable that arms failpoints.
pub const VARIABLE: &str = "SHANTY_FAILPOINT";

/// A place where a worker may be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Adapter and optimizer are on their way from the donor.
    DuringStateTransfer,
    /// Inside a micro-batch's backward pass: part of the gradient is there.
    MidBackward,
    /// The row log says that the reduction is entered; nothing was sent yet.
    EnteringReduction,
    /// The n-th exchange with the neighbours within one step's reduction, from 0.
    RingHop(usize),
    /// The step is committed; the update is not applied.
    AfterReduction,
    /// The update is applied; nobody was told.
    AfterUpdate,
    /// The checkpoint's files are there, its manifest is not.
    BeforeManifest,
    /// The checkpoint exists; nobody was told.
    AfterManifest,
}

/// Where a worker is in its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The generation.
    pub generation: u64,
    /// The step that is being made or, at a boundary, that was applied.
    pub step: u64,
    /// The worker's rank.
    pub rank: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    point: Point,
    generation: Option<u64>,
    step: Option<u64>,
    rank: Option<u32>,
    /// The place is not passed and not died at: the thread stays there for ever.
    hangs: bool,
}

/// What happens at an armed place. Real workers die; tests in one process simulate a death.
type Action = Arc<dyn Fn(Point, Place) -> Result<(), Error> + Send + Sync>;

/// The armed failpoints of one worker.
#[derive(Clone)]
pub struct Failpoints {
    plans: Arc<[Plan]>,
    action: Action,
}

impl Failpoints {
    /// None: every place is passed.
    pub fn none() -> Self {
        Self { plans: Arc::new([]), action: Arc::new(|_, _| Ok(())) }
    }

    /// Those of the environment variable `SHANTY_FAILPOINT`.
    ///
    /// # Errors
    /// [`Error::Failpoint`] if the variable cannot be understood.
    pub fn from_environment() -> Result<Self, Error> {
        match std::env::var(VARIABLE) {
            Ok(text) if !text.trim().is_empty() => Self::parse(&text, Arc::new(|_, _| kill_this_process())),
            _ => Ok(Self::none()),
        }
    }

    /// Those of `text`, with an action of the caller's choice: an error that it returns travels up as if the worker
    /// had died there.
    ///
    /// # Errors
    /// [`Error::Failpoint`] if `text` cannot be understood.
    pub fn parse(text: &str, action: Action) -> Result<Self, Error> {
        let plans: Result<Vec<Plan>, Error> =
            text.split(';').map(str::trim).filter(|plan| !plan.is_empty()).map(str::parse).collect();
        Ok(Self { plans: plans?.into(), action })
    }

    /// Whether any place is armed.
    pub fn is_armed(&self) -> bool {
        !self.plans.is_empty()
    }

    /// Passes a place, or dies at it.
    ///
    /// # Errors
    /// What the action of [`Self::parse`] returns.
    #[inline]
    pub fn reach(&self, point: Point, place: Place) -> Result<(), Error> {
        if self.plans.is_empty() {
            return Ok(());
        }
        self.reach_armed(point, place)
    }

    #[cold]
    fn reach_armed(&self, point: Point, place: Place) -> Result<(), Error> {
        match self.plans.iter().find(|plan| plan.matches(point, place)) {
            Some(plan) if plan.hangs => loop {
                std::thread::park();
            },
            Some(_) => (self.action)(point, place),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Failpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failpoints").field("plans", &self.plans).finish_non_exhaustive()
    }
}

impl Plan {
    fn matches(&self, point: Point, place: Place) -> bool {
        self.point == point
            && self.generation.is_none_or(|generation| generation == place.generation)
            && self.step.is_none_or(|step| step == place.step)
            && self.rank.is_none_or(|rank| rank == place.rank)
    }
}

impl FromStr for Plan {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let unclear = || Error::Failpoint { text: text.to_owned() };
        let (name, conditions) = text.split_once('@').unwrap_or((text, ""));
        let (name, hangs) = name.strip_prefix("hang:").map_or((name, false), |name| (name, true));
        let mut plan = Self { point: name.parse()?, generation: None, step: None, rank: None, hangs };
        for condition in conditions.split(',').filter(|condition| !condition.is_empty()) {
            let (key, value) = condition.split_once('=').ok_or_else(unclear)?;
            let value: u64 = value.trim().parse().map_err(|_| unclear())?;
            match key.trim() {
                "generation" => plan.generation = Some(value),
                "step" => plan.step = Some(value),
                "rank" => plan.rank = Some(u32::try_from(value).map_err(|_| unclear())?),
                _ => return Err(unclear()),
            }
        }
        Ok(plan)
    }
}

impl FromStr for Point {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let point = match name.trim() {
            "during_state_transfer" => Self::DuringStateTransfer,
            "mid_backward" => Self::MidBackward,
            "entering_reduction" => Self::EnteringReduction,
            "after_reduction" => Self::AfterReduction,
            "after_update" => Self::AfterUpdate,
            "before_manifest" => Self::BeforeManifest,
            "after_manifest" => Self::AfterManifest,
            other => {
                let hop = other.strip_prefix("ring_hop_").and_then(|hop| hop.parse().ok());
                Self::RingHop(hop.ok_or_else(|| Error::Failpoint { text: name.to_owned() })?)
            }
        };
        Ok(point)
    }
}

fn kill_this_process() -> Result<(), Error> {
    let this = rustix::process::getpid();
    // Cannot return: SIGKILL is delivered to this very process. If the system refuses it, ending at once is the
    // nearest thing.
    let _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(text: &str) -> Result<Failpoints, Error> {
        Failpoints::parse(text, Arc::new(|_, _| Err(Error::Killed)))
    }

    fn place(generation: u64, step: u64, rank: u32) -> Place {
        Place { generation, step, rank }
    }

    #[test]
    fn a_plan_fires_only_where_all_its_conditions_hold() {
        let points = counting("after_reduction@step=5,rank=1").unwrap();
        assert!(points.reach(Point::AfterReduction, place(1, 5, 0)).is_ok());
        assert!(points.reach(Point::AfterReduction, place(1, 4, 1)).is_ok());
        assert!(points.reach(Point::AfterUpdate, place(1, 5, 1)).is_ok());
        assert!(points.reach(Point::AfterReduction, place(7, 5, 1)).is_err());
    }

    #[test]
    fn several_plans_and_ring_hops_are_understood() {
        let points = counting("ring_hop_2@step=7,rank=0; before_manifest@generation=2;").unwrap();
        assert!(points.reach(Point::RingHop(1), place(1, 7, 0)).is_ok());
        assert!(points.reach(Point::RingHop(2), place(1, 7, 0)).is_err());
        assert!(points.reach(Point::BeforeManifest, place(1, 1, 0)).is_ok());
        assert!(points.reach(Point::BeforeManifest, place(2, 1, 0)).is_err());
    }

    #[test]
    fn nonsense_is_refused_with_its_text() {
        for text in
            ["nowhere", "after_update@step", "after_update@step=x", "after_update@color=1", "ring_hop_x"]
        {
            let error = counting(text).unwrap_err();
            assert!(matches!(error, Error::Failpoint { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn without_plans_every_place_is_passed() {
        let points = Failpoints::none();
        assert!(!points.is_armed());
        assert!(points.reach(Point::MidBackward, place(1, 1, 0)).is_ok());
    }
}
