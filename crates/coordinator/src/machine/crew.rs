//! The members of the newest generation, and when none of them can apply a step any more.

use std::{collections::BTreeMap, time::Duration};

use shanty_proto::{Rank, Step, WorkerId};

use super::{
    event::{KeptSum, MemberPhase, Timings},
    straggler::Figures,
};

/// The members of a generation, by rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct Crew {
    pub members: Vec<Member>,
    /// All left after the same step, and none had begun the next.
    pub parted: bool,
    /// Where a worker stands in `members`: beats and reports of a large crew must not each search it.
    places: BTreeMap<WorkerId, usize>,
}

/// A member as it is now.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub worker: WorkerId,
    /// Why it is lost.
    pub lost: Option<String>,
    /// Its trainer gave no answer: it does not come back as the member that it was.
    pub hung: bool,
    /// Whether its stream is up and said that it belongs here (or was told so).
    pub attached: bool,
    /// Until when it may have to come back, after a restart of the coordinator.
    pub back_by: Option<Duration>,
    /// The updates that its state had when the generation began; nothing for one that had none, or if a restart forgot it.
    pub had: Option<Step>,
    /// What it said when it left.
    pub left: Option<LeftWith>,
    pub credit: Credit,
    pub phase: MemberPhase,
    pub step: Step,
    pub timings: Timings,
    /// Grows with what its trainer gets done.
    pub progress: u64,
    /// When that, its phase or its step changed last.
    pub progressed: Duration,
    /// Where its time goes, over the last steps.
    pub figures: Figures,
    /// Host, process and device, for people; kept when the stream is gone.
    pub host: String,
    pub pid: u32,
    pub device: String,
}

/// Whether a member may still apply a step of the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Credit {
    /// It never had a credit.
    Never,
    /// It had one, which ends at this moment by the coordinator's clock.
    Until(Duration),
    /// It said that it left.
    Out,
}

impl Member {
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            lost: None,
            hung: false,
            attached: false,
            back_by: None,
            had: None,
            left: None,
            credit: Credit::Never,
            phase: MemberPhase::Forming,
            step: Step(0),
            timings: Timings::default(),
            progress: 0,
            progressed: Duration::ZERO,
            figures: Figures::default(),
            host: String::new(),
            pid: 0,
            device: String::new(),
        }
    }

    /// Whether it has made a step in its crew, so that it has compiled, warmed up and connected.
    pub fn is_warm(&self, begun_from: Step) -> bool {
        self.had.is_some() || self.step > begun_from
    }
}

/// What a member has as it leaves a generation.
#[derive(Debug, Clone)]
pub struct LeftWith {
    /// Updates applied.
    pub applied: Step,
    /// Whether it holds adapter and optimizer.
    pub holds_state: bool,
    /// Their hash.
    pub hash: String,
    /// The sum that it keeps.
    pub kept: Option<KeptSum>,
}

impl Crew {
    pub fn new(members: Vec<Member>) -> Self {
        let places = members.iter().enumerate().map(|(at, member)| (member.worker.clone(), at)).collect();
        Self { members, parted: false, places }
    }

    pub fn rank_of(&self, worker: &WorkerId) -> Option<Rank> {
        let at = *self.places.get(worker)?;
        Some(Rank(u32::try_from(at).expect("there are fewer members than 2^32")))
    }

    pub fn of(&self, worker: &WorkerId) -> Option<&Member> {
        self.members.get(*self.places.get(worker)?)
    }

    pub fn of_mut(&mut self, worker: &WorkerId) -> Option<&mut Member> {
        self.members.get_mut(*self.places.get(worker)?)
    }

    /// Members that are neither lost nor have left.
    pub fn staying(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.lost.is_none() && member.left.is_none())
    }

    /// All said that they left, and nobody is to come back.
    pub fn all_out(&mut self) {
        for member in &mut self.members {
            member.credit = Credit::Out;
            member.back_by = None;
        }
    }

    /// When the generation can apply no step any more: nothing if that is so already.
    ///
    /// A step needs all members, so one that cannot take part is enough; else all credits must have run out.
    pub fn fence(&self, now: Duration) -> Option<Duration> {
        let mut last = Duration::ZERO;
        for member in &self.members {
            match member.credit {
                Credit::Never | Credit::Out => return None,
                Credit::Until(end) => last = last.max(end),
            }
        }
        (last > now).then_some(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crew(credits: &[Credit]) -> Crew {
        let member = |credit: &Credit| {
            let mut member = Member::new(WorkerId::new("w").expect("a valid id"));
            member.credit = *credit;
            member
        };
        Crew::new(credits.iter().map(member).collect())
    }

    #[test]
    fn fence_opens_with_one_member_out_or_all_credits_over() {
        let second = Duration::from_secs;
        let both = crew(&[Credit::Until(second(5)), Credit::Until(second(7))]);
        assert_eq!(both.fence(second(4)), Some(second(7)));
        assert_eq!(both.fence(second(6)), Some(second(7)));
        assert_eq!(both.fence(second(7)), None);
        assert_eq!(crew(&[Credit::Until(second(5)), Credit::Out]).fence(second(0)), None);
        assert_eq!(crew(&[Credit::Until(second(5)), Credit::Never]).fence(second(0)), None);
        assert_eq!(crew(&[]).fence(second(0)), None);
    }
}
