//! Workers that share a base: whole groups, and what becomes of one that loses a member.

use shanty_coordinator::machine::record::{JobState, Source};
use shanty_proto::Rank;

use crate::stage::*;

/// Two groups of two: `a` and `c` hold part 0, `b` and `d` part 1.
fn two_groups(min: u32) -> Stage {
    let mut stage = Stage::shared(2, min, 4, 10);
    for (name, part) in [("a", 0), ("b", 1), ("c", 0), ("d", 1)] {
        stage.hello(name, None);
        assert_eq!(stage.asked_for_part(name), Some(part));
    }
    for name in ["d", "c", "b", "a"] {
        stage.ready(name);
    }
    for (rank, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        assert_eq!(stage.formed(name).unwrap().0, rank as u32, "rank r holds part r mod 2");
    }
    for (rank, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        stage.beat(name, 1, rank as u32, 0);
    }
    stage
}

#[test]
fn a_generation_has_whole_groups_alone() {
    let mut stage = Stage::shared(2, 1, 4, 10);
    for name in ["a", "b", "c"] {
        stage.hello(name, None);
    }
    stage.ready("a");
    stage.ready("c");
    stage.pass(4000, &["a", "b", "c"]);
    let reason = stage.view().reason;
    assert_eq!(stage.view().state, JobState::Forming);
    assert!(reason.contains("of a base in 2 parts nobody has part 1"), "{reason}");
    assert!(reason.contains("0 of at least 2 workers"), "{reason}");
    stage.ready("b");
    stage.pass(4000, &["a", "b", "c"]);
    let ranks: Vec<_> = stage.view().members.iter().map(|member| member.rank.map(|rank| rank.0)).collect();
    assert_eq!(ranks, [Some(0), Some(1), None], "the third waits for a second of its group");
    assert_eq!(stage.view().state, JobState::Running);
}

#[test]
fn a_lost_member_voids_what_its_group_added_and_the_other_group_keeps_its_own() {
    let mut stage = two_groups(1);
    let rows = order().step_rows(1);
    stage.down("d");
    stage.left("a", 1, 0, &rows[..1]);
    stage.left("c", 1, 0, &rows[4..5]);
    stage.left("b", 1, 0, &rows[2..4]);
    let (_, generation) = stage.formed("a").unwrap();
    let members: Vec<String> = generation.members.iter().map(|one| one.worker.to_string()).collect();
    assert_eq!(members, ["a", "b"], "half a group takes no part");
    let kept: Vec<&[u64]> = generation.start.rows.iter().map(|rank| rank.kept.as_slice()).collect();
    assert_eq!(kept, [&rows[..1], &rows[2..4]]);
    // c had a row and so had d, which is lost: both are computed again.
    assert_eq!(stage.view().ledger.requeued, 2);

    // Whoever comes loads what is missing, and nobody else loads anything.
    stage.hello("e", None);
    assert_eq!(stage.asked_for_part("e"), Some(1));
    stage.beat("a", 2, 0, 0);
    stage.beat("b", 2, 1, 0);
    stage.ready("e");
    stage.report("a", 2, 0, 1);
    stage.pass(20, &[]);
    assert!(stage.was_told_to_leave("a"));
    stage.left("a", 2, 1, &[]);
    stage.left("b", 2, 1, &[]);
    let (rank, generation) = stage.formed("e").unwrap();
    assert_eq!((rank, stage.formed("c").unwrap().0), (3, 2));
    let receivers = vec![Rank(2), Rank(3)];
    assert_eq!(generation.start.source, Source::Members { donor: Rank(0), receivers });
}

#[test]
fn of_two_that_hold_the_same_part_one_takes_on_the_other() {
    let mut stage = two_groups(1);
    let rows = order().step_rows(1);
    stage.down("b");
    stage.down("d");
    stage.left("a", 1, 0, &rows[..2]);
    stage.left("c", 1, 0, &rows[4..5]);
    assert_eq!(stage.asked_for_part("c"), Some(1), "who came last");
    assert_eq!(stage.asked_for_part("a"), None);
    assert!(stage.formed("a").is_none());
    stage.ready_with("c", Some(0));
    assert!(stage.formed("a").is_none(), "word of the part that it held before does not count");
    stage.ready("c");
    let (rank, generation) = stage.formed("c").unwrap();
    assert_eq!((rank, stage.formed("a").unwrap().0), (1, 0));
    assert!(generation.start.rows.is_empty(), "both groups had lost a member: nothing is kept");
    let source = Source::Members { donor: Rank(0), receivers: Vec::new() };
    assert_eq!(generation.start.source, source, "adapter and optimizer outlive the change of part");
}

/// One that is a step ahead of all others must be among those who go on, whatever becomes of its group.
#[test]
fn the_newest_state_is_never_left_behind() {
    let mut stage = two_groups(1);
    stage.down("d");
    stage.left("a", 1, 0, &[]);
    stage.left("b", 1, 0, &[]);
    stage.left("c", 1, 1, &[]);
    let (rank, generation) = stage.formed("c").unwrap();
    assert_eq!((rank, generation.members.len(), generation.start.applied.0), (0, 2, 1));
    let receivers = vec![Rank(1)];
    assert_eq!(generation.start.source, Source::Members { donor: Rank(0), receivers });
    assert_eq!(generation.members[1].worker, worker("b"));
}
