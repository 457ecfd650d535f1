//! The terminal while the program draws on it. However the program ends, it leaves the terminal as it was.

use std::{
    io::{self, Stdout},
    sync::atomic::{AtomicBool, Ordering},
};

use crossterm::{
    cursor, execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};
use ratatui::{Terminal, backend::CrosstermBackend};

use crate::{
    Error,
    state::App,
    view::{self, Theme},
};

/// Whether the terminal is ours, to be given back.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// A terminal that is drawn on. It is given back when this is dropped, and before a panic is told.
#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// [`Error::Terminal`] if it is none, or went away.
    pub fn take() -> Result<Self, Error> {
        let failed = |source| Error::Terminal { action: "take", source };
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Raw letters on another screen would be read by nobody.
            give_back();
            before(info);
        }));
        TAKEN.store(true, Ordering::SeqCst);
        let taken = enable_raw_mode()
            .and_then(|()| execute!(io::stdout(), EnterAlternateScreen, cursor::Hide))
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match taken {
            Ok(terminal) => Ok(Self { terminal }),
            Err(source) => {
                give_back();
                Err(failed(source))
            }
        }
    }

    /// Draws what changed.
    ///
    /// # Errors
    /// [`Error::Terminal`] if the terminal went away.
    pub fn draw(&mut self, app: &App, theme: Theme) -> Result<(), Error> {
        let drawn = self.terminal.draw(|frame| view::draw(frame, app, theme));
        drawn.map(drop).map_err(|source| Error::Terminal { action: "draw on", source })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// Leaves the terminal as it was, once.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        // A terminal that went away needs nothing any more.
        let _ = execute!(io::stdout(), LeaveAlternateScreen, cursor::Show);
        let _ = disable_raw_mode();
    }
}

/// The terminal's columns and rows, if there is one.
pub fn size() -> Option<(u16, u16)> {
    crossterm::terminal::size().ok()
}
