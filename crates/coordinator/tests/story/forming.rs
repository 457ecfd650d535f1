use shanty_coordinator::machine::{
    Effect, MemberPhase, Message,
    record::{JobState, Source},
};
use shanty_diagnostic::{Diagnostic, Kind};

use crate::stage::*;

#[test]
fn forms_at_once_when_all_that_it_may_use_are_ready() {
    let mut stage = Stage::with_job(1, 2, 10);
    stage.hello("a", None);
    stage.hello("b", None);
    assert!(matches!(stage.told("b")[..], [Message::Welcome { attached: false }, Message::Assign { .. }]));
    stage.ready("b");
    assert_eq!(stage.view().state, JobState::Forming);
    stage.ready("a");
    let (rank, generation) = stage.formed("a").unwrap();
    // By the order in which they came, not in which they were ready: so a run with the same workers has the same ranks.
    assert_eq!((rank, stage.formed("b").unwrap().0), (0, 1));
    assert_eq!(generation.start.source, Source::Fresh);
    assert!(generation.start.rows.is_empty());
    assert_ne!(generation.token, [0; 32]);
    assert_eq!(
        stage.saved().unwrap().generation.as_ref(),
        Some(&*generation),
        "durable with the announcement"
    );
    let first_send = stage.effects.iter().position(|effect| matches!(effect, Effect::Send { .. })).unwrap();
    let persisted = stage.effects.iter().position(|effect| matches!(effect, Effect::Persist(_))).unwrap();
    assert!(persisted < first_send);
}

#[test]
fn forms_with_the_least_number_after_the_gather_time() {
    let mut stage = Stage::with_job(2, 4, 10);
    for name in ["a", "b", "c"] {
        stage.hello(name, None);
    }
    stage.ready("a");
    stage.ready("b");
    let reason = stage.view().reason;
    assert!(reason.contains("2 of at most 4 workers are ready; waits up to 3.0 s"), "{reason}");
    stage.pass(2750, &["a", "b", "c"]);
    assert_eq!(stage.view().state, JobState::Forming);
    stage.pass(500, &["a", "b", "c"]);
    // It never waits for a load: c still loads.
    assert_eq!(stage.formed("a").unwrap().1.members.len(), 2);
}

#[test]
fn waiting_says_who_is_missing() {
    let mut stage = Stage::with_job(3, 3, 10);
    assert_eq!(stage.view().reason, "0 of at least 3 workers are ready; 3 more must connect");
    stage.hello("a", None);
    stage.hello("b", None);
    stage.ready("a");
    assert_eq!(
        stage.view().reason,
        "1 of at least 3 workers are ready; loading the base: b; 1 more must connect"
    );
    let error = Diagnostic::new("SH0801", "no memory").kind(Kind::Transient);
    stage.fails("b", error);
    assert_eq!(stage.view().reason, "1 of at least 3 workers are ready; failed: b; 1 more must connect");
}

#[test]
fn a_worker_with_another_base_takes_no_part() {
    let mut stage = Stage::with_job(1, 2, 10);
    stage.hello("a", None);
    stage.hello("b", None);
    stage.ready("a");
    let message = shanty_coordinator::machine::Said::BaseReady {
        job: job(),
        attempt: shanty_proto::Attempt(1),
        base_hash: "other".to_owned(),
        seconds: 1.0,
        trainable_parameters: 5,
        part: None,
    };
    stage.say("b", message);
    assert!(
        matches!(&stage.told("b")[..], [Message::Release { succeeded: false, reason, .. }] if reason.contains("another base"))
    );
    stage.pass(4000, &["a", "b"]);
    assert_eq!(stage.view().members.len(), 1);
}

#[test]
fn a_ready_worker_joins_after_a_step_and_breaks_nothing() {
    let mut stage = Stage::running(1, 3, 10, &["a", "b"]);
    stage.hello("c", None);
    stage.ready("c");
    // Before the first step of the generation nobody joins, or joiners could keep it from ever making one.
    assert!(!stage.was_told_to_leave("a"));
    stage.report("a", 1, 0, 1);
    stage.pass(20, &[]);
    assert!(stage.was_told_to_leave("a") && stage.was_told_to_leave("b"));
    let rows = order().step_rows(2);
    stage.left("a", 1, 1, &rows[..2]);
    assert!(stage.formed("a").is_none());
    stage.left("b", 1, 1, &rows[3..5]);
    let (rank, generation) = stage.formed("c").unwrap();
    assert_eq!(rank, 2);
    let receivers = vec![shanty_proto::Rank(2)];
    assert_eq!(generation.start.source, Source::Members { donor: shanty_proto::Rank(0), receivers });
    let rows_of: Vec<(usize, usize)> =
        generation.start.rows.iter().map(|rows| (rows.kept.len(), rows.compute.len())).collect();
    assert_eq!(rows_of, [(2, 0), (2, 0), (0, 2)]);
    assert_eq!(stage.view().ledger.requeued, 0, "nobody was lost");
}

#[test]
fn nobody_joins_within_the_last_step() {
    let mut stage = Stage::running(1, 3, 4, &["a", "b"]);
    stage.hello("c", None);
    stage.ready("c");
    for step in 1..=3 {
        stage.report("a", 1, 0, step);
    }
    stage.pass(2000, &["a", "b", "c"]);
    assert_eq!(stage.view().state, JobState::Running);
    assert!(!stage.was_told_to_leave("a"));
}

#[test]
fn joiners_are_collected_for_a_while() {
    let mut stage = Stage::running(1, 4, 100, &["a"]);
    stage.report("a", 1, 0, 1);
    stage.hello("b", None);
    stage.ready("b");
    stage.pass(750, &["a", "b"]);
    assert_eq!(stage.view().state, JobState::Running);
    stage.hello("c", None);
    stage.ready("c");
    stage.pass(500, &["a", "b", "c"]);
    stage.left("a", 1, 1, &[]);
    assert_eq!(stage.formed("c").unwrap().1.members.len(), 3);
}

#[test]
fn a_credit_names_the_generation_and_ends_a_few_steps_ahead() {
    let mut stage = Stage::running(1, 2, 100, &["a", "b"]);
    assert_eq!(stage.beat("a", 1, 0, 0), Some(12));
    stage.report("b", 1, 1, 1);
    assert_eq!(stage.beat("a", 1, 0, 0), Some(13));
    assert_eq!(stage.beat("a", 2, 0, 0), None, "there is no generation 2");
    for step in 2..=95 {
        stage.report("a", 1, 0, step);
    }
    assert_eq!(stage.beat("a", 1, 0, 95), Some(100));
    stage.down("b");
    assert_eq!(stage.beat("a", 1, 0, 95), None, "the generation is being left");
}

#[test]
fn watchers_hear_when_a_member_gets_to_work_and_not_of_each_beat() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    let told = |stage: &Stage| stage.effects.iter().any(|effect| matches!(effect, Effect::StatusChanged(_)));
    let told_after = |stage: &mut Stage, phase| {
        stage.beat_in("a", 0, phase);
        told(stage)
    };
    assert!(!told_after(&mut stage, MemberPhase::Computing), "it computed before");
    assert!(!told_after(&mut stage, MemberPhase::Reducing));
    assert!(told_after(&mut stage, MemberPhase::Waiting));
    assert!(!told_after(&mut stage, MemberPhase::Waiting));
    assert!(told_after(&mut stage, MemberPhase::Computing));
}
