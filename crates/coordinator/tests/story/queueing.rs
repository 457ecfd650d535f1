//! Several jobs on one pool of workers.

use shanty_coordinator::machine::{Effect, Event, Message, Reply, Said, record::JobState};
use shanty_diagnostic::{Diagnostic, Kind};
use shanty_proto::{Attempt, Generation, JobId, Step};

use crate::stage::*;

fn id(job: &str) -> JobId {
    JobId::new(job).unwrap()
}

fn with_priority(mut spec: serde_json::Value, priority: u32) -> serde_json::Value {
    spec["cluster"]["priority"] = priority.into();
    spec
}

fn assigned(stage: &Stage, worker: &str) -> Option<JobId> {
    stage.told(worker).into_iter().find_map(|message| match message {
        Message::Assign { job, .. } => Some(job),
        _ => None,
    })
}

fn released(stage: &Stage, worker: &str) -> Option<String> {
    stage.told(worker).into_iter().find_map(|message| match message {
        Message::Release { reason, .. } => Some(reason),
        _ => None,
    })
}

#[test]
fn jobs_run_side_by_side_each_with_its_own_workers() {
    let mut stage = Stage::with_job(1, 1, 5);
    stage.submit("r2", &spec("second", 1, 1, 5)).unwrap();
    stage.prepared("second");
    assert_eq!(stage.view_of("second").state, JobState::Queued);
    stage.hello("a", None);
    assert_eq!(assigned(&stage, "a"), Some(job()));
    stage.hello("b", None);
    assert_eq!(assigned(&stage, "b"), Some(id("second")));
    stage.ready("a");
    assert_eq!(stage.formed("a").unwrap().1.members.len(), 1);
    stage.ready_for("b", "second");
    assert_eq!(stage.formed("b").unwrap().1.members.len(), 1);
    assert_eq!(stage.view().state, JobState::Running);
    assert_eq!(stage.view_of("second").state, JobState::Running);
    // A loss in one is nothing to the other.
    stage.down("b");
    assert_eq!(stage.view_of("second").state, JobState::Recovering);
    assert_eq!((stage.view().state, stage.view().generation), (JobState::Running, Generation(1)));
}

#[test]
fn a_waiting_job_says_why_is_prepared_ahead_and_begins_when_workers_are_free() {
    let mut stage = Stage::running(1, 1, 2, &["a"]);
    stage.submit("r2", &spec("second", 1, 1, 2)).unwrap();
    let ahead = |stage: &Stage| {
        stage
            .effects
            .iter()
            .any(|effect| matches!(effect, Effect::Prepare { job, .. } if *job == id("second")))
    };
    assert!(ahead(&stage), "no worker waits for its data later");
    stage.submit("r3", &spec("third", 1, 1, 2)).unwrap();
    assert!(!ahead(&stage), "one at a time");
    stage.prepared("second");
    assert_eq!(stage.view_of("second").state, JobState::Queued);
    assert_eq!(stage.view_of("second").reason, "needs 1 worker, 0 are free; job pirate has 1");
    assert_eq!(stage.view_of("third").state, JobState::Preparing);
    stage.prepared("third");
    assert_eq!(stage.view_of("third").reason, "needs 1 worker, 0 are free; behind job second of priority 50");
    assert_eq!((stage.view_of("second").place, stage.view_of("third").place), (Some(1), Some(2)));

    stage.report("a", 1, 0, 1);
    stage.report("a", 1, 0, 2);
    let within = stage.within(1);
    stage.say("a", Said::Finished { within, step: Step(2), adapter: "/runs/pirate/adapter".to_owned() });
    assert!(matches!(
        stage.told("a")[..],
        [Message::Release { succeeded: true, .. }, Message::Assign { .. }]
    ));
    assert_eq!(assigned(&stage, "a"), Some(id("second")));
    assert_eq!(stage.view().state, JobState::Succeeded);
    assert_eq!(stage.view_of("second").state, JobState::Forming);
    assert_eq!(stage.view_of("third").reason, "needs 1 worker, 0 are free; job second has 1");
}

/// The pirate runs on two workers and has made three steps; a more urgent job comes.
fn overtaken(min: u32) -> Stage {
    let mut stage = Stage::running(min, 2, 10, &["a", "b"]);
    for step in 1..=3 {
        stage.report("a", 1, 0, step);
        stage.report("b", 1, 1, step);
    }
    stage.submit("r2", &with_priority(spec("urgent", 1, 1, 5), 90)).unwrap();
    for name in ["a", "b"] {
        let told = stage.told(name);
        let leave = told.iter().find_map(|message| match message {
            Message::Leave { after, .. } => Some(*after),
            _ => None,
        });
        assert_eq!(leave, Some(Some(Step(4))), "after the step that is under way: {told:?}");
    }
    stage.prepared("urgent");
    stage
}

/// Both make the step that was under way, and leave.
fn part(stage: &mut Stage) {
    for (rank, name) in [(1, "b"), (0, "a")] {
        stage.report(name, 1, rank, 4);
        stage.left(name, 1, 4, &[]);
    }
}

#[test]
fn a_job_gives_up_workers_that_it_can_do_without() {
    let mut stage = overtaken(1);
    part(&mut stage);
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!((generation.members.len(), generation.start.applied), (1, Step(4)));
    assert!(released(&stage, "b").is_some());
    assert_eq!(assigned(&stage, "b"), Some(id("urgent")));
    assert_eq!(stage.view().ledger.requeued, 0, "nobody had begun step 5");
    assert_eq!(stage.view().state, JobState::Running);
    assert_eq!(stage.view_of("urgent").state, JobState::Forming);
    // It does not take it back while the other one runs.
    stage.ready_for("b", "urgent");
    stage.pass(5000, &["a", "b"]);
    assert_eq!((stage.view().generation, stage.view().share), (Generation(2), 1));
}

#[test]
fn a_job_of_lower_priority_makes_room_by_a_checkpoint_and_loses_no_step() {
    let mut stage = overtaken(2);
    part(&mut stage);
    let keep = Message::Keep { job: job(), attempt: Attempt(1), generation: Generation(1), step: Step(4) };
    assert_eq!(stage.told("a"), std::slice::from_ref(&keep));
    assert_eq!(stage.view().reason, "gives way to job urgent; writes a checkpoint of step 4");
    // Its writer is lost: the other one has the state too.
    stage.down("a");
    assert_eq!(stage.told("b"), [keep]);
    let within = stage.within(1);
    let path = "checkpoints/00000004-a1-g1".to_owned();
    let removed = Vec::new();
    stage.say(
        "b",
        Said::Checkpoint {
            within,
            step: Step(4),
            path,
            size_bytes: 1,
            seconds: 0.1,
            removed,
            held_seconds: 0.0,
        },
    );
    assert_eq!(released(&stage, "b").as_deref(), Some("gave way to job urgent"));
    assert_eq!(assigned(&stage, "b"), Some(id("urgent")));
    let record = stage.saved().unwrap();
    assert_eq!(record.state, JobState::Queued);
    // It keeps nobody from anything while it waits for more workers to connect, and loads ahead.
    stage.tell(Event::Tick);
    assert!(stage.looks_for_checkpoint(), "{}", stage.view().reason);
    stage.found(4);
    let view = stage.view();
    assert_eq!((view.state, view.step, view.share), (JobState::Forming, Step(4), 0));
    assert_eq!(view.reason, "0 of at least 2 workers are ready; 1 more must connect");

    // The urgent job ends, and another worker comes.
    stage.ready_for("b", "urgent");
    stage.tell(Event::Cancel { request: 1, job: id("urgent") });
    stage.hello("c", None);
    stage.ready("b");
    stage.ready("c");
    let (_, generation) = stage.formed("b").unwrap();
    assert_eq!((generation.generation, generation.start.applied), (Generation(2), Step(4)));
    assert_eq!(stage.view().ledger.recomputed, 0, "nothing is trained twice");
}

#[test]
fn a_job_that_can_write_no_checkpoint_stays_at_work() {
    let mut stage = overtaken(2);
    stage.left("a", 1, 3, &[]);
    stage.left("b", 1, 3, &[]);
    let error = Diagnostic::new("SH0530", "the store is full").kind(Kind::Transient);
    let within = stage.within(1);
    stage.say("a", Said::CheckpointFailed { within, step: Step(3), error });
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!((generation.generation, generation.start.applied), (Generation(2), Step(3)));
    assert_eq!(stage.view().state, JobState::Running);
    let kinds: Vec<String> = stage.view().events.into_iter().map(|event| event.kind).collect();
    assert!(
        kinds.contains(&"checkpoint_failed".to_owned()) && kinds.contains(&"stays".to_owned()),
        "{kinds:?}"
    );
    stage.report("a", 2, 0, 4);
    stage.pass(59_000, &["a", "b"]);
    assert_eq!(stage.view().generation, Generation(2), "it is not asked again at once");
    stage.pass(2_000, &["a", "b"]);
    assert_eq!(stage.view().state, JobState::Recovering);
}

#[test]
fn a_job_that_was_about_to_make_room_stays_if_the_other_is_cancelled() {
    let mut stage = overtaken(2);
    stage.left("a", 1, 3, &[]);
    stage.tell(Event::Cancel { request: 1, job: id("urgent") });
    stage.left("b", 1, 3, &[]);
    assert_eq!(stage.formed("a").unwrap().1.start.applied, Step(3));
    assert_eq!(stage.view().state, JobState::Running);
}

#[test]
fn a_resumed_job_names_the_edits_that_it_does_not_obey() {
    let mut stage = Stage::running(1, 1, 10, &["a"]);
    stage.tell(Event::Cancel { request: 1, job: job() });
    let mut edited = spec("pirate", 1, 1, 99);
    edited["cluster"]["owner"] = "somebody".into();
    stage.tell(Event::Resume { request: 2, job: job(), job_file: Some(edited) });
    let Ok(Reply::Resumed { ignored, .. }) = stage.reply() else { panic!("{:?}", stage.reply()) };
    let ignored: Vec<String> = ignored.iter().map(ToString::to_string).collect();
    assert_eq!(ignored, ["train.steps = 99 (submitted with 10)"]);
    let event = stage.published("job_file_differs").expect("everybody can see it");
    assert!(event.text.contains("train.steps = 99"), "{}", event.text);
}

#[test]
fn lost_hosts_are_tried_again_after_a_pause_and_wrong_input_never() {
    let mut stage = Stage::running(1, 1, 10, &["a"]);
    stage.down("a");
    stage.pass(20_250, &[]);
    assert!(
        stage.looks_for_checkpoint(),
        "the first repeat comes as soon as it may: {}",
        stage.view().reason
    );
    stage.found(0);
    stage.hello("b", None);
    stage.ready("b");
    assert_eq!(stage.view().generation, Generation(2));
    let attachment = stage.attachment(2, 0, 0);
    stage.say(
        "b",
        Said::Beat {
            sequence: 1,
            phase: shanty_coordinator::machine::MemberPhase::Computing,
            attachment: Some(attachment),
            progress: 0,
        },
    );
    stage.left_empty_handed("b", 2);
    assert_eq!(stage.view().state, JobState::Recovering);
    assert!(
        stage.view().reason.contains("lost 2 times in a row; tries again in 5 s"),
        "{}",
        stage.view().reason
    );
    stage.pass(4_750, &["b"]);
    assert!(!stage.looks_for_checkpoint());
    stage.pass(500, &["b"]);
    assert!(stage.looks_for_checkpoint());
    stage.found(0);
    stage.pass(4_000, &["b"]);
    stage.fails("b", Diagnostic::new("SH0301", "no such module"));
    assert_eq!(stage.view().state, JobState::Failed);
    stage.pass(600_000, &["b"]);
    assert_eq!(stage.view().state, JobState::Failed);
}

#[test]
fn data_that_a_server_did_not_give_is_prepared_again() {
    let mut stage = Stage::empty();
    stage.submit("r1", &spec("pirate", 1, 1, 5)).unwrap();
    let passing = || Diagnostic::new("SH0225", "the store does not answer").kind(Kind::Transient);
    let prepares =
        |stage: &Stage| stage.effects.iter().any(|effect| matches!(effect, Effect::Prepare { .. }));
    for pause in [0, 5_000] {
        stage.tell(Event::PrepareEnded { job: job(), attempt: Attempt(1), outcome: Err(passing()) });
        assert_eq!(stage.view().state, if pause == 0 { JobState::Preparing } else { JobState::Queued });
        if pause > 0 {
            stage.pass(pause - 250, &[]);
            assert_eq!(stage.view().state, JobState::Queued, "{}", stage.view().reason);
            stage.pass(250, &[]);
        }
        assert!(prepares(&stage), "after {pause} ms");
    }
    stage.tell(Event::PrepareEnded { job: job(), attempt: Attempt(1), outcome: Err(passing()) });
    assert_eq!(stage.view().state, JobState::Failed, "three times is enough");
}
