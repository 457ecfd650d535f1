//! Typed ids: a rank is not a step, and a job's id is safe in a path.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest text id, bytes.
const LONGEST_ID: usize = 128;

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind} id: 1 to 128 letters, digits, `-`, `_` and `.`, not starting with `.`")]
pub struct InvalidId {
    /// `job` or `worker`.
    pub kind: &'static str,
    /// What was given.
    pub text: String,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks a text and takes it as an id.
            ///
            /// # Errors
            /// [`InvalidId`] if the text is empty, too long, or has a character that no id has.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                let fits = (1..=LONGEST_ID).contains(&text.len()) && !text.starts_with('.');
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
                if fits && text.bytes().all(plain) {
                    Ok(Self(text))
                } else {
                    Err(InvalidId { kind: $kind, text })
                }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InvalidId;

            fn try_from(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

text_id!(
    /// Names a job, for ever. Made from the job's name; safe as a file name.
    JobId, "job"
);
text_id!(
    /// Names a worker process; drawn once a process.
    WorkerId, "worker"
);

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $number:ty) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $number);

        impl $name {
            /// The number.
            pub fn get(self) -> $number {
                self.0
            }

            /// The one after it.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$number> for $name {
            fn from(number: $number) -> Self {
                Self(number)
            }
        }

        impl From<$name> for $number {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

number_id!(
    /// One try at a job, from 1.
    Attempt, u32
);
number_id!(
    /// One fixed membership of a job, from 1; never reused. 0 stands for none.
    Generation, u64
);
number_id!(
    /// A member's place in a generation, from 0.
    Rank, u32
);
number_id!(
    /// One optimizer update, from 1. As an applied step: how many updates were applied.
    Step, u64
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_file_names() {
        for text in ["pirate", "pirate-2", "a_b.c", "0197f2b4-aaaa-7000-8000-000000000000"] {
            assert_eq!(JobId::new(text).unwrap().as_str(), text);
        }
        for text in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", &"x".repeat(129)] {
            assert_eq!(WorkerId::new(text).unwrap_err().text, text);
        }
    }

    #[test]
    fn json_of_an_id_is_checked_and_plain() {
        assert_eq!(serde_json::to_string(&JobId::new("pirate").unwrap()).unwrap(), "\"pirate\"");
        assert_eq!(serde_json::from_str::<JobId>("\"pirate\"").unwrap().to_string(), "pirate");
        assert!(serde_json::from_str::<JobId>("\"../etc\"").is_err());
        assert_eq!(serde_json::to_string(&Generation(7)).unwrap(), "7");
        assert_eq!(serde_json::from_str::<Rank>("3").unwrap(), Rank(3));
    }

    #[test]
    fn numbers_count_on() {
        assert_eq!(Generation::default().next(), Generation(1));
        assert_eq!(u64::from(Step(4).next()), 5);
        assert_eq!(format!("{:>3}", Rank(2)), "  2");
    }
}
