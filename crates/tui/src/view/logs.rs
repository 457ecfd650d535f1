//! What the workers say, the newest last.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};
use shanty_proto::v1::LogLine;

use super::{Theme, members::short_id, say, table::cut, times::clock};
use crate::state::{App, Job};

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, app: &App, job: &Job, theme: Theme) {
    let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    let lines: Vec<&LogLine> = job.lines(app.level, &app.filter).collect();
    let whose = job.worker.as_deref().map_or("all workers".to_owned(), |worker| format!("worker {worker}"));
    let mut choice = format!("{} lines of {whose}, {} and above", lines.len(), app.level.word());
    if !app.filter.is_empty() {
        choice.push_str(&format!(", with \"{}\"", app.filter));
    }
    say(frame, head, vec![Line::from(Span::styled(theme.text(&choice), theme.faint()))]);
    let room = usize::from(body.height);
    let end = lines.len() - app.scroll.min(lines.len().saturating_sub(room));
    let start = end.saturating_sub(room);
    say(frame, body, lines[start..end].iter().map(|one| line(one, body.width, theme)).collect());
}

/// The newest that are worth a look on a page of other things.
pub(super) fn newest(app: &App, job: &Job, room: usize, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let mut lines: Vec<&LogLine> = job.lines(app.level, "").rev().take(room).collect();
    lines.reverse();
    lines.into_iter().map(|one| line(one, width, theme)).collect()
}

fn line(one: &LogLine, width: u16, theme: Theme) -> Line<'static> {
    let head = format!("{} {} ", clock(one.unix_ms), short_id(&one.worker_id));
    let level = format!("{:<5} ", one.level);
    let room = usize::from(width).saturating_sub(head.chars().count() + level.chars().count());
    Line::from(vec![
        Span::styled(head, theme.faint()),
        Span::styled(level, theme.level(&one.level)),
        Span::raw(cut(&theme.text(&one.text), room, theme)),
    ])
}
