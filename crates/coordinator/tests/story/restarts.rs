use shanty_coordinator::machine::{
    Message,
    record::{JobRecord, JobState, Source},
};
use shanty_proto::Step;

use crate::stage::*;

/// A job of two workers that has made three steps, as it is durable.
fn interrupted() -> (Stage, JobRecord) {
    let mut stage = Stage::with_job(1, 2, 10);
    for name in ["a", "b"] {
        stage.hello(name, None);
    }
    stage.ready("a");
    stage.ready("b");
    let mut record = stage.saved().unwrap();
    record.watermark = Step(3);
    record.furthest = Step(3);
    (stage, record)
}

#[test]
fn restart_with_all_back_goes_on_without_a_break() {
    let (stage, record) = interrupted();
    let mut stage = stage.restarted(record);
    assert_eq!(stage.view().state, JobState::Running);
    let first = stage.attachment(1, 0, 5);
    stage.hello("a", Some(first));
    assert!(matches!(stage.told("a")[..], [Message::Welcome { attached: true }]));
    assert_eq!(stage.view().step, Step(5), "the watermark may lag; who comes back raises it");
    let second = stage.attachment(1, 1, 4);
    stage.hello("b", Some(second));
    assert_eq!(stage.view().step, Step(5));
    assert_eq!(stage.beat("a", 1, 0, 5), Some(10));
    for _ in 0..100 {
        stage.now += 250;
        stage.beat("a", 1, 0, 5);
        stage.beat("b", 1, 1, 5);
        stage.tell(shanty_coordinator::machine::Event::Tick);
    }
    assert_eq!((stage.view().state, stage.view().generation.0), (JobState::Running, 1));
    stage.report("b", 1, 1, 6);
    assert_eq!(stage.view().step, Step(6));
}

#[test]
fn restart_gives_members_a_full_credit() {
    let (stage, record) = interrupted();
    let mut stage = stage.restarted(record);
    let began = stage.now;
    let first = stage.attachment(1, 0, 3);
    stage.hello("a", Some(first));
    while stage.now < began + 19_750 {
        stage.now += 250;
        stage.beat("a", 1, 0, 3);
        stage.tell(shanty_coordinator::machine::Event::Tick);
        assert!(!stage.was_told_to_leave("a"), "after {} ms", stage.now - began);
    }
    stage.now += 250;
    stage.beat("a", 1, 0, 3);
    stage.tell(shanty_coordinator::machine::Event::Tick);
    assert!(stage.was_told_to_leave("a"), "b did not come back");
    stage.left("a", 1, 3, &[]);
    assert_eq!(stage.formed("a").unwrap().1.start.applied, Step(3));
}

#[test]
fn restart_with_nobody_back_returns_to_a_checkpoint() {
    let (stage, record) = interrupted();
    let mut stage = stage.restarted(record);
    stage.hello("c", None);
    stage.pass(19_000, &["c"]);
    assert!(!stage.looks_for_checkpoint());
    stage.pass(1_250, &["c"]);
    assert!(stage.looks_for_checkpoint());
    stage.found(2);
    stage.ready("c");
    stage.pass(3_500, &["c"]);
    let (_, generation) = stage.formed("c").unwrap();
    assert_eq!((generation.generation.0, generation.start.applied), (2, Step(2)));
    assert_eq!(stage.view().ledger.recomputed, 6);
}

#[test]
fn a_generation_made_durable_and_not_announced_is_announced_again() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.down("b");
    let rows = order().step_rows(1);
    stage.left("a", 1, 0, &rows[..3]);
    let (_, announced) = stage.formed("a").unwrap();
    let record = stage.saved().unwrap();
    // The coordinator dies between the two: a has left generation 1 and knows of no other.
    let mut stage = stage.restarted(record);
    let attachment = stage.attachment(1, 0, 0);
    stage.hello("a", Some(attachment));
    assert!(matches!(stage.told("a")[..], [Message::Welcome { attached: true }, Message::Form { .. }]));
    assert_eq!(stage.formed("a").unwrap().1, announced, "word for word, so that nobody has another one");
    // It says again that it left generation 1, which is old news.
    stage.left("a", 1, 0, &rows[..3]);
    assert_eq!(stage.view().state, JobState::Running);
    stage.report("a", 2, 0, 1);
    assert_eq!(stage.view().step, Step(1));
}

#[test]
fn who_left_before_the_restart_says_so_again_and_keeps_its_sum() {
    let (stage, mut record) = interrupted();
    record.watermark = Step(0);
    record.state = JobState::Recovering;
    let mut stage = stage.restarted(record);
    let rows = order().step_rows(1);
    let first = stage.attachment(1, 0, 0);
    stage.hello("a", Some(first));
    stage.left("a", 1, 0, &rows[..3]);
    let second = stage.attachment(1, 1, 0);
    stage.hello("b", Some(second));
    assert!(stage.was_told_to_leave("b"));
    stage.left("b", 1, 0, &rows[3..4]);
    let (_, generation) = stage.formed("a").unwrap();
    assert!(matches!(generation.start.source, Source::Members { .. }));
    assert_eq!(generation.start.rows[0].kept, rows[..3]);
    assert_eq!(generation.start.rows[1].compute, rows[4..]);
}

#[test]
fn resume_of_an_interrupted_job_is_a_new_attempt_after_the_fence() {
    let (stage, record) = interrupted();
    let mut stage = stage.restarted(record);
    let began = stage.now;
    stage.tell(shanty_coordinator::machine::Event::Resume { request: 1, job: job(), job_file: None });
    assert_eq!(
        stage.reply().unwrap(),
        shanty_coordinator::machine::Reply::Resumed {
            attempt: shanty_proto::Attempt(2),
            step: Step(0),
            ignored: Vec::new()
        }
    );
    stage.attempt = 2;
    stage.prepared("pirate");
    stage.hello("c", None);
    stage.ready("c");
    // A member of the old generation is refused: its attempt is over.
    let mut late = stage.attachment(1, 0, 4);
    late.attempt = shanty_proto::Attempt(1);
    stage.hello("a", Some(late));
    assert!(matches!(stage.told("a")[0], Message::Welcome { attached: false }));
    stage.pass(began + 19_500 - stage.now, &["c"]);
    assert!(!stage.looks_for_checkpoint());
    stage.pass(1_000, &["c"]);
    assert!(stage.looks_for_checkpoint());
    stage.found(2);
    stage.pass(3_500, &["c"]);
    assert_eq!(stage.formed("c").unwrap().1.generation.0, 2);
    assert_eq!(stage.view().attempt.0, 2);
}

#[test]
fn who_was_lost_before_a_restart_is_not_lost_a_second_time() {
    let mut stage = Stage::running(1, 1, 10, &["a"]);
    stage.report("a", 1, 0, 1);
    stage.down("a");
    let record = stage.saved().unwrap();
    let mut stage = stage.restarted(record);
    assert_eq!(stage.view().state, JobState::Recovering);
    stage.hello("a", None);
    stage.pass(20_250, &["a"]);
    let view = stage.view();
    assert_eq!(view.reason, "looks for the newest good checkpoint");
    assert!(view.events.iter().all(|event| event.kind != "all_lost"), "{:?}", view.events);
    assert_eq!(view.crew.coordinator_restarts, 1);
}
