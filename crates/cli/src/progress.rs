//! A job as it goes along: a calm live region, plain lines where there is no terminal, or JSON lines.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use shanty_proto::v1::{Checkpoint, Evaluation, Event, JobState, JobStatus, Member, MemberPhase, StepRecord};

use crate::{
    failure::CommandResult,
    format,
    ui::{Paint, Ui, paint},
};

/// Without a terminal, step lines come no more often than this.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// The name of a state, as scripts and people see it.
pub(crate) fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Unspecified => "unknown",
        JobState::Queued => "queued",
        JobState::Preparing => "preparing",
        JobState::Forming => "forming",
        JobState::Running => "running",
        JobState::Recovering => "recovering",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// Whether a job in this state does nothing more by itself.
pub(crate) fn is_over(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// The name of a member's phase.
pub(crate) fn phase_name(phase: MemberPhase) -> &'static str {
    match phase {
        MemberPhase::Unspecified => "unknown",
        MemberPhase::Idle => "idle",
        MemberPhase::Loading => "loading",
        MemberPhase::Ready => "ready",
        MemberPhase::Forming => "forming",
        MemberPhase::Computing => "computing",
        MemberPhase::Reducing => "reducing",
        MemberPhase::Evaluating => "evaluating",
        MemberPhase::Waiting => "waiting",
        MemberPhase::Lost => "lost",
        MemberPhase::Writing => "writing",
    }
}

/// Shows a job as it goes along.
pub(crate) struct Reporter {
    ui: Ui,
    live: Option<Live>,
    last_line: Option<Instant>,
    steps: u64,
    last_state: (JobState, String),
    /// Losses of workers whose stall is not known yet, by worker.
    unrecovered: BTreeMap<String, Event>,
}

struct Live {
    region: MultiProgress,
    bar: ProgressBar,
    crew: ProgressBar,
}

impl Reporter {
    pub(crate) fn new(ui: &Ui) -> Self {
        Self {
            ui: *ui,
            live: ui.is_live().then(Live::new),
            last_line: None,
            steps: 0,
            last_state: (JobState::Unspecified, String::new()),
            unrecovered: BTreeMap::new(),
        }
    }

    /// Says something above the live region.
    pub(crate) fn note(&self, text: &str) {
        match &self.live {
            // A region that cannot be drawn leaves nobody to read the note either.
            Some(live) => drop(live.region.println(text)),
            None => self.ui.note(text),
        }
    }

    /// State, reason and members changed.
    pub(crate) fn status(&mut self, status: &JobStatus) {
        self.steps = status.steps;
        let state = status.state();
        if let Some(live) = &self.live {
            live.bar.set_length(status.steps.max(1));
            live.bar.set_position(status.step);
            live.crew.set_message(crew_line(status));
        }
        let now = (state, status.reason.clone());
        if now != self.last_state && self.live.is_none() && !is_over(state) {
            self.ui.note(state_line(state, &status.reason));
        }
        self.last_state = now;
    }

    /// A step was committed.
    pub(crate) fn step(&mut self, step: &StepRecord) -> CommandResult<()> {
        if self.ui.is_json() {
            return self.ui.json(&json!({
                "event": "step", "step": step.step, "loss": step.loss, "learning_rate": step.learning_rate,
                "grad_norm": step.gradient_norm, "tokens": step.tokens,
                "tokens_per_second": step.tokens_per_second, "workers": step.workers,
            }));
        }
        let rate = format::count(step.tokens_per_second.max(0.0).round() as u64);
        if let Some(live) = &self.live {
            live.bar.set_position(step.step);
            live.bar.set_message(format!("loss {:.4}  {rate} tokens/s", step.loss));
            return Ok(());
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL);
        if due || step.step == self.steps {
            self.last_line = Some(Instant::now());
            let percent = 100 * step.step / self.steps.max(1);
            self.ui.note(format!(
                "step {:>5}/{} {percent:>3} %  loss {:.4}  {rate} tokens/s  {} workers",
                step.step, self.steps, step.loss, step.workers
            ));
        }
        Ok(())
    }

    /// The held-out data was evaluated.
    pub(crate) fn evaluation(&self, evaluation: &Evaluation) -> CommandResult<()> {
        if self.ui.is_json() {
            return self.ui.json(&json!({
                "event": "eval", "step": evaluation.step, "loss": evaluation.loss, "tokens": evaluation.tokens,
            }));
        }
        self.note(&format!(
            "{} held-out loss after step {}: {:.4} ({} tokens)",
            self.mark("eval", Paint::Cyan),
            evaluation.step,
            evaluation.loss,
            format::count(evaluation.tokens)
        ));
        Ok(())
    }

    /// A checkpoint exists.
    pub(crate) fn checkpoint(&self, checkpoint: &Checkpoint) -> CommandResult<()> {
        if self.ui.is_json() {
            return self.ui.json(&json!({
                "event": "checkpoint", "step": checkpoint.step, "attempt": checkpoint.attempt,
                "path": checkpoint.path, "bytes": checkpoint.size_bytes, "seconds": checkpoint.seconds,
            }));
        }
        self.note(&format!(
            "{} step {} is safe ({}, {})",
            self.mark("checkpoint", Paint::Green),
            checkpoint.step,
            format::bytes(checkpoint.size_bytes),
            format::seconds(checkpoint.seconds)
        ));
        Ok(())
    }

    /// Something happened to the job.
    pub(crate) fn event(&mut self, event: &Event) -> CommandResult<()> {
        match event.kind.as_str() {
            "member_lost" => {
                if event.stall_ms.is_some() {
                    self.member_lost(event)?;
                } else {
                    self.unrecovered.insert(event.worker_id.clone(), event.clone());
                }
                self.notice("worker lost", Paint::Red, event);
            }
            "recovered" => {
                self.settle(event.stall_ms)?;
                self.notice("recovered", Paint::Green, event);
            }
            "member_joined" => self.notice("joined", Paint::Cyan, event),
            "damaged_checkpoint" | "checkpoint_damaged" | "warning" => {
                self.notice("warning", Paint::Yellow, event);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the live region away and says what was not said yet.
    pub(crate) fn finish(&mut self) -> CommandResult<()> {
        if let Some(live) = self.live.take() {
            live.bar.finish_and_clear();
            live.crew.finish_and_clear();
        }
        self.settle(None)
    }

    /// Prints losses that waited for their stall to be known.
    fn settle(&mut self, stall_ms: Option<f64>) -> CommandResult<()> {
        for (_, mut event) in std::mem::take(&mut self.unrecovered) {
            event.stall_ms = stall_ms;
            self.member_lost(&event)?;
        }
        Ok(())
    }

    fn member_lost(&self, event: &Event) -> CommandResult<()> {
        if !self.ui.is_json() {
            return Ok(());
        }
        self.ui.json(&json!({
            "event": "member_lost", "worker": event.worker_id, "reason": event.text, "step": event.step,
            "detection_ms": event.detection_ms, "stall_ms": event.stall_ms,
        }))
    }

    fn notice(&self, word: &str, tint: Paint, event: &Event) {
        self.note(&format!("{} {}{}", self.mark(word, tint), event.text, delays(event)));
    }

    fn mark(&self, word: &str, tint: Paint) -> String {
        paint(self.ui.color_on_stderr(), tint, &format!("{word}:"))
    }
}

impl Live {
    fn new() -> Self {
        let region = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8));
        let bar = region.add(ProgressBar::new(1));
        let crew = region.add(ProgressBar::new_spinner());
        bar.set_style(
            ProgressStyle::with_template("step {pos}/{len} {bar:24} {percent:>3} %  {msg}  ETA {eta}")
                .expect("the template is well formed")
                .progress_chars("━╸ "),
        );
        crew.set_style(ProgressStyle::with_template("{wide_msg}").expect("the template is well formed"));
        Self { region, bar, crew }
    }
}

/// How long it took to notice, and how long nothing went on.
fn delays(event: &Event) -> String {
    let detection = event.detection_ms.map(|ms| format!("noticed after {ms:.0} ms"));
    let stall = event.stall_ms.map(|ms| format!("stalled {ms:.0} ms"));
    let parts: Vec<String> = detection.into_iter().chain(stall).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

fn state_line(state: JobState, reason: &str) -> String {
    if reason.is_empty() { state_name(state).to_owned() } else { format!("{}: {reason}", state_name(state)) }
}

/// `running: all members compute · 2 workers: 0 computing, 1 reducing`
fn crew_line(status: &JobStatus) -> String {
    let members: Vec<&Member> =
        status.members.iter().filter(|member| member.phase() != MemberPhase::Lost).collect();
    let crew: Vec<String> = members
        .iter()
        .map(|member| {
            let name = member.rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
            format!("{name} {}", phase_name(member.phase()))
        })
        .collect();
    let state = state_line(status.state(), &status.reason);
    match crew.len() {
        0 => state,
        1 => format!("{state} · 1 worker: {}", crew[0]),
        workers => format!("{state} · {workers} workers: {}", crew.join(", ")),
    }
}

/// The last line of `run` and `resume` for scripts.
pub(crate) fn finished(status: &JobStatus, seconds: f64) -> Value {
    let (before, after) = evaluations(status);
    json!({
        "event": "finished", "job": status.job_id, "state": state_name(status.state()), "reason": status.reason,
        "steps": status.step, "eval_loss_before": before, "eval_loss_after": after,
        "adapter": (!status.adapter.is_empty()).then_some(&status.adapter), "seconds": seconds,
    })
}

/// Held-out loss before the first step and after the last one, where they were measured.
pub(crate) fn evaluations(status: &JobStatus) -> (Option<f64>, Option<f64>) {
    let at = |step: u64| status.evaluations.iter().rev().find(|evaluation| evaluation.step == step);
    let after = if status.step > 0 { at(status.step) } else { None };
    (at(0).map(|evaluation| evaluation.loss), after.map(|evaluation| evaluation.loss))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> JobStatus {
        let member = |rank, phase: MemberPhase| Member { rank, phase: phase.into(), ..Member::default() };
        JobStatus {
            job_id: "pirate-1".to_owned(),
            state: JobState::Running.into(),
            reason: "all hands".to_owned(),
            step: 4,
            steps: 8,
            members: vec![
                member(Some(0), MemberPhase::Computing),
                member(Some(1), MemberPhase::Lost),
                member(None, MemberPhase::Loading),
            ],
            evaluations: vec![
                Evaluation { step: 0, loss: 6.0, tokens: 10 },
                Evaluation { step: 4, loss: 4.0, tokens: 10 },
            ],
            ..JobStatus::default()
        }
    }

    #[test]
    fn crew_line_names_those_who_live() {
        assert_eq!(crew_line(&status()), "running: all hands · 2 workers: 0 computing, - loading");
    }

    #[test]
    fn finished_line_has_the_promised_keys() {
        let line = finished(&status(), 1.5);
        let keys: Vec<&str> = line.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "event",
                "job",
                "state",
                "reason",
                "steps",
                "eval_loss_before",
                "eval_loss_after",
                "adapter",
                "seconds"
            ]
        );
        assert_eq!(line["eval_loss_before"], 6.0);
        assert_eq!(line["eval_loss_after"], 4.0);
        assert!(line["adapter"].is_null());
    }

    #[test]
    fn delays_are_told_where_known() {
        let mut event = Event::default();
        assert_eq!(delays(&event), "");
        event.detection_ms = Some(120.4);
        assert_eq!(delays(&event), " (noticed after 120 ms)");
        event.stall_ms = Some(900.0);
        assert_eq!(delays(&event), " (noticed after 120 ms, stalled 900 ms)");
    }
}
