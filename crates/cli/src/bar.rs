//! A bar for work that takes a while; nothing where there is no terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::ui::Ui;

/// Shows how far something has come.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new(ui: &Ui, verb: &'static str) -> Self {
        let target = if ui.is_live() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(100), target);
        let style = ProgressStyle::with_template("{prefix} {bar:24} {percent:>3} %  {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_prefix(verb);
        Self(bar)
    }

    pub(crate) fn at(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    pub(crate) fn done(&self) {
        self.0.finish_and_clear();
    }
}
