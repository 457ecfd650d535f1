//! A little of everything, the most important first: the job, its curves, who works, rows, checkpoints, recoveries, logs.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};
use shanty_proto::v1::{JobStatus, Ledger};

use super::{
    Theme,
    chart::{self, Chart},
    checkpoints, logs, members, recoveries, say,
    table::cut,
};
use crate::{
    format,
    state::{App, Job},
    words::{is_over, state_name},
};

/// Lines of a chart, at least and at most.
const CHART: (u16, u16) = (5, 20);
/// Lines of log that are left room for, where there is some.
const LOG: u16 = 8;

pub(super) fn draw(
    frame: &mut Frame<'_>,
    area: Rect,
    app: &App,
    job: &Job,
    status: &JobStatus,
    theme: Theme,
) {
    let head = numbers(status, area.width, theme);
    let crew = crew_lines(app, job, status, area, theme);
    let foot = facts(app, status, area.width, theme);
    let fixed = (head.len() + crew.len() + foot.len()) as u16;
    let charts = area.height.saturating_sub(fixed + LOG.min(area.height / 10)).clamp(CHART.0, CHART.1);
    let [top, middle, below, bottom, rest] = Layout::vertical([
        Constraint::Length(head.len() as u16),
        Constraint::Length(charts),
        Constraint::Length(crew.len() as u16),
        Constraint::Length(foot.len() as u16),
        Constraint::Min(0),
    ])
    .areas(area);
    say(frame, top, head);
    curves(frame, middle, job, status, theme);
    say(frame, below, crew);
    say(frame, bottom, foot);
    say(frame, rest, logs::newest(app, job, usize::from(rest.height), rest.width, theme));
}

/// State and reason, how far it is, what the last step was like, how much of the time was of use.
fn numbers(status: &JobStatus, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let state = state_name(status.state());
    let room = usize::from(width).saturating_sub(state.len() + 2);
    let mut lines = vec![Line::from(vec![
        Span::styled(state, theme.state(status.state()).patch(theme.strong())),
        Span::raw(if status.reason.is_empty() { "" } else { ": " }),
        Span::raw(cut(&theme.text(&status.reason), room, theme)),
    ])];
    if let Some(error) = &status.error {
        let text = format!("{}: {}", error.code, error.message);
        lines.push(Line::from(Span::styled(cut(&theme.text(&text), usize::from(width), theme), theme.bad())));
    }
    let mut far = format!(
        "step {}/{}  {}  {:.0} %  epoch {:.2}",
        status.step,
        status.steps,
        bar(status.step, status.steps, theme),
        100.0 * status.step as f64 / status.steps.max(1) as f64,
        status.epoch
    );
    if !is_over(status.state()) {
        let eta = status.eta_seconds.map_or("unknown".to_owned(), format::seconds);
        far.push_str(&format!("  ETA {eta}"));
    }
    lines.push(Line::from(far));
    // Of what does not fit, the end is the least missed.
    let mut last = Vec::new();
    last.extend(status.loss.map(|loss| format!("loss {loss:.4}")));
    last.extend(status.evaluations.last().map(|it| format!("held-out {:.4} ({})", it.loss, it.step)));
    last.push(format!("{} tokens/s", format::count(status.tokens_per_second.max(0.0).round() as u64)));
    last.extend(status.learning_rate.map(|rate| format!("rate {rate:.1e}")));
    last.extend(status.gradient_norm.map(|norm| format!("norm {norm:.3}")));
    lines.push(Line::from(last.join("  ")));
    lines.push(Line::from(goodput(status)));
    if !status.adapter.is_empty() {
        lines.push(Line::from(theme.text(&format!("adapter {}", status.adapter))));
    }
    lines
}

/// How much of the time since the start went into steps that count.
fn goodput(status: &JobStatus) -> String {
    let place = format!("attempt {}, generation {}", status.attempt, status.generation);
    let Some(it) = status.goodput.filter(|it| it.elapsed_seconds > 0.0) else {
        return format!("{place}, nothing trained yet");
    };
    format!(
        "goodput {:.1} %  stalled {}  recomputed {}  {place}",
        (100.0 * it.productive_seconds / it.elapsed_seconds).clamp(0.0, 100.0),
        format::seconds(it.stalled_seconds),
        format::seconds(it.recomputed_seconds)
    )
}

fn bar(done: u64, all: u64, theme: Theme) -> String {
    const WIDTH: usize = 20;
    let full = (WIDTH as f64 * done as f64 / all.max(1) as f64).floor() as usize;
    let full = full.min(WIDTH);
    let (on, off) = (theme.letter("━", "="), theme.letter("─", "-"));
    format!("{}{}", on.repeat(full), off.repeat(WIDTH - full))
}

fn curves(frame: &mut Frame<'_>, area: Rect, job: &Job, status: &JobStatus, theme: Theme) {
    let [left, right] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).spacing(1).areas(area);
    let losses: Vec<(f64, f64)> =
        job.history.steps().filter(|step| !step.skipped).map(|step| (step.step as f64, step.loss)).collect();
    let rates: Vec<(f64, f64)> =
        job.history.steps().map(|step| (step.step as f64, step.tokens_per_second)).collect();
    let loss = status.loss.map_or("loss".to_owned(), |loss| format!("loss {loss:.4}"));
    let tokens = format!("tokens/s {}", format::count(status.tokens_per_second.max(0.0).round() as u64));
    chart::draw(
        frame,
        left,
        &Chart { title: loss, points: &losses, label: |loss| format!("{loss:.3}") },
        theme,
    );
    let label = |rate: f64| format::count(rate.max(0.0).round() as u64);
    chart::draw(frame, right, &Chart { title: tokens, points: &rates, label }, theme);
}

/// Members, as many as leave room for the rest.
fn crew_lines(app: &App, job: &Job, status: &JobStatus, area: Rect, theme: Theme) -> Vec<Line<'static>> {
    let mut lines = vec![members::summary(status, theme)];
    let rows = members::rows(app, job, status, area.width, theme);
    let room = usize::from(area.height).saturating_sub(15).max(3);
    let over = rows.len().saturating_sub(room);
    lines.extend(rows.into_iter().take(room));
    if over > 0 {
        lines.push(Line::from(Span::styled(format!("and {over} more: 2 shows all"), theme.faint())));
    }
    lines
}

fn facts(app: &App, status: &JobStatus, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let line = |name: &'static str, text: String| {
        let room = usize::from(width).saturating_sub(12);
        Line::from(vec![
            Span::styled(format!("{name:<12}"), theme.faint()),
            Span::raw(cut(&theme.text(&text), room, theme)),
        ])
    };
    let ledger = status.ledger.unwrap_or_default();
    let mut rows = line("rows", rows_of(&ledger));
    if ledger.duplicates > 0 {
        rows = rows.style(theme.bad());
    }
    vec![
        line("recoveries", recoveries::newest(status)),
        rows,
        line("checkpoint", checkpoints::newest(app, status)),
    ]
}

fn rows_of(ledger: &Ledger) -> String {
    format!(
        "{} committed, {} leased, {} left, {} requeued, {} again, {} double, {} skipped",
        format::count(ledger.committed),
        format::count(ledger.leased),
        format::count(ledger.remaining),
        format::count(ledger.requeued),
        format::count(ledger.recomputed),
        format::count(ledger.duplicates),
        format::count(ledger.skipped)
    )
}
