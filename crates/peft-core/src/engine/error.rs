//! What goes wrong in a pass, with the codes `SH065x`.

use shanty_diagnostic::Kind;

/// What goes wrong in a pass over rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A row does not hold together: a defect of whoever packed it.
    #[error("row {row} is malformed: {reason}")]
    MalformedRow {
        /// Number of the row.
        row: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// More rows or tokens than the memory plan has room for.
    #[error(
        "a micro-batch of {rows} rows, {tokens} tokens does not fit {row_room} rows, {token_room} tokens"
    )]
    MicroBatchTooLarge {
        /// Rows given.
        rows: usize,
        /// Tokens given.
        tokens: usize,
        /// Rows there is room for.
        row_room: usize,
        /// Tokens there is room for.
        token_room: usize,
    },
    /// A token that the base does not know.
    #[error("token {token} in row {row} is outside the base's vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// Number of the row.
        row: u64,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// A flat buffer is not of the layout's length.
    #[error("a flat buffer has {found} numbers, the adapter's layout {expected}")]
    FlatLength {
        /// Numbers given.
        found: usize,
        /// Numbers of the layout.
        expected: usize,
    },
    /// The threads that compute cannot be started.
    #[error("failed to start {threads} threads: {reason}")]
    Threads {
        /// Threads asked for; 0 means all.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// Memory of a planned size cannot be had.
    #[error("failed to reserve {bytes} bytes of memory")]
    OutOfMemory {
        /// How much was asked for.
        bytes: usize,
    },
    /// More tokens than the base has positions.
    #[error("{tokens} tokens do not fit the base's context of {positions}")]
    ContextTooLong {
        /// Tokens asked for.
        tokens: usize,
        /// Positions of the base.
        positions: usize,
    },
    /// A step with what is trained in the engine, before anything was handed to it.
    #[error("a step was asked for before parameters were handed to the engine: a defect of the program")]
    NoState,
    /// A token cannot be drawn from these logits with these settings.
    #[error("failed to sample a token: {reason}")]
    Sampling {
        /// Why not.
        reason: String,
    },
}

impl StepError {
    /// The code, one of those with a page in `docs/errors/`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::MalformedRow { .. } => "SH0650",
            Self::MicroBatchTooLarge { .. } => "SH0651",
            Self::TokenOutOfRange { .. } => "SH0652",
            Self::FlatLength { .. } => "SH0653",
            Self::Threads { .. } => "SH0654",
            Self::OutOfMemory { .. } => "SH0655",
            Self::ContextTooLong { .. } => "SH0656",
            Self::Sampling { .. } => "SH0657",
            Self::NoState => "SH0812",
        }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::TokenOutOfRange { .. } | Self::ContextTooLong { .. } | Self::Sampling { .. } => Kind::User,
            Self::Threads { .. } | Self::OutOfMemory { .. } => Kind::Transient,
            Self::MalformedRow { .. }
            | Self::MicroBatchTooLarge { .. }
            | Self::FlatLength { .. }
            | Self::NoState => Kind::Internal,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::TokenOutOfRange { .. } => "use the tokenizer that belongs to the base",
            Self::OutOfMemory { .. } => {
                "set train.micro_batch_size = 1 and train.recompute = \"layers\", or lower data.max_length"
            }
            Self::ContextTooLong { .. } => "shorten the prompt, or ask for fewer tokens",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
