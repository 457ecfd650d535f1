//! All jobs: at work, waiting in the order of their turn, ended.

use ratatui::{Frame, layout::Rect, style::Style, text::Line};
use shanty_proto::v1::JobSummary;

use super::{
    Theme, say,
    table::{plain, table},
    times::since,
};
use crate::{
    state::App,
    words::{is_over, state_name},
};

const HEADER: [&str; 9] = [" JOB", "STATE", "STEP", "LOSS", "CREW", "QUEUE", "OWNER", "AGE", "REASON"];

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, app: &App, theme: Theme) {
    let Some(jobs) = &app.jobs else {
        return say(frame, area, vec![Line::from("asks for the jobs…")]);
    };
    if jobs.is_empty() {
        let lines = ["no jobs yet", "", "shanty submit job.toml queues one"].map(Line::from);
        return say(frame, area, lines.to_vec());
    }
    let rows = jobs.iter().enumerate().map(|(place, job)| row(app, job, place == app.selected, theme));
    let mut lines = table(&HEADER, rows.collect(), area.width, theme);
    if let Some(line) = lines.get_mut(app.selected + 1) {
        line.style = theme.chosen();
    }
    let header = lines.remove(0);
    let height = usize::from(area.height).saturating_sub(1);
    // The cursor stays in sight.
    let skipped = (app.selected + 1).saturating_sub(height);
    let shown = std::iter::once(header).chain(lines.into_iter().skip(skipped));
    say(frame, area, shown.collect());
}

/// Members, and as many as are the job's by the rules of the queue, where those say a number.
fn crew(job: &JobSummary, over: bool) -> String {
    match job.share {
        _ if over => "-".to_owned(),
        u32::MAX => job.members.to_string(),
        share => format!("{}/{share}", job.members),
    }
}

fn row(app: &App, job: &JobSummary, chosen: bool, theme: Theme) -> Vec<(String, Style)> {
    let over = is_over(job.state());
    let queue = match job.place {
        Some(place) => format!("#{place} p{}", job.priority),
        None if over => "-".to_owned(),
        None => format!("p{}", job.priority),
    };
    vec![
        plain(format!("{}{}", if chosen { ">" } else { " " }, job.job_id)),
        (state_name(job.state()).to_owned(), theme.state(job.state())),
        plain(format!("{}/{}", job.step, job.steps)),
        plain(job.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"))),
        plain(crew(job, over)),
        plain(queue),
        plain(if job.owner.is_empty() { "-" } else { job.owner.as_str() }),
        plain(since(app.now, job.submitted_unix_ms)),
        plain(job.reason.as_str()),
    ]
}
