//! What the job could go on from.

use ratatui::{Frame, layout::Rect, text::Line};
use shanty_proto::v1::{Checkpoint, JobStatus};

use super::{
    Theme, say, say_from,
    table::{Cell, plain, table},
    times::ago,
};
use crate::{format, state::App};

const HEADER: [&str; 7] = ["STEP", "AGE", "SIZE", "WRITTEN IN", "LOSS", "ATTEMPT", "PATH"];

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, app: &App, status: &JobStatus, theme: Theme) {
    let checkpoints = sorted(status);
    if checkpoints.is_empty() {
        return say(
            frame,
            area,
            vec![Line::from("none is written yet: after a loss of all workers the job begins anew")],
        );
    }
    let rows = checkpoints.into_iter().map(|one| row(app, one)).collect();
    say_from(frame, area, table(&HEADER, rows, area.width, theme), app.scroll);
}

/// Newest first. Those whose manifest is good are told of alone: whoever reads one checks its hashes.
fn sorted(status: &JobStatus) -> Vec<&Checkpoint> {
    let mut checkpoints: Vec<&Checkpoint> = status.checkpoints.iter().collect();
    checkpoints.sort_by_key(|one| std::cmp::Reverse((one.attempt, one.step)));
    checkpoints
}

fn row(app: &App, one: &Checkpoint) -> Vec<Cell> {
    vec![
        plain(one.step.to_string()),
        plain(ago(app.now, one.written_unix_ms)),
        plain(format::bytes(one.size_bytes)),
        plain(format::seconds(one.seconds)),
        plain(one.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"))),
        plain(one.attempt.to_string()),
        plain(one.path.as_str()),
    ]
}

/// The newest, in one line.
pub(super) fn newest(app: &App, status: &JobStatus) -> String {
    match sorted(status).first() {
        None => "none yet".to_owned(),
        Some(one) => format!(
            "step {} is safe, {}, {}, written in {} ({} kept)",
            one.step,
            ago(app.now, one.written_unix_ms),
            format::bytes(one.size_bytes),
            format::seconds(one.seconds),
            status.checkpoints.len()
        ),
    }
}
