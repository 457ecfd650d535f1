//! Members that the others wait for, step after step.
//!
//! All members leave a reduction together, so a slow one slows all, and their times for a whole step are equal. What tells
//! them apart is when each was done with its own work: whoever comes last waits least in the reduction, and the others
//! wait for it. A link that is slow slows the reduction itself, for all; these figures do not say whose it is.

use shanty_proto::{Step, WorkerId};

use super::{
    Machine,
    event::{Moment, Timings},
    job::Job,
};

/// Weight of the newest step in a member's figures.
const SMOOTHING: f64 = 0.25;
/// Steps before a member's figures count.
const LEAST_STEPS: u64 = 4;
/// A member whose own part of a step takes so many times the crew's median …
const SLOWER: f64 = 1.3;
/// … for so many steps in a row is a straggler.
const STEPS: u64 = 8;
/// Seconds that are noise whatever the ratio.
const NOISE_SECONDS: f64 = 0.005;

/// Where a member's time goes, over the last steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    data: f64,
    compute: f64,
    reduce: f64,
    /// Seconds of computation a token; 0 if it did not say how many there were.
    per_token: f64,
    steps: u64,
    /// Steps in a row that it was slow at, or the other way round once it is named.
    streak: u64,
    named: bool,
}

impl Figures {
    fn learn(&mut self, timings: &Timings) {
        let weight = if self.steps == 0 { 1.0 } else { SMOOTHING };
        let blend = |old: &mut f64, new: f64| *old += weight * (new - *old);
        blend(&mut self.data, timings.data_seconds);
        blend(&mut self.compute, timings.compute_seconds);
        blend(&mut self.reduce, timings.reduce_seconds);
        if timings.tokens > 0 {
            let per_token = timings.compute_seconds / timings.tokens as f64;
            let weight = if self.per_token == 0.0 { 1.0 } else { SMOOTHING };
            self.per_token += weight * (per_token - self.per_token);
        }
        self.steps += 1;
    }

    pub fn is_straggler(&self) -> bool {
        self.named
    }
}

/// A straggler with its figures, seconds a step, beside the crew's medians.
#[derive(Debug, Clone, PartialEq)]
pub struct Straggler {
    /// The worker.
    pub worker: WorkerId,
    /// `computing` or `data`.
    pub cause: &'static str,
    /// Forward and backward.
    pub compute: [f64; 2],
    /// Waiting for rows.
    pub data: [f64; 2],
    /// In the reduction.
    pub reduce: [f64; 2],
    /// Steps in a row.
    pub steps: u64,
}

/// The crew's medians; of two the lower, so that of two members the slower one is told from the faster.
#[derive(Debug, Clone, Copy, Default)]
struct Medians {
    data: f64,
    compute: f64,
    reduce: f64,
    per_token: f64,
}

impl Job {
    /// Takes a step's timings of a member in.
    pub(super) fn learn_timings(&mut self, worker: &WorkerId, timings: &Timings) {
        if let Some(member) = self.crew.of_mut(worker) {
            member.figures.learn(timings);
        }
    }

    fn medians(&self) -> Option<Medians> {
        let known: Vec<&Figures> = self
            .crew
            .members
            .iter()
            .map(|member| &member.figures)
            .filter(|figures| figures.steps >= LEAST_STEPS)
            .collect();
        if known.len() < 2 {
            return None;
        }
        let median = |of: &dyn Fn(&Figures) -> f64| {
            let mut values: Vec<f64> = known.iter().map(|figures| of(figures)).collect();
            values.sort_by(f64::total_cmp);
            values[(values.len() - 1) / 2]
        };
        Some(Medians {
            data: median(&|figures| figures.data),
            compute: median(&|figures| figures.compute),
            reduce: median(&|figures| figures.reduce),
            per_token: median(&|figures| figures.per_token),
        })
    }

    /// Members that are named, with their figures.
    pub(super) fn stragglers(&self) -> Vec<Straggler> {
        let Some(medians) = self.medians() else { return Vec::new() };
        let named = self.crew.members.iter().filter(|member| member.lost.is_none() && member.figures.named);
        named
            .map(|member| {
                let figures = &member.figures;
                Straggler {
                    worker: member.worker.clone(),
                    cause: cause(figures, &medians).unwrap_or("computing"),
                    compute: [figures.compute, medians.compute],
                    data: [figures.data, medians.data],
                    reduce: [figures.reduce, medians.reduce],
                    steps: figures.streak.max(STEPS),
                }
            })
            .collect()
    }
}

/// Why a member comes last, if it does.
fn cause(figures: &Figures, medians: &Medians) -> Option<&'static str> {
    // With figures a token, an uneven number of rows makes nobody slow.
    let (compute, usual) = if figures.per_token > 0.0 && medians.per_token > 0.0 {
        let tokens = figures.compute / figures.per_token;
        (figures.compute, medians.per_token * tokens)
    } else {
        (figures.compute, medians.compute)
    };
    let own = compute + figures.data;
    let others = usual + medians.data;
    if own <= SLOWER * others || own - others < NOISE_SECONDS {
        return None;
    }
    Some(if figures.data - medians.data > compute - usual { "data" } else { "computing" })
}

impl Machine {
    /// Looks at the crew's figures, once a step.
    pub(super) fn find_stragglers(&mut self, now: Moment, job: &mut Job, step: Step) {
        let Some(medians) = job.medians() else { return };
        let mut news = Vec::new();
        for member in &mut job.crew.members {
            let figures = &mut member.figures;
            if figures.steps < LEAST_STEPS || member.lost.is_some() {
                continue;
            }
            let cause = cause(figures, &medians);
            let turns = cause.is_some() != figures.named;
            figures.streak = match (turns, figures.named) {
                (true, false) => figures.streak + 1,
                (true, true) => figures.streak.saturating_sub(1),
                (false, false) => 0,
                (false, true) => (figures.streak + 1).max(STEPS),
            };
            if turns && !figures.named && figures.streak >= STEPS {
                figures.named = true;
                let text = format!(
                    "{} is slow at {}: computes {:.3} s a step (median {:.3}), waits {:.3} s for rows ({:.3}) and \
                     {:.3} s in the reduction ({:.3})",
                    member.worker,
                    cause.unwrap_or("computing"),
                    figures.compute,
                    medians.compute,
                    figures.data,
                    medians.data,
                    figures.reduce,
                    medians.reduce
                );
                news.push((member.worker.clone(), "straggler", text));
            } else if turns && figures.named && figures.streak == 0 {
                figures.named = false;
                let text = format!("{} keeps up again since step {step}", member.worker);
                news.push((member.worker.clone(), "straggler_over", text));
            }
        }
        for (worker, kind, text) in news {
            job.event(now, kind, text).worker = Some(worker);
            self.publish_event(job);
        }
    }
}
