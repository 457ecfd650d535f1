//! What happened, the newest last.

use ratatui::{
    Frame,
    layout::Rect,
    text::{Line, Span},
};
use shanty_proto::v1::{Event, LogLine};

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

/// As many lines as there is room for, up to the newest but `scroll`: each event, below it what a lost worker said last.
fn newest(job: &Job, room: usize, scroll: usize, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = Vec::new();
    // From the newest back: a long history is not drawn for its end.
    for event in job.events.iter().rev() {
        if lines.len() >= room + scroll {
            break;
        }
        lines.extend(event.log.iter().rev().map(|said| said_line(said, width, theme)));
        lines.push(line(event, width, theme));
    }
    let skipped = scroll.min(lines.len().saturating_sub(room));
    let mut shown: Vec<Line<'static>> = lines.into_iter().skip(skipped).take(room).collect();
    shown.reverse();
    shown
}

fn said_line(said: &LogLine, width: u16, theme: Theme) -> Line<'static> {
    let head = format!("{}    it said  ", clock(said.unix_ms));
    let level = format!("{:<5} ", said.level);
    let room = usize::from(width).saturating_sub(head.len() + level.len());
    Line::from(vec![
        Span::styled(head, theme.faint()),
        Span::styled(level, theme.level(&said.level)),
        Span::styled(cut(&theme.text(&said.text), room, theme), theme.faint()),
    ])
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
