use shanty_coordinator::machine::{
    Announcement, Effect, Message,
    record::{JobState, Source},
};
use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Rank, Step};

use crate::stage::*;

#[test]
fn worker_killed_mid_step_keeps_sums_and_deals_rows_again() {
    let mut stage = Stage::running(1, 3, 10, &["a", "b", "c"]);
    for (rank, name) in ["a", "b", "c"].into_iter().enumerate() {
        stage.report(name, 1, rank as u32, 1);
    }
    let rows = order().step_rows(2);
    stage.now += 40;
    stage.down("b");
    let lost = stage.published("member_lost").unwrap();
    assert_eq!((lost.worker, lost.detection_ms), (Some(worker("b")), Some(40.0)));
    assert!(stage.was_told_to_leave("a") && stage.was_told_to_leave("c"));
    assert_eq!(stage.view().state, JobState::Recovering);
    stage.left("a", 1, 1, &rows[0..2]);
    assert!(stage.view().reason.ends_with("c to leave generation 1"), "{}", stage.view().reason);
    stage.left("c", 1, 1, &rows[4..5]);
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!(generation.generation.0, 2);
    assert_eq!(generation.start.applied, Step(1));
    assert_eq!(generation.start.source, Source::Members { donor: Rank(0), receivers: vec![] });
    let start = &generation.start.rows;
    assert_eq!((start[0].kept.as_slice(), start[1].kept.as_slice()), (&rows[0..2], &rows[4..5]));
    // b's two rows and c's second one: c held least, so it gets two, a one.
    assert_eq!((start[0].compute.len(), start[1].compute.len()), (1, 2));
    assert_eq!(stage.view().ledger.requeued, 2, "the rows that b had");
    stage.now += 900;
    stage.report("a", 2, 0, 2);
    let recovered = stage.published("recovered").unwrap();
    assert_eq!((recovered.stall_ms, recovered.detection_ms), (Some(900.0), Some(40.0)));
    assert_eq!(stage.view().step, Step(2));
}

#[test]
fn whoever_applied_the_step_gives_it_to_those_behind() {
    let mut stage = Stage::running(1, 3, 10, &["a", "b", "c"]);
    // c had the whole sum of step 1 and applied it; a and b did not get that far before b died.
    stage.down("b");
    let rows = order().step_rows(1);
    stage.left("a", 1, 0, &rows[0..2]);
    stage.left("c", 1, 1, &[]);
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!(generation.start.applied, Step(1));
    assert_eq!(generation.start.source, Source::Members { donor: Rank(1), receivers: vec![Rank(0)] });
    assert!(generation.start.rows.is_empty(), "a's sum is of a step that is over");
    assert_eq!(stage.view().step, Step(1), "leaving told of the step");
}

#[test]
fn a_step_that_only_the_dead_had_is_made_again() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.report("b", 1, 1, 1);
    assert_eq!(stage.view().step, Step(1));
    stage.down("b");
    let rows = order().step_rows(1);
    stage.left("a", 1, 0, &rows[..3]);
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!(generation.start.applied, Step(0));
    stage.report("a", 2, 0, 1);
    let replaced = stage.effects.iter().any(|effect| {
        matches!(effect, Effect::Record(shanty_coordinator::machine::Change::Step(_, record)) if record.generation.0 == 2)
    });
    assert!(replaced, "its record is that of the generation whose lineage goes on");
    assert_eq!(stage.view().step, Step(1));
    assert_eq!(stage.view().ledger.committed, BATCH);
}

#[test]
fn quorum_of_none_waits_for_credits_then_uses_checkpoint() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    for step in 1..=7 {
        stage.report("a", 1, 0, step);
    }
    stage.beat("a", 1, 0, 7);
    let credit_given = stage.now;
    stage.now += 100;
    stage.down("a");
    stage.down("b");
    assert!(
        stage.view().reason.contains("waits until the credits given to it have run out"),
        "{}",
        stage.view().reason
    );
    stage.hello("c", None);
    stage.ready("c");
    stage.now += 100;
    while stage.now < credit_given + 19_900 {
        stage.pass(250, &["c"]);
        assert!(!stage.looks_for_checkpoint(), "{} ms after the credit", stage.now - credit_given);
    }
    stage.pass(500, &["c"]);
    assert!(stage.looks_for_checkpoint());
    stage.found(5);
    assert_eq!(stage.view().step, Step(7), "nothing is taken back before the next generation is certain");
    stage.pass(4000, &["c"]);
    let (_, generation) = stage.formed("c").unwrap();
    assert_eq!(generation.start.source, Source::Checkpoint("checkpoints/5".to_owned()));
    assert_eq!(generation.start.applied, Step(5));
    let view = stage.view();
    assert_eq!(view.step, Step(5));
    // Steps 6 and 7: with 20 rows an epoch has steps of 6, 6, 6, 2.
    assert_eq!(view.ledger.recomputed, 12);
    assert_eq!(view.ledger.committed, ROWS + BATCH);
}

#[test]
fn whoever_comes_back_before_the_checkpoint_is_used_saves_its_steps() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.report("a", 1, 0, 1);
    stage.down("a");
    stage.down("b");
    let attachment = stage.attachment(1, 1, 1);
    stage.hello("b", Some(attachment));
    assert!(matches!(stage.told("b")[..], [Message::Welcome { attached: true }, Message::Leave { .. }]));
    let rows = order().step_rows(2);
    stage.left("b", 1, 1, &rows[3..]);
    let (_, generation) = stage.formed("b").unwrap();
    assert_eq!(generation.start.applied, Step(1));
    assert_eq!(generation.start.rows[0].kept, rows[3..]);
    assert_eq!(stage.view().ledger.recomputed, 0);
}

#[test]
fn report_of_an_older_generation_is_dropped() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.down("b");
    stage.left("a", 1, 0, &[]);
    assert!(stage.formed("a").is_some());
    stage.report("a", 1, 0, 1);
    assert_eq!(stage.view().step, Step(0));
    stage.report("a", 2, 1, 1);
    assert_eq!(stage.view().step, Step(0), "nor one of another rank than its own");
    stage.report("a", 2, 0, 1);
    assert_eq!(stage.view().step, Step(1));
}

#[test]
fn reports_twice_or_by_others_are_one_step() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.report("a", 1, 0, 1);
    let committed = |stage: &Stage| {
        stage
            .effects
            .iter()
            .filter(|effect| {
                matches!(effect, Effect::Publish(_, shanty_coordinator::machine::Point::Step(_)))
            })
            .count()
    };
    assert_eq!(committed(&stage), 1);
    stage.report("a", 1, 0, 1);
    assert_eq!(committed(&stage), 0);
    stage.report("b", 1, 1, 1);
    assert_eq!(committed(&stage), 0);
    assert_eq!(stage.view().ledger.committed, BATCH);
}

#[test]
fn broken_collective_asks_everybody_to_leave_also_who_said_so() {
    let mut stage = Stage::running(2, 2, 10, &["a", "b"]);
    let within = stage.within(1);
    stage
        .say("a", shanty_coordinator::machine::Said::Broken { within, error: "connection reset".to_owned() });
    assert!(stage.was_told_to_leave("a") && stage.was_told_to_leave("b"));
    assert!(stage.view().reason.contains("connection reset"));
    let rows = order().step_rows(1);
    stage.left("a", 1, 0, &rows[..3]);
    stage.left("b", 1, 0, &rows[3..]);
    let (_, generation) = stage.formed("b").unwrap();
    assert_eq!(generation.members.len(), 2);
    assert!(generation.start.rows.iter().all(|rows| rows.kept.len() == 3 && rows.compute.is_empty()));
}

#[test]
fn too_few_survivors_keep_their_sums_and_wait() {
    let mut stage = Stage::running(2, 2, 10, &["a", "b"]);
    let rows = order().step_rows(1);
    stage.down("a");
    stage.left("b", 1, 0, &rows[3..]);
    assert_eq!(stage.view().state, JobState::Recovering);
    assert!(stage.view().reason.starts_with("1 of at least 2 workers are ready"), "{}", stage.view().reason);
    stage.hello("c", None);
    stage.ready("c");
    let (_, generation) = stage.formed("c").unwrap();
    assert_eq!(generation.start.rows[0].kept, rows[3..]);
    assert_eq!(generation.start.rows[1].compute, rows[..3]);
}

#[test]
fn silent_worker_is_lost_and_its_stream_ended() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    let until = stage.now + 3500;
    let mut ended = false;
    while stage.now < until && !ended {
        stage.now += 250;
        stage.beat("a", 1, 0, 0);
        stage.tell(shanty_coordinator::machine::Event::Tick);
        ended = stage
            .effects
            .iter()
            .any(|effect| matches!(effect, Effect::Close { worker: w, .. } if *w == worker("b")));
    }
    assert!(ended);
    assert!(stage.was_told_to_leave("a"));
    assert_eq!(stage.published("member_lost").unwrap().detection_ms, Some(3250.0));
}

#[test]
fn a_coordinator_that_slept_blames_nobody() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.now += 3_600_000;
    stage.tell(shanty_coordinator::machine::Event::Tick);
    assert_eq!(stage.view().state, JobState::Running);
}

#[test]
fn a_member_that_never_leaves_is_lost() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    let within = stage.within(1);
    stage.say("a", shanty_coordinator::machine::Said::Broken { within, error: "reset".to_owned() });
    stage.left("a", 1, 0, &[]);
    stage.pass(59_000, &["a", "b"]);
    assert_eq!(stage.view().state, JobState::Recovering);
    stage.pass(1_500, &["a", "b"]);
    assert_eq!(stage.view().generation.0, 2);
    assert_eq!(stage.view().members.len(), 1);
}

#[test]
fn wrong_reduction_stops_the_job() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    let leased = announcement(1);
    stage.report_as("b", 1, 1, 1, Announcement { row_hash: leased.row_hash ^ 1, ..leased });
    let view = stage.view();
    assert_eq!(view.state, JobState::Failed);
    let error = view.failure.unwrap().diagnostic();
    assert_eq!((error.code.as_str(), error.kind), ("SH0601", Kind::Internal));
    assert!(matches!(stage.told("a")[..], [Message::Release { succeeded: false, .. }]));
}

#[test]
fn what_no_repeat_helps_fails_the_job() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.fails("b", Diagnostic::new("SH0301", "the model has no q_proj").hint("see its config.json"));
    let view = stage.view();
    assert_eq!(view.state, JobState::Failed);
    assert!(view.reason.starts_with("SH0301: b: the model has no q_proj"), "{}", view.reason);
    assert_eq!(view.failure.unwrap().error.hint.as_deref(), Some("see its config.json"));
}

#[test]
fn a_passing_failure_costs_the_worker_not_the_job() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.fails("b", Diagnostic::new("SH0801", "out of memory").kind(Kind::Transient));
    assert!(stage.was_told_to_leave("a"));
    stage.left("a", 1, 0, &[]);
    assert_eq!(stage.view().generation.0, 2);
    stage.pass(9000, &["a", "b"]);
    assert!(!stage.told("b").iter().any(|message| matches!(message, Message::Assign { .. })));
    let mut asked = false;
    for _ in 0..10 {
        stage.pass(250, &["a", "b"]);
        asked |= stage.told("b").iter().any(|message| matches!(message, Message::Assign { .. }));
    }
    assert!(asked, "it is asked again after a while");
}

#[test]
fn losing_everybody_three_times_without_a_new_step_fails_the_job() {
    let mut stage = Stage::running(1, 1, 10, &["a"]);
    stage.report("a", 1, 0, 1);
    stage.down("a");
    for (number, name) in ["b", "c"].into_iter().enumerate() {
        stage.pass(21_000, &[]);
        stage.found(0);
        stage.hello(name, None);
        stage.ready(name);
        let generation = number as u64 + 2;
        assert_eq!(stage.view().generation.0, generation);
        stage.beat(name, generation, 0, 0);
        stage.report(name, generation, 0, 1);
        stage.down(name);
    }
    let view = stage.view();
    assert_eq!(view.state, JobState::Failed);
    assert_eq!(view.failure.unwrap().error.code, "SH0777");
    assert!(view.reason.contains("3 times without getting beyond step 1"), "{}", view.reason);
}

#[test]
fn generations_that_never_make_a_step_fail_the_job() {
    let mut stage = Stage::running(2, 2, 10, &["a", "b"]);
    for generation in 1..20 {
        let within = stage.within(generation);
        stage.say("a", shanty_coordinator::machine::Said::Broken { within, error: "refused".to_owned() });
        stage.left("a", generation, 0, &[]);
        stage.left("b", generation, 0, &[]);
        assert_eq!(stage.view().generation.0, generation + 1);
    }
    let within = stage.within(20);
    stage.say("a", shanty_coordinator::machine::Said::Broken { within, error: "refused".to_owned() });
    assert_eq!(stage.view().state, JobState::Failed);
    assert!(stage.view().reason.contains("20 generations in a row"), "{}", stage.view().reason);
}

#[test]
fn one_that_never_held_the_state_is_no_survivor() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.down("b");
    stage.left_empty_handed("a", 1);
    assert!(stage.published("all_lost").is_some(), "a has nothing to go on with");
    assert!(
        stage
            .formed("a")
            .is_none_or(|(_, generation)| !matches!(generation.start.source, Source::Members { .. }))
    );
}
