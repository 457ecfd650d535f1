//! Colours, and what stands for them where there are none. Meaning is never carried by colour alone.

use ratatui::style::{Color, Modifier, Style};
use shanty_proto::v1::{JobState, MemberPhase};

/// What the terminal can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Theme {
    /// Whether colour is wanted.
    pub color: bool,
    /// Whether letters beyond ASCII can be shown.
    pub unicode: bool,
}

impl Theme {
    fn tint(self, color: Color) -> Style {
        if self.color { Style::new().fg(color) } else { Style::new() }
    }

    /// What stands out.
    pub(super) fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// What stands back.
    pub(super) fn faint(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// What is under the cursor.
    pub(super) fn chosen(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    pub(super) fn good(self) -> Style {
        self.tint(Color::Green)
    }

    pub(super) fn warning(self) -> Style {
        self.tint(Color::Yellow).add_modifier(Modifier::BOLD)
    }

    pub(super) fn bad(self) -> Style {
        self.tint(Color::Red).add_modifier(Modifier::BOLD)
    }

    pub(super) fn curve(self) -> Style {
        self.tint(Color::Cyan)
    }

    pub(super) fn state(self, state: JobState) -> Style {
        match state {
            JobState::Running | JobState::Succeeded => self.good(),
            JobState::Recovering => self.warning(),
            JobState::Failed => self.bad(),
            _ => Style::new(),
        }
    }

    pub(super) fn phase(self, phase: MemberPhase) -> Style {
        match phase {
            MemberPhase::Lost => self.bad(),
            MemberPhase::Computing | MemberPhase::Reducing | MemberPhase::Evaluating => self.good(),
            _ => Style::new(),
        }
    }

    pub(super) fn level(self, level: &str) -> Style {
        match level {
            "error" => self.bad(),
            "warn" => self.warning(),
            _ => self.faint(),
        }
    }

    /// A letter, or what stands for it in ASCII.
    pub(super) fn letter(self, letter: &'static str, ascii: &'static str) -> &'static str {
        if self.unicode { letter } else { ascii }
    }

    /// A text without letters that the terminal cannot show.
    pub(super) fn text(self, text: &str) -> String {
        let plain = |letter: char| match letter {
            _ if letter.is_control() => ' ',
            _ if self.unicode || letter.is_ascii() => letter,
            '…' => '~',
            '×' => 'x',
            '–' | '—' => '-',
            '·' => '|',
            _ => '?',
        };
        text.chars().map(plain).collect()
    }
}
