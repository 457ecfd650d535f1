//! Whose file it is.

/// Which of the two folders a file belongs to; it decides the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The frozen base model.
    Base,
    /// The adapter.
    Adapter,
}

impl Origin {
    pub(super) fn code(self, base: &'static str, adapter: &'static str) -> &'static str {
        match self {
            Self::Base => base,
            Self::Adapter => adapter,
        }
    }
}
