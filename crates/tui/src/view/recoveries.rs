//! What the job got over: what happened, how soon it was noticed, how long nothing went on, what was lost.

use ratatui::{Frame, layout::Rect, text::Line};
use shanty_proto::v1::{JobStatus, Recovery};

use super::{
    Theme,
    members::short_id,
    say, say_from,
    table::{plain, table},
    times::{clock, milliseconds},
};
use crate::state::App;

const HEADER: [&str; 9] = ["TIME", "STEP", "CAUSE", "NOTICED", "STALL", "LOST", "ROWS", "WORKER", "WHAT"];

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, app: &App, status: &JobStatus, theme: Theme) {
    let recoveries = status.crew.as_ref().map(|crew| crew.recoveries.as_slice()).unwrap_or_default();
    if recoveries.is_empty() {
        return say(frame, area, vec![Line::from("nothing to get over so far")]);
    }
    let rows = recoveries.iter().map(|one| row(one, theme)).collect();
    say_from(frame, area, table(&HEADER, rows, area.width, theme), app.scroll);
}

fn row(one: &Recovery, theme: Theme) -> Vec<super::table::Cell> {
    let lost = if one.steps_lost == 0 { plain("0") } else { (one.steps_lost.to_string(), theme.bad()) };
    vec![
        plain(clock(one.unix_ms)),
        plain(one.step.to_string()),
        plain(one.cause.as_str()),
        plain(one.detection_ms.map_or("-".to_owned(), milliseconds)),
        plain(milliseconds(one.stall_ms)),
        lost,
        plain(one.rows_requeued.to_string()),
        plain(if one.worker_id.is_empty() { "-".to_owned() } else { short_id(&one.worker_id) }),
        plain(one.text.as_str()),
    ]
}

/// The newest, in one line.
pub(super) fn newest(status: &JobStatus) -> String {
    let Some(crew) = &status.crew else { return "nothing is known".to_owned() };
    let Some(newest) = crew.recoveries.first() else { return "none".to_owned() };
    let noticed =
        newest.detection_ms.map_or(String::new(), |ms| format!("noticed in {}, ", milliseconds(ms)));
    format!(
        "{}, newest at step {}: {}, {noticed}stalled {}, {} steps lost, {} rows requeued",
        crew.recoveries.len(),
        newest.step,
        newest.cause,
        milliseconds(newest.stall_ms),
        newest.steps_lost,
        newest.rows_requeued
    )
}
