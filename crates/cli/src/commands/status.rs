//! `shanty status`: where a job stands, why, and who works on it.

use serde_json::{Value, json};
use shanty_proto::v1::{CrewHealth, JobStatus, Ledger, Member};

use crate::{
    client::{Client, Target, block_on},
    failure::{CommandResult, Exit},
    format,
    progress::{self, Reporter, is_over, phase_name, state_name},
    run::ending::end_of_job,
    ui::{Paint, Ui, paint},
    watch::Watcher,
};

/// Show where a job stands, why, and who works on it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty status shakespeare
  shanty status shakespeare --watch
  shanty status shakespeare --output json")]
pub(crate) struct Args {
    /// The job's id or name
    job: String,
    /// Follow it until it is over
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let (connection, job_id) = args.target.connect_for(&args.job).await?;
        let status = connection.client.job_status(&job_id).await?;
        let is_over = is_over(status.state());
        if !args.watch || is_over || connection.is_past() {
            ui.data(&object(&status), |_| render(&status, ui.color_on_stdout()))?;
            if connection.is_past() && !is_over {
                ui.note("nobody works on it: this is what the interrupted run left; `shanty resume` goes on with it");
            }
            // Who watches wants to know how it ended.
            return if args.watch && is_over { end_of_job(&status) } else { Ok(Exit::Done) };
        }
        follow(&connection.client, &job_id, ui).await
    })
}

/// Shows a job's progress until it is over, and how it ended.
pub(crate) async fn follow(client: &Client, job_id: &str, ui: &Ui) -> CommandResult<Exit> {
    let mut watcher = Watcher::new(client, job_id);
    let mut reporter = Reporter::new(ui);
    let over = tokio::select! {
        over = watcher.follow(&mut reporter) => over?,
        _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
    };
    reporter.finish()?;
    ui.data(&progress::finished(&over, elapsed_seconds(&over)), |_| render(&over, ui.color_on_stdout()))?;
    end_of_job(&over)
}

fn elapsed_seconds(status: &JobStatus) -> f64 {
    status.ended_unix_ms.saturating_sub(status.started_unix_ms) as f64 / 1000.0
}

/// What scripts see; the keys are a promise (DESIGN §5).
pub(crate) fn object(status: &JobStatus) -> Value {
    let ledger = status.ledger.unwrap_or_default();
    json!({
        "job": status.job_id,
        "state": state_name(status.state()),
        "reason": status.reason,
        "error_code": (!status.error_code.is_empty()).then_some(&status.error_code),
        "attempt": status.attempt,
        "generation": status.generation,
        "step": status.step,
        "steps": status.steps,
        "epoch": status.epoch,
        "loss": status.loss,
        "learning_rate": status.learning_rate,
        "grad_norm": status.gradient_norm,
        "tokens_per_second": status.tokens_per_second,
        "eta_seconds": status.eta_seconds,
        "members": status.members.iter().map(member_object).collect::<Vec<_>>(),
        "ledger": ledger_object(&ledger),
        "checkpoints": status.checkpoints.iter().map(|checkpoint| json!({
            "attempt": checkpoint.attempt, "step": checkpoint.step, "generation": checkpoint.generation,
            "path": checkpoint.path, "bytes": checkpoint.size_bytes,
        })).collect::<Vec<_>>(),
        "evaluations": status.evaluations.iter().map(|evaluation| json!({
            "step": evaluation.step, "loss": evaluation.loss, "tokens": evaluation.tokens,
        })).collect::<Vec<_>>(),
        "events": status.events.iter().map(|event| json!({
            "unix_ms": event.unix_ms, "kind": event.kind, "text": event.text, "worker": event.worker_id,
            "step": event.step, "detection_ms": event.detection_ms, "stall_ms": event.stall_ms,
        })).collect::<Vec<_>>(),
        "crew": crew_object(&status.crew.clone().unwrap_or_default()),
        "adapter": (!status.adapter.is_empty()).then_some(&status.adapter),
    })
}

fn crew_object(crew: &CrewHealth) -> Value {
    json!({
        "deadline_seconds": crew.deadline_seconds,
        "usual_step_seconds": crew.usual_step_seconds,
        "spares": crew.spares,
        "losses": crew.losses,
        "coordinator_restarts": crew.coordinator_restarts,
        "stragglers": crew.stragglers.iter().map(|slow| json!({
            "worker": slow.worker_id, "cause": slow.cause, "steps": slow.steps,
            "compute_seconds": slow.compute_seconds, "median_compute_seconds": slow.median_compute_seconds,
            "data_seconds": slow.data_seconds, "median_data_seconds": slow.median_data_seconds,
            "reduce_seconds": slow.reduce_seconds, "median_reduce_seconds": slow.median_reduce_seconds,
        })).collect::<Vec<_>>(),
        "recoveries": crew.recoveries.iter().map(|over| json!({
            "unix_ms": over.unix_ms, "cause": over.cause, "text": over.text,
            "worker": (!over.worker_id.is_empty()).then_some(&over.worker_id),
            "step": over.step, "generation": over.generation, "detection_ms": over.detection_ms,
            "stall_ms": over.stall_ms, "steps_lost": over.steps_lost, "rows_requeued": over.rows_requeued,
        })).collect::<Vec<_>>(),
    })
}

/// The crew in words: what it is measured by, who holds it up, and what it got over.
fn crew_lines(crew: &CrewHealth) -> Vec<String> {
    let mut lines = Vec::new();
    if let (Some(deadline), Some(usual)) = (crew.deadline_seconds, crew.usual_step_seconds) {
        lines.push(format!(
            "crew  hung after {deadline:.0} s without progress (usual step {usual:.2} s), {} lost so far, {} spare",
            crew.losses,
            crew.spares.len()
        ));
    }
    lines.extend(crew.stragglers.iter().map(|slow| {
        format!(
            "slow  {} at {}: computes {:.3} s a step (median {:.3}), waits for rows {:.3} s ({:.3}), in the reduction {:.3} s ({:.3})",
            slow.worker_id,
            slow.cause,
            slow.compute_seconds,
            slow.median_compute_seconds,
            slow.data_seconds,
            slow.median_data_seconds,
            slow.reduce_seconds,
            slow.median_reduce_seconds,
        )
    }));
    if let Some(over) = crew.recoveries.first() {
        let noticed = over.detection_ms.map_or(String::new(), |ms| format!("noticed after {ms:.0} ms, "));
        lines.push(format!(
            "recovered  {} times, last at step {} ({}): {noticed}stalled {:.0} ms, {} steps lost, {} rows requeued",
            crew.recoveries.len(),
            over.step,
            over.cause,
            over.stall_ms,
            over.steps_lost,
            over.rows_requeued
        ));
    }
    lines
}

fn member_object(member: &Member) -> Value {
    json!({
        "worker": member.worker_id, "host": member.host, "pid": member.pid, "device": member.device,
        "rank": member.rank, "phase": phase_name(member.phase()), "step": member.step,
        "beat_age_seconds": member.beat_age_seconds,
        "reason": (!member.reason.is_empty()).then_some(&member.reason),
        "spare": member.spare, "draining": member.draining,
    })
}

fn ledger_object(ledger: &Ledger) -> Value {
    json!({
        "leased": ledger.leased, "committed": ledger.committed, "requeued": ledger.requeued,
        "skipped": ledger.skipped, "recomputed": ledger.recomputed, "remaining": ledger.remaining,
        "duplicates": ledger.duplicates,
    })
}

/// What people see.
pub(crate) fn render(status: &JobStatus, color: bool) -> String {
    let mut lines = vec![format!(
        "{}  {}{}",
        paint(color, Paint::Bold, &status.job_id),
        state_name(status.state()),
        if status.reason.is_empty() { String::new() } else { format!(": {}", status.reason) }
    )];
    let mut numbers = vec![
        format!("step {}/{}", status.step, status.steps),
        format!("epoch {:.2}", status.epoch),
        format!("attempt {}", status.attempt),
        format!("generation {}", status.generation),
    ];
    numbers.extend(status.loss.map(|loss| format!("loss {loss:.4}")));
    numbers.extend(status.learning_rate.map(|rate| format!("learning rate {rate:.2e}")));
    if !is_over(status.state()) {
        numbers.push(format!("{:.0} tokens/s", status.tokens_per_second));
        numbers.extend(status.eta_seconds.map(|eta| format!("ETA {}", format::seconds(eta))));
    }
    lines.push(numbers.join("  "));
    if let Some(ledger) = &status.ledger {
        lines.push(format!(
            "rows  {} committed, {} leased, {} remaining, {} requeued, {} recomputed, {} skipped, {} duplicates",
            ledger.committed,
            ledger.leased,
            ledger.remaining,
            ledger.requeued,
            ledger.recomputed,
            ledger.skipped,
            ledger.duplicates
        ));
    }
    if let Some(crew) = &status.crew {
        lines.extend(crew_lines(crew));
    }
    for evaluation in &status.evaluations {
        lines.push(format!("eval  step {}: held-out loss {:.4}", evaluation.step, evaluation.loss));
    }
    if let Some(newest) = status.checkpoints.iter().max_by_key(|one| (one.step, one.attempt)) {
        lines.push(format!("{} checkpoints, the newest of step {}", status.checkpoints.len(), newest.step));
    }
    if !status.adapter.is_empty() {
        lines.push(format!("adapter  {}", status.adapter));
    }
    if !status.members.is_empty() {
        lines.push(String::new());
        lines.push(members(&status.members));
    }
    if !status.events.is_empty() {
        lines.push(String::new());
        lines.extend(status.events.iter().map(|event| {
            let kind = paint(color, Paint::Cyan, &event.kind);
            format!("step {:>5}  {kind}  {}", event.step, event.text)
        }));
    }
    lines.join("\n")
}

fn members(members: &[Member]) -> String {
    let rows: Vec<Vec<String>> = members
        .iter()
        .map(|member| {
            vec![
                member.rank.map_or("-".to_owned(), |rank| rank.to_string()),
                member.worker_id.clone(),
                format!("{}:{}", member.host, member.pid),
                member.device.clone(),
                phase_name(member.phase()).to_owned(),
                member.step.to_string(),
                member.reason.clone(),
            ]
        })
        .collect();
    format::table(&["RANK", "WORKER", "PROCESS", "DEVICE", "PHASE", "STEP", "REASON"], &rows)
}
