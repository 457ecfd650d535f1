//! What goes wrong when adapters are used, combined, merged and exported, with the codes `SH045x`.

use std::path::PathBuf;

use shanty_diagnostic::Kind;

/// What goes wrong when adapters are used, combined, merged and exported.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UseError {
    /// The adapter is of a kind that no weight can hold.
    #[error("adapter of method {method} cannot be merged into weights: {reason}")]
    NotMergeable {
        /// PEFT's name of the method.
        method: String,
        /// Why not.
        reason: String,
    },
    /// Model, tokenizer or adapter cannot be written as GGUF.
    #[error("cannot be written as GGUF: {reason}")]
    NotExportable {
        /// Why not.
        reason: String,
    },
    /// Adapters that do not go together.
    #[error("adapters cannot be combined: {reason}")]
    NotCombinable {
        /// Why not.
        reason: String,
    },
    /// The adapter was trained on another base.
    #[error("adapter `{}` was trained on another base: its base has the hash {expected}, this one {found}", adapter.display())]
    WrongBase {
        /// The adapter's folder.
        adapter: PathBuf,
        /// Hash of the base that it was trained on, its first digits.
        expected: String,
        /// Hash of the base at hand, its first digits.
        found: String,
    },
    /// A name in an adapter's file that cannot become what was asked for.
    #[error("tensor `{tensor}` in `{}` {problem}", file.display())]
    TensorName {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong; reads on from "tensor `…` in `…`".
        problem: String,
    },
    /// Taken out again, the adapter does not leave the base.
    #[error(
        "tensor `{tensor}` without the adapter is not the base's: off by {error:.1e} of its largest number, {allowed:.1e} is allowed"
    )]
    NotUnmerged {
        /// The tensor.
        tensor: String,
        /// max |a - b| / max |b|.
        error: f64,
        /// The most that rounding explains.
        allowed: f64,
    },
    /// A folder or file that would be written over.
    #[error("`{}` is there already", path.display())]
    OutputTaken {
        /// What is there.
        path: PathBuf,
    },
}

impl UseError {
    /// The code, one of those with a page in `docs/errors/`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotMergeable { .. } => "SH0450",
            Self::NotExportable { .. } => "SH0451",
            Self::NotCombinable { .. } => "SH0452",
            Self::WrongBase { .. } => "SH0453",
            Self::TensorName { .. } => "SH0454",
            Self::NotUnmerged { .. } => "SH0455",
            Self::OutputTaken { .. } => "SH0456",
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        Kind::User
    }

    pub(crate) fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::TensorName { file, .. } => Some(file),
            Self::WrongBase { adapter, .. } => Some(adapter),
            _ => None,
        }
    }

    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NotMergeable { .. } => "keep the adapter beside the base: `shanty generate --adapter DIR`",
            Self::WrongBase { .. } => "use the base that it was trained on; `--force` goes on all the same",
            Self::OutputTaken { .. } => "choose another place, or remove it first",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
