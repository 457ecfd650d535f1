//! A model of a worker: its half of the step protocol, with rows for gradients.

use std::{collections::VecDeque, sync::Arc};

use shanty_coordinator::machine::{
    Attachment, KeptSum, MemberPhase, Message, Said, Within, WorkerInfo,
    record::{GenerationRecord, Source},
};
use shanty_proto::{Attempt, JobId, Rank, Step, WorkerId};

/// Adapter and optimizer: which rows each applied step was made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    pub steps: Vec<Vec<u64>>,
    pub evaluated: Option<u64>,
    pub checkpoint: Option<u64>,
}

impl State {
    pub fn applied(&self) -> u64 {
        self.steps.len() as u64
    }
}

/// What a member does at a moment.
#[derive(Debug, Clone, PartialEq)]
pub enum Doing {
    /// Waits until all members are connected and have the state.
    Connecting,
    /// Needs a credit for the next step.
    Waiting,
    Computing,
    /// In the reduction of the next step, since a moment.
    Reducing,
    /// All steps are applied.
    Finishing,
    /// Its collective failed; waits for `Leave`.
    Broken,
    /// Left the generation; waits for `Form`.
    Left,
}

#[derive(Debug, Clone)]
pub struct Membership {
    pub job: JobId,
    pub attempt: Attempt,
    pub rank: u32,
    pub generation: Arc<GenerationRecord>,
    pub doing: Doing,
    pub said_left: Option<Said>,
    /// It leaves once it has applied this step.
    pub stop_after: Option<u64>,
}

pub struct Worker {
    pub id: WorkerId,
    pub alive: bool,
    /// Number of its stream, if it has one.
    pub session: Option<u64>,
    pub hello_at: u64,
    pub inbox: VecDeque<(u64, Message)>,
    pub outbox: VecDeque<(u64, Said)>,
    pub assigned: Option<(JobId, Attempt, u64)>,
    /// The part of a shared base that it was asked to load.
    pub part: Option<u32>,
    /// The part that it has.
    pub loaded: Option<u32>,
    pub load_until: u64,
    pub ready_said: bool,
    pub state: State,
    pub member: Option<Membership>,
    /// Rows in the sum of step applied + 1, and those to come.
    pub sum: Vec<u64>,
    pub to_compute: VecDeque<u64>,
    pub row_until: u64,
    /// Generation, last step, end by this worker's clock.
    pub credit: Option<(u64, u64, u64)>,
    pub next_beat: u64,
    pub sequence: u64,
    pub beats: VecDeque<(u64, u64)>,
    pub paused_until: u64,
    /// Its trainer makes no progress any more.
    pub hung: bool,
    /// Its process ends by itself, as its trainer does not answer.
    pub dies_at: Option<u64>,
    /// It was asked to end; says so, and goes when it may.
    pub draining: bool,
    pub drained: bool,
    /// A checkpoint of the state that it left with is wanted.
    pub keep: Option<Within>,
}

impl Worker {
    pub fn new(number: u64, now: u64) -> Self {
        Self {
            id: WorkerId::new(format!("w{number}")).expect("a valid id"),
            alive: true,
            session: None,
            hello_at: now,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            assigned: None,
            part: None,
            loaded: None,
            load_until: 0,
            ready_said: false,
            state: State::default(),
            member: None,
            sum: Vec::new(),
            to_compute: VecDeque::new(),
            row_until: 0,
            credit: None,
            next_beat: 0,
            sequence: 0,
            beats: VecDeque::new(),
            paused_until: 0,
            hung: false,
            dies_at: None,
            draining: false,
            drained: false,
            keep: None,
        }
    }

    pub fn info(&self) -> WorkerInfo {
        WorkerInfo {
            host: "sim".to_owned(),
            pid: 1,
            address: format!("{}:1", self.id),
            part: self.loaded,
            draining: self.draining,
            ..WorkerInfo::default()
        }
    }

    pub fn attachment(&self) -> Option<Attachment> {
        let member = self.member.as_ref()?;
        Some(Attachment {
            job: member.job.clone(),
            attempt: member.attempt,
            generation: member.generation.generation,
            rank: Rank(member.rank),
            applied: Step(self.state.applied()),
        })
    }

    pub fn within(&self) -> Option<Within> {
        let member = self.member.as_ref()?;
        Some(Within {
            job: member.job.clone(),
            attempt: member.attempt,
            generation: member.generation.generation,
        })
    }

    pub fn doing(&self) -> Option<&Doing> {
        self.member.as_ref().map(|member| &member.doing)
    }

    pub fn set_doing(&mut self, doing: Doing) {
        if let Some(member) = &mut self.member {
            member.doing = doing;
        }
    }

    pub fn is_in(&self, generation: u64, doing: &[Doing]) -> bool {
        self.alive
            && self.member.as_ref().is_some_and(|member| {
                member.generation.generation.0 == generation && doing.contains(&member.doing)
            })
    }

    pub fn has_credit(&self, now: u64, step: u64) -> bool {
        let generation = self.member.as_ref().map(|member| member.generation.generation.0);
        self.credit.is_some_and(|(of, up_to, end)| Some(of) == generation && step <= up_to && now < end)
    }

    /// Says something, if the stream is up.
    pub fn say(&mut self, at: u64, said: Said) {
        if self.session.is_some() {
            // One stream keeps its order.
            let at = self.outbox.back().map_or(at, |(last, _)| at.max(*last));
            self.outbox.push_back((at, said));
        }
    }

    /// Takes a message of the coordinator in. `late` is when an answer would arrive.
    pub fn hear(&mut self, now: u64, late: u64, load: u64, message: Message, credit_ms: u64) {
        match message {
            Message::Welcome { attached } => {
                if self.hung && !attached {
                    self.dies_at.get_or_insert(now + 1200);
                }
                if !attached {
                    self.drop_membership();
                } else if let Some(left) = self.member.as_ref().and_then(|member| member.said_left.clone()) {
                    self.say(late, left);
                } else if let (Some(Doing::Broken), Some(within)) = (self.doing(), self.within()) {
                    self.say(late, Said::Broken { within, error: "the ring broke".to_owned() });
                }
            }
            Message::BeatAck { sequence, credit } => {
                while self.beats.front().is_some_and(|(sent, _)| *sent < sequence) {
                    self.beats.pop_front();
                }
                if let (Some(given), Some((_, sent))) = (credit, self.beats.front()) {
                    self.credit = Some((given.generation.0, given.up_to.0, sent + credit_ms));
                }
            }
            Message::Assign { job, attempt, steps, part, .. } => {
                self.drop_membership();
                // What is loaded serves again.
                self.loaded = self.loaded.filter(|loaded| Some(*loaded) == part);
                self.part = part;
                self.assigned = Some((job, attempt, steps.0));
                self.load_until = now + load;
                self.ready_said = false;
            }
            Message::Form { job, attempt, rank, generation } => self.join(job, attempt, rank.0, generation),
            Message::Leave { generation, after, .. } => {
                if self.hung && after.is_none() {
                    self.dies_at.get_or_insert(now + 1200);
                }
                let applied = self.state.applied();
                match (&mut self.member, after) {
                    (Some(member), Some(after))
                        if member.generation.generation == generation
                            && applied < after.0
                            && !matches!(member.doing, Doing::Left | Doing::Broken) =>
                    {
                        member.stop_after = Some(after.0);
                    }
                    _ => self.leave(late, generation),
                }
            }
            Message::Release { .. } => {
                self.drop_membership();
                self.assigned = None;
            }
            Message::Drain { .. } => self.draining = true,
            Message::Drained { .. } => self.drained = true,
            Message::Keep { .. } => self.keep = self.within(),
        }
    }

    /// Takes no further part in a generation. A trainer that hangs does not get to it.
    pub fn leave(&mut self, late: u64, generation: shanty_proto::Generation) {
        let Some(within) = self.within() else { return };
        if within.generation != generation || self.hung {
            return;
        }
        let applied = self.state.applied();
        let kept =
            (!self.sum.is_empty()).then(|| KeptSum { step: Step(applied + 1), rows: self.sum.clone() });
        let hash = format!("{applied}");
        let left = Said::Left { within, applied: Step(applied), holds_state: true, hash, kept };
        let member = self.member.as_mut().expect("it is within one");
        member.doing = Doing::Left;
        member.said_left = Some(left.clone());
        self.say(late, left);
    }

    fn drop_membership(&mut self) {
        self.member = None;
        self.sum.clear();
        self.to_compute.clear();
        self.credit = None;
    }

    fn join(&mut self, job: JobId, attempt: Attempt, rank: u32, generation: Arc<GenerationRecord>) {
        let start = &generation.start;
        // What a real worker checks: its state is what the start point says it is.
        let keeps = start.rows.get(rank as usize).is_some_and(|rows| !rows.kept.is_empty());
        let is_receiver = match &start.source {
            Source::Members { receivers, .. } => receivers.contains(&Rank(rank)),
            _ => true,
        };
        if !is_receiver {
            assert_eq!(
                self.state.applied(),
                start.applied.0,
                "{} is no receiver and has another state",
                self.id
            );
        }
        if keeps {
            assert!(!is_receiver, "a receiver keeps nothing");
            assert_eq!(self.sum, start.rows[rank as usize].kept, "{} keeps another sum", self.id);
        } else {
            self.sum.clear();
        }
        self.to_compute.clear();
        self.credit = None;
        self.member = Some(Membership {
            job,
            attempt,
            rank,
            generation,
            doing: Doing::Connecting,
            said_left: None,
            stop_after: None,
        });
    }

    /// Whether it can do nothing without others.
    pub fn waits(&self) -> bool {
        matches!(self.doing(), Some(Doing::Reducing | Doing::Waiting | Doing::Finishing))
    }

    pub fn phase(&self) -> MemberPhase {
        match self.doing() {
            None => MemberPhase::Idle,
            Some(Doing::Connecting) => MemberPhase::Forming,
            Some(Doing::Computing) => MemberPhase::Computing,
            Some(Doing::Reducing) => MemberPhase::Reducing,
            Some(_) => MemberPhase::Waiting,
        }
    }
}
