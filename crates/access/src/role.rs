//! What somebody may do.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a token or a certificate stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looks at jobs, steps, events and logs.
    Read,
    /// Looks, and submits, cancels and resumes jobs.
    Submit,
    /// Works: holds a session and leases rows. Sees nothing else.
    Worker,
    /// Everything, tokens among it.
    Admin,
}

/// The least that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Least {
    /// [`Role::Read`], or more.
    Read,
    /// [`Role::Submit`], or more.
    Submit,
    /// [`Role::Worker`], or [`Role::Admin`].
    Worker,
    /// [`Role::Admin`].
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Read, Self::Submit, Self::Worker, Self::Admin];

    /// Whether the role is enough. Workers are no users: what they may do, users may not, and the other way round.
    pub const fn may(self, least: Least) -> bool {
        match least {
            Least::Read => matches!(self, Self::Read | Self::Submit | Self::Admin),
            Least::Submit => matches!(self, Self::Submit | Self::Admin),
            Least::Worker => matches!(self, Self::Worker | Self::Admin),
            Least::Admin => matches!(self, Self::Admin),
        }
    }

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Submit => "submit",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }

    /// The role of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Least {
    /// In words, for a refusal.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "`read`",
            Self::Submit => "`submit`",
            Self::Worker => "`worker`",
            Self::Admin => "`admin`",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_roles_are_the_same() {
        for role in Role::ALL {
            assert_eq!(Role::parse(role.as_str()), Some(role));
        }
        assert_eq!(Role::parse("root"), None);
    }

    #[test]
    fn workers_are_no_users_and_users_no_workers() {
        let allowed = |role: Role| {
            [Least::Read, Least::Submit, Least::Worker, Least::Admin].map(|least| role.may(least))
        };
        assert_eq!(allowed(Role::Read), [true, false, false, false]);
        assert_eq!(allowed(Role::Submit), [true, true, false, false]);
        assert_eq!(allowed(Role::Worker), [false, false, true, false]);
        assert_eq!(allowed(Role::Admin), [true; 4]);
    }
}
