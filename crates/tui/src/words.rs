//! The words for what the wire has numbers for.

use shanty_proto::v1::{JobState, MemberPhase};

/// The name of a state, as scripts and people see it.
pub fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Unspecified => "unknown",
        JobState::Queued => "queued",
        JobState::Preparing => "preparing",
        JobState::Forming => "forming",
        JobState::Running => "running",
        JobState::Recovering => "recovering",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// Whether a job in this state does nothing more by itself.
pub fn is_over(state: JobState) -> bool {
    matches!(state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// The name of a member's phase.
pub fn phase_name(phase: MemberPhase) -> &'static str {
    match phase {
        MemberPhase::Unspecified => "unknown",
        MemberPhase::Idle => "idle",
        MemberPhase::Loading => "loading",
        MemberPhase::Ready => "ready",
        MemberPhase::Forming => "forming",
        MemberPhase::Computing => "computing",
        MemberPhase::Reducing => "reducing",
        MemberPhase::Evaluating => "evaluating",
        MemberPhase::Waiting => "waiting",
        MemberPhase::Lost => "lost",
        MemberPhase::Writing => "writing",
    }
}
