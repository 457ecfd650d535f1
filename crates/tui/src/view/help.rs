//! What the keys do.

use ratatui::{
    Frame,
    layout::Rect,
    text::{Line, Span},
};

use super::{Theme, say};

const KEYS: [(&str, &str); 14] = [
    ("up, down, k, j", "choose a job; scroll a page, in logs and events back in time"),
    ("PgUp, PgDn", "the same by ten"),
    ("Home, End, g, G", "to the first, to the last"),
    ("Enter", "open the job under the cursor"),
    ("Esc, Backspace", "back to the jobs"),
    ("1 to 6", "a page of the job"),
    ("Tab, Shift-Tab", "the next page, the one before"),
    ("l", "logs: info and above, warnings and errors, errors alone"),
    ("w", "logs: one worker after the other, then all"),
    ("/", "logs: lines that hold a text; Esc shows all again"),
    ("?, h", "this page"),
    ("q, Ctrl-C", "end; the job goes on"),
    ("", ""),
    ("", "Nothing here changes a job: shanty cancel, drain, resume do."),
];

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, theme: Theme) {
    let line = |(key, what): (&'static str, &'static str)| {
        Line::from(vec![Span::styled(format!("{key:<17}"), theme.strong()), Span::raw(what)])
    };
    say(frame, area, KEYS.map(line).to_vec());
}
