//! Three workers, one killed with SIGKILL at each place of the step protocol in turn: the run goes on with two, loses no
//! step, and trains each row exactly once.

use serde_json::Value;
use shanty_testkit::TinyJob;

use crate::support::{Place, final_loss, last_event};

/// Final loss against the undisturbed run: the sums are taken in another order by fewer ranks.
const LOSS_TOLERANCE: f64 = 1e-3;

/// 48 lines make about 40 rows: 14 steps of 6 cross the first epoch's end.
fn job() -> TinyJob {
    TinyJob { steps: 14, every_steps: 5, workers: (1, 3), ..TinyJob::default() }
}

fn killed_at(failpoint: &str) {
    killed_in(job(), failpoint);
}

/// Checkpoints are written beside training: with steps to spare, one is always left to be made after the loss.
fn killed_while_writing(failpoint: &str) {
    killed_in(TinyJob { steps: 200, ..job() }, failpoint);
}

fn killed_in(job: TinyJob, failpoint: &str) {
    let last_step = job.steps;
    let undisturbed = Place::new(job.clone()).unwrap();
    let straight = undisturbed.run(3).unwrap();
    let place = Place::new(job).unwrap().environment("SHANTY_FAILPOINT", failpoint);
    let finished = place.run(3).unwrap();

    let last = last_event(&finished).unwrap();
    assert_eq!(last["state"], "succeeded", "{failpoint}: {last}");
    let lost = finished.events_of("member_lost");
    assert_eq!(lost.len(), 1, "{failpoint}: one worker was lost: {lost:?}");
    assert!(!lost[0]["reason"].as_str().unwrap().is_empty(), "{failpoint}: the reason is told");
    assert!(lost[0]["detection_ms"].is_number(), "{failpoint}: {}", lost[0]);
    assert!(lost[0]["stall_ms"].is_number(), "{failpoint}: {}", lost[0]);

    let mut steps: Vec<u64> =
        finished.events_of("step").iter().filter_map(|event| event["step"].as_u64()).collect();
    // Who is killed may have told of the step in flight, which the others make without it: its rows count once all the same.
    steps.dedup();
    assert_eq!(
        steps,
        (1..=last_step).collect::<Vec<_>>(),
        "{failpoint}: no step is lost, none is made twice"
    );
    assert_eq!(finished.events_of("step").pop().unwrap()["workers"], 2, "{failpoint}: it went on with two");
    place.check_exactly_once().unwrap_or_else(|error| panic!("{failpoint}: {error}"));

    let (expected, loss) = (final_loss(&straight).unwrap(), final_loss(&finished).unwrap());
    assert!(
        (loss - expected).abs() <= LOSS_TOLERANCE,
        "{failpoint}: final loss {loss}, undisturbed {expected}"
    );

    let status = place.shanty.run(&["status", "tiny", "--output", "json"]).unwrap().expect_code(0).unwrap();
    let status = status.object().unwrap();
    assert_eq!(status["ledger"]["duplicates"], 0, "{failpoint}");
    let events = status["events"].as_array().unwrap();
    assert!(events.iter().any(|event| event["kind"] == "member_lost"), "{failpoint}: {events:?}");
    let logs = place.shanty.run(&["logs", "tiny", "--output", "json"]).unwrap().expect_code(0).unwrap();
    assert!(mentions_the_break(&logs.events()), "{failpoint}: the log tells of the break");
}

fn mentions_the_break(lines: &[Value]) -> bool {
    lines.iter().any(|line| line["text"].as_str().is_some_and(|text| text.contains("leaving the generation")))
}

#[test]
fn in_the_middle_of_backward() {
    killed_at("mid_backward@generation=1,step=5,rank=1");
}

#[test]
fn at_the_first_hop_of_the_ring() {
    killed_at("ring_hop_0@generation=1,step=5,rank=1");
}

#[test]
fn at_the_second_hop_of_the_ring() {
    killed_at("ring_hop_1@generation=1,step=5,rank=2");
}

#[test]
fn at_the_third_hop_of_the_ring_in_the_second_epoch() {
    killed_at("ring_hop_2@generation=1,step=11,rank=0");
}

#[test]
fn at_the_fourth_hop_of_the_ring() {
    killed_at("ring_hop_3@generation=1,step=5,rank=1");
}

#[test]
fn after_the_reduction_and_before_the_update() {
    killed_at("after_reduction@generation=1,step=5,rank=1");
}

#[test]
fn after_the_update_and_before_the_report() {
    killed_at("after_update@generation=1,step=5,rank=1");
}

#[test]
fn before_the_manifest() {
    killed_while_writing("before_manifest@generation=1,step=5,rank=0");
}

#[test]
fn after_the_manifest() {
    killed_while_writing("after_manifest@generation=1,step=5,rank=0");
}
