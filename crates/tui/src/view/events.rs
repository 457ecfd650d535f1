//! What happened, the newest last.

use ratatui::{
    Frame,
    layout::Rect,
    text::{Line, Span},
};
use shanty_proto::v1::Event;

use super::{
    Theme, say,
    table::cut,
    times::{clock, milliseconds},
};
use crate::state::{App, Job};

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, app: &App, job: &Job, theme: Theme) {
    if job.events.is_empty() {
        return say(frame, area, vec![Line::from("nothing happened yet")]);
    }
    say(frame, area, newest(job, usize::from(area.height), app.scroll, area.width, theme));
}

/// As many as there is room for, up to the newest but `scroll`.
pub(super) fn newest(job: &Job, room: usize, scroll: usize, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let end = job.events.len() - scroll.min(job.events.len().saturating_sub(room));
    let start = end.saturating_sub(room);
    job.events.range(start..end).map(|event| line(event, width, theme)).collect()
}

fn line(event: &Event, width: u16, theme: Theme) -> Line<'static> {
    let style = match event.kind.as_str() {
        "member_lost" | "failed" => theme.bad(),
        "warning" | "damaged_checkpoint" | "checkpoint_damaged" | "checkpoint_failed" => theme.warning(),
        "recovered" | "member_joined" => theme.good(),
        _ => theme.faint(),
    };
    let mut text = event.text.clone();
    if let Some(detection) = event.detection_ms {
        text.push_str(&format!(" (noticed in {})", milliseconds(detection)));
    }
    if let Some(stall) = event.stall_ms {
        text.push_str(&format!(" (stalled {})", milliseconds(stall)));
    }
    let head = format!("{}  {:>6}  ", clock(event.unix_ms), event.step);
    let kind = format!("{:<14} ", event.kind);
    let room = usize::from(width).saturating_sub(head.len() + kind.len());
    Line::from(vec![
        Span::raw(head),
        Span::styled(kind, style),
        Span::raw(cut(&theme.text(&text), room, theme)),
    ])
}
