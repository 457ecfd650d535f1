//! Draws the state: pure, whatever the terminal.

mod chart;
mod checkpoints;
mod events;
mod frame;
mod help;
mod jobs;
mod logs;
mod members;
mod overview;
mod paint;
mod recoveries;
mod table;
mod times;

use ratatui::{Frame, Terminal, backend::TestBackend, layout::Rect, text::Line, widgets::Paragraph};

pub use self::paint::Theme;
use crate::state::{App, Job, Page, Tab};

/// Smallest screen that says anything.
const LEAST: (u16, u16) = (40, 8);

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, app: &App, theme: Theme) {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let text = format!("{}x{} is too small", area.width, area.height);
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let body = frame::draw(frame, app, theme);
    if app.help {
        help::draw(frame, body, theme);
        return;
    }
    match (app.page, &app.job) {
        (Page::Job(tab), Some(job)) => draw_job(frame, body, app, job, tab, theme),
        _ => jobs::draw(frame, body, app, theme),
    }
}

/// What a terminal of `width` by `height` would show, as text.
pub fn text(app: &App, theme: Theme, (width, height): (u16, u16)) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(drawn) = terminal.draw(|frame| draw(frame, app, theme));
    let rows = drawn.buffer.content().chunks(usize::from(width.max(1)));
    let row = |cells: &[ratatui::buffer::Cell]| -> String {
        let line: String = cells.iter().map(|cell| cell.symbol()).collect();
        line.trim_end().to_owned()
    };
    rows.map(row).collect::<Vec<_>>().join("\n")
}

fn draw_job(frame: &mut Frame<'_>, area: Rect, app: &App, job: &Job, tab: Tab, theme: Theme) {
    if let Some(missing) = &job.missing {
        say(frame, area, vec![Line::from(missing.as_str())]);
        return;
    }
    let Some(status) = &job.status else {
        say(frame, area, vec![Line::from("asks for the job…")]);
        return;
    };
    match tab {
        Tab::Overview => overview::draw(frame, area, app, job, status, theme),
        Tab::Members => members::draw(frame, area, app, job, status, theme),
        Tab::Recoveries => recoveries::draw(frame, area, app, status, theme),
        Tab::Checkpoints => checkpoints::draw(frame, area, app, status, theme),
        Tab::Events => events::draw(frame, area, app, job, theme),
        Tab::Logs => logs::draw(frame, area, app, job, theme),
    }
}

/// Lines from the top of an area; those beyond its end are not drawn.
fn say(frame: &mut Frame<'_>, area: Rect, lines: Vec<Line<'_>>) {
    frame.render_widget(Paragraph::new(lines), area);
}

/// Lines, scrolled by as much as there is to scroll.
fn say_from(frame: &mut Frame<'_>, area: Rect, lines: Vec<Line<'_>>, scroll: usize) {
    let most = lines.len().saturating_sub(usize::from(area.height));
    say(frame, area, lines.into_iter().skip(scroll.min(most)).collect());
}
