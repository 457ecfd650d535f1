//! A generation as it was announced, checked.

use shanty_collective::{
    Compression,
    tcp::{JoinOptions, Token},
};
use shanty_config::{
    UsualLoss,
    job::{self, ClusterSpec},
};
use shanty_proto::v1::{Form, RankRows, StartPoint, start_point::Source};

use crate::{Error, plan::JobPlan};

use std::{collections::BTreeSet, time::Duration};

/// How long the members may take to find each other. A member that is lost meanwhile ends the wait earlier.
pub(super) const JOIN_WITHIN: Duration = Duration::from_secs(60);

/// A generation as it was announced: every field is there and fits the others.
#[derive(Debug, Clone)]
pub(crate) struct Formation {
    pub(crate) generation: u64,
    pub(crate) rank: u32,
    /// Where each member listens, by rank.
    pub(crate) members: Vec<String>,
    pub(crate) token: [u8; 32],
    /// Whether the cluster's connections are encrypted: then those between its machines are, whatever the job says.
    pub(crate) encrypted: bool,
    pub(crate) start: Start,
}

/// Where a generation starts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Start {
    /// Updates applied in the state that it starts from.
    pub(crate) applied_step: u64,
    pub(crate) from: Origin,
    /// This rank's rows of the first step, where they are not its regular slice: (kept, to compute).
    pub(crate) first_rows: Option<(Vec<u64>, Vec<u64>)>,
    pub(crate) evaluated_step: Option<u64>,
    pub(crate) checkpoint_step: Option<u64>,
    /// What a loss spike is measured by.
    pub(crate) usual_loss: UsualLoss,
    /// Steps that are passed over.
    pub(crate) skip_steps: BTreeSet<u64>,
}

/// Where adapter and optimizer come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Every rank makes the same from the seed.
    Seed,
    /// Rank 0 reads a checkpoint and gives it to the others.
    Checkpoint(String),
    /// Members hold it; the donor gives it to the receivers.
    Members { donor: u32, receivers: Vec<u32> },
}

impl Formation {
    /// Checks an announcement.
    pub(crate) fn new(form: Form, plan: &JobPlan) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Protocol { message: "Form", reason };
        if (&form.job_id, form.attempt) != (&plan.job_id, plan.attempt) {
            return Err(wrong(format!("it is of attempt {} of job {}", form.attempt, form.job_id)));
        }
        let token =
            form.token.as_slice().try_into().map_err(|_| wrong("its token has not 32 bytes".to_owned()))?;
        let mut members = form.members;
        members.sort_by_key(|member| member.rank);
        if members.iter().enumerate().any(|(rank, member)| member.rank as usize != rank) {
            return Err(wrong("its ranks are not 0, 1, …".to_owned()));
        }
        if form.rank as usize >= members.len() {
            return Err(wrong(format!("rank {} is not among its {} members", form.rank, members.len())));
        }
        let start = form.start.ok_or_else(|| wrong("it has no start".to_owned()))?;
        let start = Start::new(start, form.rank, members.len()).map_err(wrong)?;
        if start.applied_step > plan.steps() {
            return Err(wrong(format!("it starts after step {} of {}", start.applied_step, plan.steps())));
        }
        let members = members.into_iter().map(|member| member.collective_address).collect();
        let encrypted = form.encrypted;
        Ok(Self { generation: form.generation, rank: form.rank, members, token, encrypted, start })
    }

    pub(crate) fn world_size(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// Whether what leaves a machine has to be encrypted: by the job's word, or because all else in the cluster is.
    pub(crate) fn must_be_secret(&self, cluster: &ClusterSpec) -> bool {
        let asked = cluster.encryption == job::Encryption::On;
        asked || self.encrypted && !self.is_on_one_machine()
    }

    fn is_on_one_machine(&self) -> bool {
        self.members.iter().all(|address| is_loopback(address))
    }

    /// How members link, which follows from what all of them are told alike.
    pub(crate) fn join_options(&self, job: &str, cluster: &ClusterSpec) -> JoinOptions {
        JoinOptions {
            job: job.to_owned(),
            encrypted: match cluster.encryption {
                job::Encryption::On => true,
                job::Encryption::Off if !self.encrypted => false,
                job::Encryption::Auto | job::Encryption::Off => !self.is_on_one_machine(),
            },
            compression: match cluster.compression {
                job::Compression::Off => Compression::Off,
                job::Compression::Bf16 => Compression::Bf16,
                job::Compression::Int8 => Compression::Int8,
            },
            generation: self.generation,
            rank: self.rank,
            members: self.members.clone(),
            token: Token(self.token),
            deadline: JOIN_WITHIN,
        }
    }
}

/// Whether `host:port` is this machine's own, by its name alone: names are not resolved, as members could come to
/// different answers.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Start {
    fn new(start: StartPoint, rank: u32, members: usize) -> Result<Self, String> {
        let from = match start.source {
            Some(Source::Fresh(_)) if start.applied_step == 0 => Origin::Seed,
            Some(Source::Fresh(_)) => return Err("a fresh start has applied steps".to_owned()),
            Some(Source::Checkpoint(checkpoint)) => Origin::Checkpoint(checkpoint.path),
            Some(Source::Members(from)) => {
                let known = |rank: &u32| (*rank as usize) < members;
                if !known(&from.donor)
                    || !from.receivers.iter().all(known)
                    || from.receivers.contains(&from.donor)
                {
                    return Err(format!(
                        "rank {} cannot give state to ranks {:?}",
                        from.donor, from.receivers
                    ));
                }
                Origin::Members { donor: from.donor, receivers: from.receivers }
            }
            None => return Err("it does not say where state comes from".to_owned()),
        };
        let mine = |rows: &RankRows| rows.rank == rank;
        let first_rows = match start.rows.iter().find(|rows| mine(rows)) {
            Some(rows) => Some((rows.kept.clone(), rows.compute.clone())),
            // Others have entries: this rank has nothing kept and nothing to compute.
            None if !start.rows.is_empty() => Some((Vec::new(), Vec::new())),
            None => None,
        };
        Ok(Self {
            applied_step: start.applied_step,
            from,
            first_rows,
            evaluated_step: start.evaluated_step,
            checkpoint_step: start.checkpoint_step,
            usual_loss: UsualLoss { mean: start.usual_loss, steps: start.usual_loss_steps },
            skip_steps: start.skip_steps.into_iter().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use shanty_proto::v1::{Fresh, FromMembers};

    use super::*;

    fn point() -> StartPoint {
        let members = FromMembers { donor: 0, receivers: vec![2] };
        StartPoint { applied_step: 4, source: Some(Source::Members(members)), ..StartPoint::default() }
    }

    #[test]
    fn a_rank_without_an_entry_has_its_slice_only_while_nobody_has_one() {
        assert_eq!(Start::new(point(), 1, 3).unwrap().first_rows, None);
        let entry = RankRows { rank: 0, kept: vec![1], compute: vec![2] };
        let broken = StartPoint { rows: vec![entry], ..point() };
        assert_eq!(Start::new(broken.clone(), 0, 3).unwrap().first_rows, Some((vec![1], vec![2])));
        assert_eq!(Start::new(broken, 1, 3).unwrap().first_rows, Some((vec![], vec![])));
    }

    #[test]
    fn links_are_encrypted_unless_all_members_are_on_one_machine() {
        let within = |encrypted, members: &[&str], encryption| {
            let members = members.iter().map(|member| (*member).to_owned()).collect();
            let start = Start::new(point(), 0, 3).unwrap();
            let formation = Formation { generation: 1, rank: 0, members, token: [0; 32], encrypted, start };
            let cluster = ClusterSpec { encryption, ..ClusterSpec::default() };
            formation.join_options("job", &cluster).encrypted
        };
        let with = |members: &[&str], encryption| within(false, members, encryption);
        let here = ["127.0.0.1:7000", "[::1]:7001", "localhost:7002"];
        assert!(!with(&here, job::Encryption::Auto));
        assert!(with(&here, job::Encryption::On));
        let there = ["127.0.0.1:7000", "10.0.0.7:7000"];
        assert!(with(&there, job::Encryption::Auto));
        assert!(with(&["127.0.0.1:1", "worker-3:1"], job::Encryption::Auto), "a name is not resolved");
        assert!(!with(&there, job::Encryption::Off));
        // In a cluster whose connections are encrypted no job does without.
        assert!(within(true, &there, job::Encryption::Off));
        assert!(!within(true, &here, job::Encryption::Off));
    }

    #[test]
    fn nccl_is_not_chosen_where_links_must_be_secret() {
        let secret = |encrypted, members: &[&str], encryption| {
            let members = members.iter().map(|member| (*member).to_owned()).collect();
            let start = Start::new(point(), 0, 3).unwrap();
            let formation = Formation { generation: 1, rank: 0, members, token: [0; 32], encrypted, start };
            formation.must_be_secret(&ClusterSpec { encryption, ..ClusterSpec::default() })
        };
        let (here, there) = (["127.0.0.1:7000", "[::1]:7001"], ["127.0.0.1:7000", "10.0.0.7:7000"]);
        assert!(secret(false, &here, job::Encryption::On));
        assert!(secret(true, &there, job::Encryption::Auto) && secret(true, &there, job::Encryption::Off));
        assert!(!secret(true, &here, job::Encryption::Auto), "nothing leaves the machine");
        assert!(!secret(false, &there, job::Encryption::Auto), "the cluster does without, too");
    }

    #[test]
    fn starts_that_contradict_themselves_are_refused() {
        let fresh = StartPoint { source: Some(Source::Fresh(Fresh {})), ..point() };
        assert!(Start::new(fresh, 0, 3).unwrap_err().contains("fresh start"));
        assert!(Start::new(StartPoint { source: None, ..point() }, 0, 3).is_err());
        assert!(Start::new(point(), 0, 2).unwrap_err().contains("cannot give state"));
    }
}
