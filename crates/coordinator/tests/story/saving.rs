//! Checkpoints that a user wants, and what became of a job's time.

use shanty_coordinator::machine::{Event, Message, Refusal, Reply, Said, record::JobState};
use shanty_proto::Step;

use crate::stage::*;

fn is_save(message: &Message) -> bool {
    matches!(message, Message::Save { .. })
}

fn writes(stage: &mut Stage, name: &str, generation: u64, step: u64) {
    let written = Said::Checkpoint {
        within: stage.within(generation),
        step: Step(step),
        path: format!("checkpoints/{step}"),
        size_bytes: 1,
        seconds: 0.1,
        removed: Vec::new(),
        held_seconds: 0.0,
    };
    stage.say(name, written);
}

#[test]
fn a_checkpoint_that_a_user_wants_is_asked_of_all_and_of_the_next_generation_until_it_is_there() {
    let mut stage = Stage::running(1, 2, 20, &["a", "b"]);
    for (rank, name) in (0..).zip(["a", "b"]) {
        stage.report(name, 1, rank, 1);
    }
    stage.tell(Event::CheckpointNow { request: 1, job: job() });
    assert_eq!(stage.reply(), Ok(Reply::CheckpointAsked(Step(1))));
    for name in ["a", "b"] {
        assert!(stage.told(name).iter().any(is_save), "{name} is told: {:?}", stage.told(name));
    }
    assert!(stage.published("checkpoint_asked").is_some());
    // The generation breaks before anybody wrote it: the next one is told.
    stage.down("b");
    stage.left("a", 1, 1, &[]);
    assert!(stage.formed("a").is_some(), "{}", stage.view().reason);
    assert!(stage.told("a").iter().any(is_save));
    // That of an earlier step is not the one.
    writes(&mut stage, "a", 2, 1);
    stage.report("a", 2, 0, 2);
    writes(&mut stage, "a", 2, 2);
    // Now it is there: a later generation is told nothing.
    stage.hello("c", None);
    stage.ready("c");
    stage.pass(2000, &["a", "c"]);
    stage.report("a", 2, 0, 3);
    stage.report("a", 2, 0, 4);
    stage.left("a", 2, 4, &[]);
    assert!(stage.formed("c").is_some(), "{}", stage.view().reason);
    assert!(!stage.told("c").iter().any(is_save) && !stage.told("a").iter().any(is_save));
}

#[test]
fn what_is_not_at_work_has_nothing_to_save() {
    let mut stage = Stage::empty();
    stage.submit("r1", &spec("pirate", 1, 1, 5)).unwrap();
    stage.tell(Event::CheckpointNow { request: 2, job: job() });
    let refused = |state| Err(Refusal::WrongState { job: job(), action: "write a checkpoint of", state });
    assert_eq!(stage.reply(), refused(JobState::Preparing));
    stage.tell(Event::Cancel { request: 3, job: job() });
    stage.tell(Event::CheckpointNow { request: 4, job: job() });
    assert_eq!(stage.reply(), refused(JobState::Cancelled));
}

#[test]
fn time_is_productive_stalled_or_recomputed_and_a_restart_forgets_none_of_it() {
    let mut stage = Stage::running(1, 2, 20, &["a", "b"]);
    for step in 1..=3 {
        stage.report("a", 1, 0, step);
        stage.report("b", 1, 1, step);
    }
    let productive = stage.view().time.productive_seconds;
    assert!(productive > 0.0);
    stage.down("b");
    stage.pass(1000, &["a"]);
    let time = stage.view().time;
    assert!(time.stalled_seconds >= 0.9, "a break that lasts counts: {time:?}");
    assert_eq!((time.productive_seconds, time.recomputed_seconds), (productive, 0.0));
    stage.left("a", 1, 3, &[]);
    stage.report("a", 2, 0, 4);
    let time = stage.view().time;
    assert!(time.productive_seconds > productive, "{time:?}");
    let record = stage.saved().expect("a recovery is saved");
    assert_eq!(record.health.time.productive_seconds, time.productive_seconds);
    let stalled = time.stalled_seconds;
    stage.pass(1000, &["a"]);
    assert_eq!(stage.view().time.stalled_seconds, stalled, "it is over");
    assert_eq!(stage.restarted(record).view().time.stalled_seconds, stalled);
}
