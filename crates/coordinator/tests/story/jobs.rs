use shanty_coordinator::machine::{Effect, Event, Message, Refusal, Reply, Said, record::JobState};
use shanty_diagnostic::Diagnostic;
use shanty_proto::{Attempt, JobId, Step};

use crate::stage::*;

#[test]
fn submitting_twice_with_one_request_id_gives_one_job() {
    let mut stage = Stage::empty();
    let pirate = spec("pirate", 1, 1, 5);
    assert_eq!(stage.submit("r1", &pirate), Ok(Reply::Submitted(job())));
    assert!(matches!(stage.effects[0], Effect::Persist(_)), "durable before it is answered");
    assert_eq!(stage.submit("r1", &pirate), Ok(Reply::Submitted(job())));
    assert_eq!(stage.submit("r1", &spec("pirate", 1, 2, 5)), Err(Refusal::OtherSpec(job())));
    assert_eq!(stage.submit("r2", &pirate), Err(Refusal::StoreTaken(job())));
    let mut elsewhere = pirate.clone();
    elsewhere["checkpoint"]["store"] = "/elsewhere".into();
    assert_eq!(stage.submit("r3", &elsewhere), Ok(Reply::Submitted(JobId::new("pirate-2").unwrap())));
    assert_eq!(stage.machine.views(stage.moment()).len(), 2);
}

#[test]
fn finished_counts_only_after_all_steps_and_from_rank_0() {
    let mut stage = Stage::running(1, 2, 3, &["a", "b"]);
    let within = stage.within(1);
    let finished =
        |step| Said::Finished { within: within.clone(), step: Step(step), adapter: "x".to_owned() };
    stage.say("a", finished(2));
    stage.say("b", finished(3));
    assert_eq!(stage.view().state, JobState::Running);
    stage.say("a", finished(3));
    assert_eq!((stage.view().state, stage.view().step), (JobState::Succeeded, Step(3)));
}

#[test]
fn failed_preparation_fails_the_job_with_its_place() {
    let mut stage = Stage::empty();
    stage.submit("r1", &spec("pirate", 1, 1, 5)).unwrap();
    let (attempt, error) =
        (Attempt(1), Diagnostic::new("SH0203", "no JSON").in_file("/train.jsonl").at_line(3));
    stage.tell(Event::PrepareProgress { job: job(), attempt, text: "tokenises (40 %)".to_owned() });
    assert_eq!(stage.view().reason, "prepares its data: tokenises (40 %)");
    stage.tell(Event::PrepareEnded { job: job(), attempt, outcome: Err(error.clone()) });
    assert_eq!(stage.view().state, JobState::Failed);
    assert_eq!(stage.view().failure.unwrap().diagnostic(), error);
}

#[test]
fn cancelling_lets_workers_go_and_is_no_mistake_twice() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.tell(Event::Cancel { request: 1, job: job() });
    assert_eq!(stage.reply(), Ok(Reply::Cancelled(JobState::Cancelled)));
    assert!(matches!(stage.told("a")[..], [Message::Release { succeeded: false, .. }]));
    assert_eq!(stage.saved().unwrap().state, JobState::Cancelled);
    stage.tell(Event::Cancel { request: 2, job: job() });
    assert_eq!(stage.reply(), Ok(Reply::Cancelled(JobState::Cancelled)));
    let nobody = JobId::new("nobody").unwrap();
    stage.tell(Event::Cancel { request: 3, job: nobody.clone() });
    assert_eq!(stage.reply(), Err(Refusal::NoSuchJob(nobody)));
}

#[test]
fn cancelling_stops_preparation() {
    let mut stage = Stage::empty();
    stage.submit("r1", &spec("pirate", 1, 1, 5)).unwrap();
    stage.tell(Event::Cancel { request: 1, job: job() });
    assert!(stage.effects.iter().any(|effect| matches!(effect, Effect::StopPrepare { .. })));
    stage.prepared("pirate");
    assert_eq!(stage.view().state, JobState::Cancelled);
}

#[test]
fn resume_of_a_cancelled_job_goes_on_once_one_worker_is_known_to_be_out() {
    let mut stage = Stage::running(1, 2, 10, &["a", "b"]);
    stage.report("a", 1, 0, 1);
    stage.tell(Event::Resume { request: 1, job: job(), job_file: None });
    assert!(matches!(
        stage.reply(),
        Err(Refusal::WrongState { action: "resume", state: JobState::Running, .. })
    ));
    stage.tell(Event::Cancel { request: 2, job: job() });
    // Its next beat names no generation any more: it has heard that it is released.
    stage.pass(250, &["a"]);
    stage.tell(Event::Resume { request: 3, job: job(), job_file: None });
    assert!(matches!(stage.reply(), Ok(Reply::Resumed { attempt: Attempt(2), .. })));
    stage.attempt = 2;
    stage.prepared("pirate");
    assert!(stage.looks_for_checkpoint(), "a step needs all members, and a is out: {}", stage.view().reason);
    stage.found(0);
    stage.ready("a");
    stage.ready("b");
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!((generation.generation.0, generation.start.applied), (2, Step(0)));
    assert_eq!(stage.view().ledger.recomputed, BATCH);
}

#[test]
fn resume_of_changed_data_is_refused() {
    let mut stage = Stage::running(1, 1, 10, &["a"]);
    stage.report("a", 1, 0, 1);
    stage.tell(Event::Cancel { request: 1, job: job() });
    stage.tell(Event::Resume { request: 2, job: job(), job_file: None });
    let facts = shanty_coordinator::machine::record::DataFacts {
        hash: "other".to_owned(),
        tokenizer_hash: "tokenizer".to_owned(),
        train_rows: ROWS,
        eval_rows: 0,
        train_tokens: 1,
        train_trained_tokens: 1,
        train_mix: Vec::new(),
        warnings: Vec::new(),
    };
    stage.tell(Event::PrepareEnded { job: job(), attempt: Attempt(2), outcome: Ok(facts) });
    assert_eq!(stage.view().state, JobState::Failed);
    assert_eq!(stage.view().failure.unwrap().error.code, "SH0774");
}
