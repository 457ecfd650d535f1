//! One case after the other.

use super::*;

#[test]
fn an_idle_pool_goes_to_the_only_job_up_to_its_most() {
    assert_eq!(told(&[job("a", "", 0, 1, 4)], pool(3)), ["a works with 3"]);
    assert_eq!(told(&[job("a", "", 0, 1, 2)], pool(3)), ["a works with 2"]);
}

#[test]
fn the_first_job_begins_to_gather_before_any_worker_is_there() {
    let jobs = [job("a", "", 0, 1, 1), job("b", "", 0, 1, 1)];
    assert_eq!(told(&jobs, pool(0)), ["a works with 0", "b: needs 1 worker, 0 are free, 0 connected in all"]);
}

#[test]
fn equals_do_not_disturb_each_other_and_the_waiting_ones_stand_in_line() {
    let jobs = [at_work(job("a", "", 5, 1, 1), 1), job("b", "", 5, 2, 2), job("c", "", 5, 1, 1)];
    assert_eq!(
        told(&jobs, pool(2)),
        [
            "a works with 1",
            "b: needs 2 workers, 1 is free; job a has 1",
            "c: needs 1 worker, 1 is free; behind job b of priority 5",
        ]
    );
}

#[test]
fn a_waiting_job_gets_what_equals_hold_beyond_their_least() {
    let jobs = [at_work(job("a", "", 0, 1, 4), 4), job("b", "", 0, 2, 2)];
    assert_eq!(told(&jobs, pool(4)), ["a works with 2", "b works with 2"]);
    // But of a higher priority it gets none of that.
    let jobs = [at_work(job("a", "", 1, 1, 4), 4), job("b", "", 0, 2, 2)];
    assert_eq!(told(&jobs, pool(4)), ["a works with 4", "b: needs 2 workers, 0 are free; job a has 4"]);
}

#[test]
fn a_job_of_higher_priority_sends_lower_ones_home_youngest_first_and_no_more_than_it_must() {
    let low = |name: &str| at_work(job(name, "", 1, 1, 1), 1);
    let jobs = [low("a"), low("b"), low("c"), job("z", "", 5, 1, 1)];
    assert_eq!(
        told(&jobs, pool(3)),
        ["a works with 1", "b works with 1", "c gives way to z", "z works with 1"]
    );
    let jobs = [low("a"), low("b"), low("c"), job("z", "", 5, 2, 2)];
    assert_eq!(
        told(&jobs, pool(3)),
        ["a works with 1", "b gives way to z", "c gives way to z", "z works with 2"]
    );
}

#[test]
fn nobody_is_sent_home_in_vain() {
    let jobs = [at_work(job("a", "", 5, 2, 2), 2), at_work(job("b", "", 1, 1, 1), 1), job("z", "", 9, 4, 4)];
    assert_eq!(
        told(&jobs, pool(3)),
        ["a works with 2", "b works with 1", "z works with 0"],
        "even the whole pool is too small for z"
    );
    let jobs = [at_work(job("a", "", 9, 2, 2), 2), at_work(job("b", "", 1, 1, 1), 1), job("z", "", 9, 2, 2)];
    assert_eq!(
        told(&jobs, pool(3)),
        ["a works with 2", "b works with 1", "z: needs 2 workers, 0 are free; job a has 2"]
    );
}

#[test]
fn while_a_large_job_waits_lower_ones_may_use_what_is_free_and_equals_may_not() {
    let jobs = [
        at_work(job("a", "", 5, 2, 2), 2),
        job("b", "", 5, 4, 4),
        job("c", "", 5, 1, 1),
        job("d", "", 1, 1, 1),
    ];
    assert_eq!(
        told(&jobs, pool(4)),
        [
            "a works with 2",
            "b: needs 4 workers, 2 are free; job a has 2",
            "c: needs 1 worker, 2 are free; behind job b of priority 5",
            "d works with 1",
        ]
    );
}

#[test]
fn among_owners_the_one_with_the_fewest_workers_is_next() {
    let jobs = [
        at_work(job("a", "ada", 0, 2, 2), 2),
        at_work(job("b", "bob", 0, 1, 1), 1),
        job("c", "ada", 0, 1, 1),
        job("d", "bob", 0, 1, 1),
        job("e", "eve", 0, 1, 1),
    ];
    let order: Vec<String> = turns(&jobs, pool(3)).waiting.iter().map(ToString::to_string).collect();
    assert_eq!(order, ["e", "d", "c"]);
    assert_eq!(told(&jobs, pool(4))[4], "e works with 1");
}

#[test]
fn who_was_overtaken_often_enough_is_next_whoever_owns_it() {
    let mut passed = job("c", "ada", 0, 1, 1);
    passed.overtaken = shanty_coordinator::machine::queue::OVERTAKES;
    let jobs = [at_work(job("a", "ada", 0, 1, 1), 1), passed, job("d", "bob", 0, 1, 1)];
    assert_eq!(
        told(&jobs, pool(2))[1..],
        ["c works with 1", "d: needs 1 worker, 0 are free; job a has 1, job c has 1"]
    );
}

#[test]
fn bounds_on_jobs_hold_and_a_higher_priority_takes_the_place_of_a_lower() {
    let bound = Pool { workers: 4, most_jobs: 1, most_jobs_an_owner: 0 };
    let jobs = [at_work(job("a", "", 1, 1, 1), 1), job("b", "", 1, 1, 1)];
    assert_eq!(told(&jobs, bound), ["a works with 1", "b: 1 jobs run, which is as many as may at a time"]);
    let jobs = [at_work(job("a", "", 1, 1, 1), 1), job("b", "", 2, 1, 1)];
    assert_eq!(told(&jobs, bound), ["a gives way to b", "b works with 1"]);
    let of_owner = Pool { workers: 4, most_jobs: 0, most_jobs_an_owner: 1 };
    let jobs = [at_work(job("a", "ada", 1, 1, 1), 1), job("b", "ada", 1, 1, 1), job("c", "bob", 1, 1, 1)];
    assert_eq!(
        told(&jobs, of_owner),
        ["a works with 1", "b: 1 jobs of ada run, which is as many as may at a time", "c works with 1"]
    );
}

#[test]
fn a_job_that_lost_a_worker_keeps_the_others_for_a_while() {
    let lacking = at_work(job("a", "", 0, 2, 2), 1);
    let hopeful = Asking { hopeful: true, ..lacking.clone() };
    let other = job("b", "", 0, 1, 1);
    assert_eq!(
        told(&[hopeful, other.clone()], pool(1)),
        ["a works with 1", "b: needs 1 worker, 0 are free; behind job a of priority 0"]
    );
    // Then a job that can run with what is left gets it.
    assert_eq!(told(&[lacking, other], pool(1)), ["a gives way to b", "b works with 1"]);
}

#[test]
fn a_settled_job_is_left_alone() {
    let settled = Asking { settled: true, ..at_work(job("a", "", 0, 1, 2), 2) };
    let jobs = [settled, job("z", "", 9, 1, 1)];
    assert_eq!(
        told(&jobs, pool(2)),
        ["a works with 2", "z: needs 1 worker, 0 are free"],
        "a job of lower priority that holds them is on its way out"
    );
}
