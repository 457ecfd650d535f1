//! Members that beat and get nowhere.
//!
//! A collective holds all members up until the last one comes, so the one that hangs is not the one that waits longest:
//! it is the one that is at work by itself, or does not begin, and makes no progress. Where nobody is, the collective
//! itself hangs.

use shanty_proto::WorkerId;

use super::{
    Machine,
    event::{MemberPhase, Moment},
    job::{Cause, Job},
};

impl Machine {
    /// Calls members lost that have made no progress for longer than the deadline; leaves a generation whose collective
    /// hangs.
    pub(super) fn lose_hung(&mut self, now: Moment, job: &mut Job) {
        if !job.is_stepping() {
            return;
        }
        let begun_from = job.begun_from();
        // The adapter's writing is bounded by the store's own time-outs: it is large, and nothing comes after it.
        let is_over = job.watermark >= job.steps();
        let still = |since: std::time::Duration| now.monotonic.saturating_sub(since);
        let (mut hung, mut staying, mut all_wait, mut deadline) = (Vec::new(), 0, true, None);
        let mut last_progress = std::time::Duration::ZERO;
        // The furthest that somebody waits at in a reduction.
        let reduces = job
            .crew
            .staying()
            .filter(|member| member.phase == MemberPhase::Reducing)
            .map(|member| member.step)
            .max();
        for member in job.crew.staying() {
            if !member.attached {
                return;
            }
            staying += 1;
            last_progress = last_progress.max(member.progressed);
            let own = job.health.pace.deadline_of(member.is_warm(begun_from));
            deadline = deadline.max(Some(own));
            // A store may be slow; what it is waited for is bounded all the same.
            let own = if member.phase == MemberPhase::Writing {
                job.health.pace.cold_deadline().max(own * 10)
            } else {
                own
            };
            all_wait &= matches!(member.phase, MemberPhase::Reducing | MemberPhase::Waiting);
            let is_its_own = member.phase.is_its_own() && !(is_over && member.phase == MemberPhase::Writing);
            let holds_up = is_its_own
                || member.phase == MemberPhase::Waiting && reduces.is_some_and(|step| member.step <= step);
            if holds_up && still(member.progressed) > own {
                hung.push((member.worker.clone(), still(member.progressed), own, member.phase));
            }
        }
        if !hung.is_empty() && hung.len() < staying {
            for (worker, silent, own, phase) in hung {
                let reason = format!(
                    "no progress for {:.1} s while it was {} (deadline {:.1} s), though its process beats",
                    silent.as_secs_f64(),
                    in_words(phase),
                    own.as_secs_f64()
                );
                if let Some(member) = job.crew.of_mut(&worker) {
                    member.hung = true;
                }
                self.drop_member(now, job, &worker, "hung", &reason, Some(silent));
            }
            return;
        }
        let nobody = !hung.is_empty()
            || reduces.is_some() && all_wait && deadline.is_some_and(|limit| still(last_progress) > limit);
        if staying == 0 || !nobody {
            return;
        }
        // Nobody is to blame by what it does: all leave, and who does not answer is lost then.
        let silent = still(last_progress);
        let least = job.crew.staying().map(|member| member.step).min().unwrap_or_default();
        let behind: Vec<&WorkerId> =
            job.crew.staying().filter(|member| member.step == least).map(|member| &member.worker).collect();
        let mut text = format!(
            "the collective of step {} hangs: no progress for {:.1} s",
            least.next(),
            silent.as_secs_f64()
        );
        if behind.len() < staying {
            let names: Vec<&str> = behind.iter().map(|worker| worker.as_str()).collect();
            text += &format!("; {} did not finish it", names.join(", "));
        }
        self.note(now, job, "hung", text.clone());
        let cause = Cause { detection_ms: Some(silent.as_secs_f64() * 1e3), ..Cause::new("hung", text) };
        self.start_leaving(now, job, cause);
    }

    /// Tells people of a deadline that was just learnt, or has changed by much.
    pub(super) fn tell_deadline(&mut self, now: Moment, job: &mut Job) {
        let Some(deadline) = job.health.pace.deadline() else { return };
        let known = job.health.pace.told.map_or(0.0, |told| told.as_secs_f64());
        let seconds = deadline.as_secs_f64();
        if (seconds - known).abs() <= 0.5 * known {
            return;
        }
        job.health.pace.told = Some(deadline);
        let usual = job.health.pace.usual().unwrap_or_default();
        let text = format!(
            "a member without progress for {seconds:.1} s is taken for hung; the usual step takes {usual:.2} s"
        );
        self.note(now, job, "deadline", text);
    }
}

fn in_words(phase: MemberPhase) -> &'static str {
    match phase {
        MemberPhase::Computing => "computing",
        MemberPhase::Evaluating => "evaluating",
        MemberPhase::Forming => "connecting or taking over state",
        MemberPhase::Writing => "waiting for a checkpoint to be written",
        MemberPhase::Waiting => "waiting for rows or for its credit",
        _ => "at work",
    }
}
