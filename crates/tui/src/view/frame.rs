//! What stands on every page: above, where one is and whether the coordinator answers; below, the keys.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
};

use super::{Theme, say, table::cut, times::since};
use crate::state::{App, Link, Page, Tab};

/// Draws them; gives the area between them.
pub(super) fn draw(frame: &mut Frame<'_>, app: &App, theme: Theme) -> Rect {
    let heads = if matches!(app.page, Page::Job(_)) { 2 } else { 1 };
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(heads), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    let mut lines = vec![title(app, head.width, theme)];
    if let Page::Job(shown) = app.page {
        lines.push(tabs(shown, theme));
    }
    say(frame, head, lines);
    say(frame, foot, vec![keys(app, foot.width, theme)]);
    body
}

fn title(app: &App, width: u16, theme: Theme) -> Line<'static> {
    let (link, style) = match &app.link {
        Link::Connecting => ("connecting".to_owned(), theme.warning()),
        Link::Up => ("up".to_owned(), theme.good()),
        Link::Lost { since: lost, reason } => {
            (format!("NO ANSWER for {}: {reason}", since(app.now, *lost)), theme.bad())
        }
    };
    let name = match (&app.page, &app.job) {
        (Page::Job(_), Some(job)) => format!("shanty top  {}", job.id),
        _ => "shanty top".to_owned(),
    };
    let width = usize::from(width);
    let where_to = theme.text(&format!("{}  ", app.address));
    let link = cut(&theme.text(&link), width.saturating_sub(name.chars().count() + 2), theme);
    let used = name.chars().count() + link.chars().count();
    // The address gives way where the reason takes the room.
    let where_to = if used + where_to.chars().count() + 2 <= width { where_to } else { String::new() };
    let gap = width.saturating_sub(used + where_to.chars().count());
    Line::from(vec![
        Span::styled(theme.text(&name), theme.strong()),
        Span::raw(" ".repeat(gap)),
        Span::styled(where_to, theme.faint()),
        Span::styled(link, style),
    ])
}

fn tabs(shown: Tab, theme: Theme) -> Line<'static> {
    let mut spans = Vec::new();
    for (number, tab) in (1..).zip(Tab::ALL) {
        // Brackets say it where reversed letters cannot be seen.
        let (text, style) = if tab == shown {
            (format!("[{number} {}]", tab.title()), theme.chosen())
        } else {
            (format!(" {number} {} ", tab.title()), theme.faint())
        };
        spans.push(Span::styled(text, style));
    }
    Line::from(spans)
}

fn keys(app: &App, width: u16, theme: Theme) -> Line<'static> {
    if app.typing {
        return Line::from(format!(
            "lines with: {}_   Enter keeps it, Esc shows all",
            theme.text(&app.filter)
        ));
    }
    let up_down = theme.letter("↑↓", "j/k");
    let keys: Vec<(&str, &str)> = match app.page {
        _ if app.help => vec![("any key", "closes this")],
        Page::Jobs => vec![(up_down, "choose"), ("Enter", "open"), ("?", "help"), ("q", "quit")],
        Page::Job(Tab::Logs) => vec![
            (up_down, "scroll"),
            ("l", "level"),
            ("w", "worker"),
            ("/", "filter"),
            ("Tab", "next"),
            ("Esc", "jobs"),
            ("?", "help"),
            ("q", "quit"),
        ],
        Page::Job(_) => vec![
            (up_down, "scroll"),
            ("1-6", "page"),
            ("Tab", "next"),
            ("Esc", "jobs"),
            ("?", "help"),
            ("q", "quit"),
        ],
    };
    let mut spans = Vec::new();
    let mut room = usize::from(width);
    for (key, what) in keys {
        let length = key.chars().count() + what.chars().count() + 3;
        if length > room {
            break;
        }
        room -= length;
        spans.extend([Span::styled(key, theme.strong()), Span::styled(format!(" {what}  "), theme.faint())]);
    }
    Line::from(spans)
}
