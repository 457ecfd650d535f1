//! Whether and when something that failed is tried again, by its cause.

use std::time::Duration;

use shanty_diagnostic::Kind;

/// The longest pause between two tries.
const LONGEST: Duration = Duration::from_secs(300);

/// Why something ended that should not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Wrong input: a repeat fails in the same way.
    User,
    /// Its user stopped it (exit code 93).
    Stopped,
    /// The program did what it must not: nothing may be trained on top of that.
    Defect,
    /// Workers were lost: hosts, processes, connections.
    Lost,
    /// A server or a disk did not answer.
    Passing,
}

impl From<Kind> for Cause {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::User => Self::User,
            Kind::Internal => Self::Defect,
            Kind::Transient => Self::Passing,
        }
    }
}

/// After how long it is tried again, once it has failed `times` times in a row; nothing if it is given up.
///
/// The first repeat comes at once, each later one after twice the pause of the one before, from `pause` on and at most
/// five minutes. `bound` is the number of failures in a row that is one too many.
pub fn again(cause: Cause, times: u32, bound: u32, pause: Duration) -> Option<Duration> {
    if matches!(cause, Cause::User | Cause::Stopped | Cause::Defect) || times >= bound {
        return None;
    }
    match times {
        0 | 1 => Some(Duration::ZERO),
        _ => Some(pause.saturating_mul(1 << (times - 2).min(16)).min(LONGEST)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_repeat_helps_is_never_tried_again() {
        for cause in [Cause::User, Cause::Stopped, Cause::Defect] {
            assert_eq!(again(cause, 1, 100, Duration::from_secs(1)), None, "{cause:?}");
        }
        assert_eq!(Cause::from(Kind::User), Cause::User);
        assert_eq!(Cause::from(Kind::Internal), Cause::Defect);
        assert_eq!(Cause::from(Kind::Transient), Cause::Passing);
    }

    #[test]
    fn lost_hosts_are_tried_again_with_growing_pauses_up_to_a_bound() {
        let pauses: Vec<Option<u64>> = (1..=10)
            .map(|times| again(Cause::Lost, times, 10, Duration::from_secs(5)).map(|pause| pause.as_secs()))
            .collect();
        let seconds = [0, 5, 10, 20, 40, 80, 160, 300, 300];
        let expected: Vec<Option<u64>> = seconds.into_iter().map(Some).chain([None]).collect();
        assert_eq!(pauses, expected);
    }
}
