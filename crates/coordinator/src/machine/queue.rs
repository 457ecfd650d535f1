//! Whose turn it is: which jobs have workers, how many, and why the others wait. A pure function of the queue.
//!
//! The rules, in this order:
//! 1. **Priority.** Jobs of a higher priority come first. A waiting one takes free workers, then what jobs of its own
//!    or a lower priority hold beyond their least number, then whole jobs of a strictly lower priority: those give way,
//!    the lowest and youngest first, and only if that is enough for the job to begin.
//! 2. **What runs goes on.** Among equals a job at work keeps its least number of workers until it ends.
//! 3. **Fair among owners.** Of the waiting jobs of one priority, next is that of the owner who has the fewest workers
//!    now; of equals the oldest.
//! 4. **No starvation.** A waiting job that does not fit yet, but would if others ended, holds up all waiting jobs of its
//!    priority, so a large job is not passed by small ones for ever. By rule 3 at most [`OVERTAKES`] younger jobs of its
//!    priority begin before a job; then it is next, whoever owns it.
//! 5. **What is left over** goes to jobs at work that can use more, one worker at a time to the one of highest priority
//!    with the fewest. No job is broken up to let another grow beyond its least number.
//!
//! Lower priorities have no such promise: a stream of higher ones keeps them waiting, which is what priority means.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use shanty_proto::JobId;

/// How many younger jobs of its priority may begin before a waiting job.
pub const OVERTAKES: u32 = 8;

/// A job as the queue sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    /// The job.
    pub job: JobId,
    /// For whom it runs.
    pub owner: String,
    /// The higher, the sooner.
    pub priority: i32,
    /// Its place in the order of submission.
    pub sequence: u64,
    /// Fewer workers than this are of no use to it.
    pub min: u32,
    /// More than this neither.
    pub max: u32,
    /// Workers that it has.
    pub holds: u32,
    /// Whether it had its turn already.
    pub active: bool,
    /// Whether it must not be disturbed just now.
    pub settled: bool,
    /// Whether it lost workers a moment ago, and may hope to get them back.
    pub hopeful: bool,
    /// Younger jobs of its priority that began before it.
    pub overtaken: u32,
}

/// What there is to deal out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pool {
    /// Workers that are there, at work or not.
    pub workers: u32,
    /// Jobs at work at a time; 0: any number.
    pub most_jobs: u32,
    /// The same of one owner.
    pub most_jobs_an_owner: u32,
}

/// What becomes of a job now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// It is its turn: it has this many workers, or is to get them.
    Works {
        /// Its share of the pool.
        workers: u32,
    },
    /// It has to wait.
    Waits(Why),
    /// It had its turn, and has to make room for a job of higher priority.
    GivesWay {
        /// The job that needs its workers.
        to: JobId,
    },
}

/// Why a job waits. Its text is what people read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// There are not enough workers for it.
    Workers {
        /// Its least number.
        needs: u32,
        /// Workers that no job has.
        free: u32,
        /// Workers that are there at all.
        pool: u32,
        /// The waiting job before it, with its priority.
        behind: Option<(JobId, i32)>,
        /// Jobs that have workers and may keep them, with how many.
        held: Vec<(JobId, u32)>,
    },
    /// As many jobs run as may.
    Jobs {
        /// How many.
        most: u32,
    },
    /// As many jobs of its owner run as may.
    JobsOfOwner {
        /// Who.
        owner: String,
        /// How many.
        most: u32,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jobs { most } => write!(f, "{most} jobs run, which is as many as may at a time"),
            Self::JobsOfOwner { owner, most } => {
                write!(f, "{most} jobs of {owner} run, which is as many as may at a time")
            }
            Self::Workers { needs, free, pool, behind, held } => {
                let plural = if *needs == 1 { "" } else { "s" };
                let is = if *free == 1 { "is" } else { "are" };
                write!(f, "needs {needs} worker{plural}, {free} {is} free")?;
                if needs > pool {
                    write!(f, ", {pool} connected in all")?;
                }
                if let Some((job, priority)) = behind {
                    return write!(f, "; behind job {job} of priority {priority}");
                }
                for (at, (job, workers)) in held.iter().enumerate() {
                    let between = if at == 0 { "; " } else { ", " };
                    write!(f, "{between}job {job} has {workers}")?;
                }
                Ok(())
            }
        }
    }
}

/// Says whose turn it is, and in which order the waiting ones come.
pub fn turns(jobs: &[Asking], pool: Pool) -> Turns {
    let mut deal = Deal::new(jobs, pool);
    deal.settled();
    let priorities: BTreeSet<Reverse<i32>> = jobs.iter().map(|job| Reverse(job.priority)).collect();
    for Reverse(priority) in priorities {
        deal.class(priority);
    }
    deal.hope();
    deal.grow();
    deal.finish()
}

/// What [`turns`] says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turns {
    /// Of each job.
    pub of: BTreeMap<JobId, Turn>,
    /// Those that wait, the next one first.
    pub waiting: Vec<JobId>,
}

/// How far the dealing is.
struct Deal<'a> {
    jobs: &'a [Asking],
    pool: Pool,
    left: u32,
    begun: u32,
    /// Workers by job that has its turn.
    granted: BTreeMap<usize, u32>,
    /// Workers and jobs by owner.
    owners: BTreeMap<&'a str, (u32, u32)>,
    /// Jobs that get more than they hold, in the order in which they got it.
    takers: Vec<usize>,
    gives_way: BTreeMap<usize, usize>,
    waits: Vec<(usize, Why)>,
    /// Jobs with their turn that do not fit at present, and live on what is left over.
    starved: Vec<usize>,
    /// Jobs that begin now.
    newly: Vec<usize>,
    gathering: bool,
}

impl<'a> Deal<'a> {
    fn new(jobs: &'a [Asking], pool: Pool) -> Self {
        let held = jobs.iter().map(|job| job.holds).fold(0, u32::saturating_add);
        let pool = Pool { workers: pool.workers.max(held), ..pool };
        Self {
            jobs,
            pool,
            left: pool.workers,
            begun: 0,
            granted: BTreeMap::new(),
            owners: BTreeMap::new(),
            takers: Vec::new(),
            gives_way: BTreeMap::new(),
            waits: Vec::new(),
            starved: Vec::new(),
            newly: Vec::new(),
            gathering: false,
        }
    }

    fn grant(&mut self, at: usize, workers: u32) {
        let jobs: &'a [Asking] = self.jobs;
        let job = &jobs[at];
        self.left -= workers;
        let of_owner = self.owners.entry(&job.owner).or_default();
        of_owner.0 += workers;
        let has = self.granted.entry(at).or_insert_with(|| {
            self.begun += 1;
            of_owner.1 += 1;
            0
        });
        *has += workers;
        if *has > job.holds && !self.takers.contains(&at) {
            self.takers.push(at);
        }
    }

    /// Workers that a job has, or gets now.
    fn has(&self, at: usize) -> u32 {
        self.jobs[at].holds.max(self.granted.get(&at).copied().unwrap_or(0))
    }

    fn free(&self) -> u32 {
        let held = (0..self.jobs.len()).map(|at| self.has(at)).fold(0, u32::saturating_add);
        self.pool.workers.saturating_sub(held)
    }

    /// Jobs that are not to be disturbed keep what they have, before anybody is asked.
    fn settled(&mut self) {
        for at in 0..self.jobs.len() {
            let job = &self.jobs[at];
            if job.active && job.settled {
                self.grant(at, job.holds.min(job.max).min(self.left));
            }
        }
    }

    /// Deals the least number out to jobs of one priority.
    fn class(&mut self, priority: i32) {
        let mut of_class: Vec<usize> = (0..self.jobs.len())
            .filter(|at| self.jobs[*at].priority == priority && !self.granted.contains_key(at))
            .collect();
        of_class.sort_by_key(|at| self.jobs[*at].sequence);
        let (active, mut waiting): (Vec<usize>, Vec<usize>) =
            of_class.into_iter().partition(|at| self.jobs[*at].active);
        let (whole, lacking): (Vec<usize>, Vec<usize>) =
            active.into_iter().partition(|at| self.jobs[*at].holds >= self.jobs[*at].min);
        for at in whole {
            self.go_on(at);
        }
        self.complete(priority);
        let mut head = None;
        for at in lacking {
            self.mend(at, &mut head);
        }
        while let Some(at) = self.next_of(&waiting) {
            waiting.retain(|other| *other != at);
            self.begin(at, &mut head);
        }
        self.keep(priority);
    }

    /// Jobs that are not to be disturbed get what they lack, if all of that is there.
    fn complete(&mut self, priority: i32) {
        for at in 0..self.jobs.len() {
            let job = &self.jobs[at];
            let has = self.granted.get(&at).copied().filter(|_| job.settled && job.priority == priority);
            let lacks = has.map_or(0, |has| job.min.saturating_sub(has));
            if lacks > 0 && lacks <= self.left {
                self.grant(at, lacks);
            }
        }
    }

    /// The last job of a higher priority that got workers which it did not hold.
    fn taker_above(&self, at: usize) -> Option<usize> {
        let above = |taker: &&usize| self.jobs[**taker].priority > self.jobs[at].priority;
        self.takers.iter().rev().find(above).copied()
    }

    /// Where a bound is reached: the last job that took a place of it by beginning now.
    fn displaced_by(&self, at: usize, only_above: bool) -> Option<usize> {
        let job = &self.jobs[at];
        let limit = self.limit_of(at)?;
        let took = |other: &&usize| {
            let other = &self.jobs[**other];
            (!only_above || other.priority > job.priority)
                && (matches!(limit, Why::Jobs { .. }) || other.owner == job.owner)
        };
        self.newly.iter().rev().find(took).copied()
    }

    fn give_place(&mut self, at: usize, only_above: bool) {
        if let Some(to) = self.displaced_by(at, only_above) {
            self.gives_way.insert(at, to);
        }
    }

    /// Whether a job may have its turn without that anybody at work loses a place to it.
    fn has_place_beside_all(&self, at: usize) -> bool {
        let owner = self.jobs[at].owner.as_str();
        let pending = |own: bool| {
            let of = |(other, job): &(usize, &Asking)| {
                job.active
                    && (!own || job.owner == owner)
                    && !self.granted.contains_key(other)
                    && !self.gives_way.contains_key(other)
            };
            self.jobs.iter().enumerate().filter(of).count() as u32
        };
        let of_owner = self.owners.get(owner).map_or(0, |(_, jobs)| *jobs);
        let below = |most: u32, count: u32| most == 0 || count < most;
        below(self.pool.most_jobs, self.begun + pending(false))
            && below(self.pool.most_jobs_an_owner, of_owner + pending(true))
    }

    /// A job at work with enough workers.
    fn go_on(&mut self, at: usize) {
        let job = &self.jobs[at];
        match self.taker_above(at) {
            Some(taker) if self.left < job.min => drop(self.gives_way.insert(at, taker)),
            Some(_) if self.displaced_by(at, true).is_some() => self.give_place(at, true),
            // A bound that was lowered meanwhile keeps new jobs out, and sends nobody home.
            _ => self.grant(at, job.min.min(self.left)),
        }
    }

    /// A job at work that lacks workers.
    fn mend(&mut self, at: usize, head: &mut Option<usize>) {
        let job = &self.jobs[at];
        if self.displaced_by(at, true).is_some() {
            return self.give_place(at, true);
        }
        if self.left >= job.min {
            return self.grant(at, job.min);
        }
        if job.min > self.pool.workers && !job.hopeful {
            self.gathering = true;
            return self.starved.push(at);
        }
        head.get_or_insert(at);
        match self.taker_above(at) {
            Some(taker) if self.left < job.holds => drop(self.gives_way.insert(at, taker)),
            _ => self.grant(at, job.holds.min(self.left)),
        }
    }

    /// A waiting job.
    fn begin(&mut self, at: usize, head: &mut Option<usize>) {
        let job = &self.jobs[at];
        if let Some(why) = self.limit_of(at) {
            return self.waits.push((at, why));
        }
        if head.is_none() && job.min <= self.left {
            self.newly.push(at);
            return self.grant(at, job.min);
        }
        let fits_some_day = job.min <= self.pool.workers;
        if head.is_none() && !fits_some_day && !self.gathering && self.has_place_beside_all(at) {
            // Nobody is kept from anything by the first that waits for workers to connect.
            self.gathering = true;
            self.grant(at, 0);
            return self.starved.push(at);
        }
        let why = self.too_few(at, *head);
        self.waits.push((at, why));
        if fits_some_day {
            head.get_or_insert(at);
        }
    }

    fn too_few(&self, at: usize, head: Option<usize>) -> Why {
        let job = &self.jobs[at];
        let in_line = |(before, why): &&(usize, Why)| {
            self.jobs[*before].priority == job.priority && matches!(why, Why::Workers { .. })
        };
        let last = self.waits.last().filter(in_line).map(|(before, _)| *before);
        let before = head.map(|head| last.unwrap_or(head));
        let name = |at: usize| (self.jobs[at].job.clone(), self.jobs[at].priority);
        let has_turn = |other: &usize| self.jobs[*other].active || self.granted.contains_key(other);
        let keeps = |other: &usize| {
            has_turn(other) && self.has(*other) > 0 && self.jobs[*other].priority >= job.priority
        };
        Why::Workers {
            needs: job.min,
            free: self.free(),
            pool: self.pool.workers,
            behind: before.map(name),
            held: (0..self.jobs.len())
                .filter(keeps)
                .map(|other| (self.jobs[other].job.clone(), self.has(other)))
                .collect(),
        }
    }

    /// The bound that keeps a job from its turn.
    fn limit_of(&self, at: usize) -> Option<Why> {
        let owner = &self.jobs[at].owner;
        let jobs = self.owners.get(owner.as_str()).map_or(0, |(_, jobs)| *jobs);
        let reached = |most: u32, count: u32| most > 0 && count >= most;
        if reached(self.pool.most_jobs, self.begun) {
            return Some(Why::Jobs { most: self.pool.most_jobs });
        }
        let most = self.pool.most_jobs_an_owner;
        reached(most, jobs).then(|| Why::JobsOfOwner { owner: owner.clone(), most })
    }

    /// Rules 3 and 4.
    fn next_of(&self, waiting: &[usize]) -> Option<usize> {
        let younger_now = |at: usize| {
            let younger = |other: &&usize| {
                let (one, other) = (&self.jobs[at], &self.jobs[**other]);
                other.priority == one.priority && other.sequence > one.sequence
            };
            self.newly.iter().filter(younger).count() as u32
        };
        let passed_over = |at: &&usize| self.jobs[**at].overtaken + younger_now(**at) >= OVERTAKES;
        let oldest = waiting.iter().filter(passed_over).min_by_key(|at| self.jobs[**at].sequence);
        let share =
            |at: usize| self.owners.get(self.jobs[at].owner.as_str()).map_or(0, |(workers, _)| *workers);
        let fairest = || waiting.iter().min_by_key(|at| (share(**at), self.jobs[**at].sequence));
        oldest.or_else(fairest).copied()
    }

    fn by_rank(&self, at: usize) -> (Reverse<i32>, u64) {
        (Reverse(self.jobs[at].priority), self.jobs[at].sequence)
    }

    /// Jobs at work keep what they hold beyond their least number, as far as no equal needs it to begin.
    fn keep(&mut self, priority: i32) {
        let mut granted: Vec<usize> = self.granted.keys().copied().collect();
        granted.retain(|at| self.jobs[*at].priority == priority);
        granted.sort_by_key(|at| self.by_rank(*at));
        for at in granted {
            let job = &self.jobs[at];
            let beyond = job.holds.min(job.max).saturating_sub(self.granted[&at]);
            self.grant(at, beyond.min(self.left));
        }
    }

    /// Jobs that the pool is too small for at present keep what nobody can begin with, to load ahead.
    fn hope(&mut self) {
        let taker = self.takers.last().copied();
        let mut starved = std::mem::take(&mut self.starved);
        starved.sort_by_key(|at| self.by_rank(*at));
        for at in starved {
            let holds = self.jobs[at].holds.min(self.jobs[at].max);
            if !self.granted.contains_key(&at) && self.displaced_by(at, false).is_some() {
                self.give_place(at, false);
                continue;
            }
            match taker {
                Some(taker) if self.left < holds => drop(self.gives_way.insert(at, taker)),
                _ => self.grant(at, holds.min(self.left)),
            }
        }
    }

    /// Free workers go to whom they help, one at a time.
    fn grow(&mut self) {
        while self.left > 0 {
            // Who lacks workers, and cannot have all of those, has no use for some; who gathers loads ahead.
            let can_grow = |at: &usize| {
                let (job, has) = (&self.jobs[*at], self.granted[at]);
                has < job.max && (has >= job.min || job.min > self.pool.workers)
            };
            let next = self.granted.keys().copied().filter(can_grow).min_by_key(|at| {
                (Reverse(self.jobs[*at].priority), self.granted[at], self.jobs[*at].sequence)
            });
            let Some(next) = next else { break };
            self.grant(next, 1);
        }
    }

    fn finish(self) -> Turns {
        let mut turns = Turns::default();
        let id = |at: usize| self.jobs[at].job.clone();
        for (at, workers) in &self.granted {
            turns.of.insert(id(*at), Turn::Works { workers: *workers });
        }
        for (at, to) in &self.gives_way {
            turns.of.insert(id(*at), Turn::GivesWay { to: id(*to) });
        }
        for (at, why) in self.waits {
            turns.waiting.push(self.jobs[at].job.clone());
            turns.of.insert(self.jobs[at].job.clone(), Turn::Waits(why));
        }
        turns
    }
}
