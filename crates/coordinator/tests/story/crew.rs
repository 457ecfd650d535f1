//! Members that come, go, hang, lag and differ; steps that are passed over.

use shanty_coordinator::machine::{
    Announcement, Effect, Event, MemberPhase, Message, Said, StepReport, Timings,
    record::{JobState, Source},
};
use shanty_proto::{Attempt, Rank, Step};

use crate::stage::*;

impl Stage {
    /// A report with where the reporter's time went, and what else differs from an ordinary one.
    fn report_with(&mut self, name: &str, rank: u32, step: u64, change: impl FnOnce(&mut StepReport)) {
        let mut report = StepReport {
            within: self.within(self.view().generation.0),
            step: Step(step),
            rank: Rank(rank),
            loss: 2.0,
            reduced: announcement(step),
            leased: announcement(step),
            gradient_norm: 1.0,
            learning_rate: 1e-3,
            seconds: 0.5,
            timings: Timings::default(),
            skipped: None,
            bad_samples: Vec::new(),
        };
        change(&mut report);
        self.say(name, Said::Step(report));
    }

    fn left_with(&mut self, name: &str, generation: u64, applied: u64, hash: &str) {
        let within = self.within(generation);
        let hash = hash.to_owned();
        self.say(name, Said::Left { within, applied: Step(applied), holds_state: true, hash, kept: None });
    }

    /// A member beats and says how much its trainer got done.
    fn beat_of(&mut self, name: &str, rank: u32, applied: u64, phase: MemberPhase, progress: u64) {
        let attachment = Some(self.attachment(self.view().generation.0, rank, applied));
        self.say(name, Said::Beat { sequence: 5, phase, attachment, progress });
    }

    /// Everybody reports steps one after another.
    fn steps(&mut self, steps: std::ops::RangeInclusive<u64>, members: &[&str]) {
        let generation = self.view().generation.0;
        for step in steps {
            self.now += 500;
            for (rank, name) in members.iter().enumerate() {
                self.report(name, generation, rank as u32, step);
            }
        }
    }

    fn says_draining(&mut self, name: &str) {
        self.say(name, Said::Draining { reason: "SIGTERM".to_owned() });
    }

    /// The step after which the last event had a worker leave.
    fn leaves_after(&self, name: &str) -> Option<u64> {
        self.told(name).into_iter().find_map(|message| match message {
            Message::Leave { after, .. } => after.map(|step| step.0),
            _ => None,
        })
    }

    fn may_end(&self, name: &str) -> bool {
        self.told(name).iter().any(|message| matches!(message, Message::Drained { .. }))
    }

    fn events(&self, kind: &str) -> Vec<String> {
        let of_kind = |event: &&shanty_coordinator::machine::record::EventRecord| event.kind == kind;
        self.view().events.iter().filter(of_kind).map(|event| event.text.clone()).collect()
    }
}

#[test]
fn a_worker_joins_at_a_steps_boundary_with_nothing_thrown_away() {
    let mut stage = Stage::running(1, 3, 20, &["a", "b"]);
    stage.hello("c", None);
    stage.ready("c");
    stage.steps(1..=1, &["a", "b"]);
    stage.tell(Event::Tick);
    // Said by the report's event or by the tick after it: all leave after step 2, which is under way.
    assert_eq!(stage.view().reason, "c to join; a, b to leave generation 1");
    assert_eq!(stage.beat("a", 1, 0, 1), Some(2), "credit for the step that is to be made, and no further");
    stage.report("a", 1, 0, 2);
    stage.report("b", 1, 1, 2);
    stage.left("a", 1, 2, &[]);
    stage.left("b", 1, 2, &[]);
    let (rank, generation) = stage.formed("c").unwrap();
    assert_eq!((rank, generation.start.applied), (2, Step(2)));
    let receivers = vec![Rank(2)];
    assert_eq!(generation.start.source, Source::Members { donor: Rank(0), receivers });
    assert!(generation.start.rows.is_empty(), "nobody has a sum in hand");
    assert_eq!(stage.view().ledger.requeued, 0);
}

#[test]
fn a_worker_that_is_asked_to_end_goes_after_its_step_and_the_job_goes_on() {
    let mut stage = Stage::running(1, 3, 20, &["a", "b", "c"]);
    stage.steps(1..=4, &["a", "b", "c"]);
    stage.says_draining("b");
    assert_eq!(stage.leaves_after("a"), Some(5));
    assert_eq!(stage.leaves_after("b"), Some(5));
    assert!(!stage.may_end("b"));
    assert!(stage.view().members[1].draining);
    stage.steps(5..=5, &["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        stage.left(name, 1, 5, &[]);
    }
    let (_, generation) = stage.formed("a").unwrap();
    let members: Vec<&str> = generation.members.iter().map(|member| member.worker.as_str()).collect();
    assert_eq!((members, generation.start.applied), (vec!["a", "c"], Step(5)));
    stage.tell(Event::Tick);
    assert!(stage.may_end("b"), "{:?}", stage.told("b"));
    stage.down("b");
    stage.steps(6..=6, &["a", "c"]);
    let view = stage.view();
    assert_eq!((view.state, view.step, view.ledger.requeued), (JobState::Running, Step(6), 0));
    assert_eq!(view.crew.losses, 0, "it was not lost");
    let recovery = &view.crew.recoveries[0];
    assert_eq!((recovery.cause.as_str(), recovery.steps_lost, recovery.rows_requeued), ("drained", 0, 0));
    assert!(recovery.stall_ms <= 500.0, "steps are made up to the boundary: {recovery:?}");
}

#[test]
fn the_last_worker_writes_a_checkpoint_before_it_goes_and_nobody_waits_for_it_afterwards() {
    let mut stage = Stage::running(1, 1, 20, &["a"]);
    stage.steps(1..=4, &["a"]);
    stage.says_draining("a");
    assert_eq!(stage.leaves_after("a"), Some(5));
    stage.steps(5..=5, &["a"]);
    stage.left("a", 1, 5, &[]);
    let keeps = |message: &Message| matches!(message, Message::Keep { step: Step(5), .. });
    assert!(stage.told("a").iter().any(keeps), "{:?}", stage.told("a"));
    stage.tell(Event::Tick);
    assert!(!stage.may_end("a"), "its state is nowhere else yet");
    let (within, path) = (stage.within(1), "checkpoints/5".to_owned());
    let removed = Vec::new();
    let (seconds, held_seconds) = (0.1, 0.0);
    let size_bytes = 1;
    stage.say(
        "a",
        Said::Checkpoint { within, step: Step(5), path, size_bytes, seconds, held_seconds, removed },
    );
    let looks = stage.looks_for_checkpoint();
    let saved = stage.saved().unwrap();
    stage.tell(Event::Tick);
    let told = stage.told("a");
    assert!(looks || stage.looks_for_checkpoint());
    assert!(told.iter().any(|message| matches!(message, Message::Drained { .. })), "{told:?}");
    // The coordinator may end as well: whoever takes the job up waits for no credit.
    assert!(saved.health.handed_over);
    let mut restarted = stage.restarted(saved);
    restarted.tell(Event::Tick);
    assert!(restarted.looks_for_checkpoint(), "{}", restarted.view().reason);
    restarted.found(5);
    restarted.hello("b", None);
    restarted.ready("b");
    restarted.pass(4000, &["b"]);
    let view = restarted.view();
    assert_eq!((view.state, view.step, view.ledger.recomputed), (JobState::Running, Step(5), 0));
}

#[test]
fn the_last_worker_gives_its_state_to_one_that_is_ready_before_it_goes() {
    // With one place there is none for giver and taker together: a checkpoint carries the state over.
    for max in [1, 2] {
        let mut stage = Stage::running(1, max, 20, &["a"]);
        stage.steps(1..=4, &["a"]);
        stage.says_draining("a");
        stage.hello("b", None);
        stage.ready("b");
        stage.steps(5..=5, &["a"]);
        stage.left("a", 1, 5, &[]);
        let keeps = |message: &Message| matches!(message, Message::Keep { .. });
        if max == 1 {
            assert!(stage.told("a").iter().any(keeps), "{}", stage.view().reason);
            continue;
        }
        let (_, generation) = stage.formed("b").unwrap();
        assert_eq!(generation.start.source, Source::Members { donor: Rank(0), receivers: vec![Rank(1)] });
        stage.tell(Event::Tick);
        assert_eq!(stage.leaves_after("a"), Some(6), "as soon as b has what it holds");
        stage.steps(6..=6, &["a", "b"]);
        stage.left("a", 2, 6, &[]);
        stage.left("b", 2, 6, &[]);
        assert_eq!(stage.formed("b").unwrap().1.members.len(), 1);
        stage.tell(Event::Tick);
        assert!(stage.may_end("a"));
    }
}

#[test]
fn idle_workers_may_end_at_once_and_take_up_nothing_new() {
    let mut stage = Stage::empty();
    stage.hello("a", None);
    stage.says_draining("a");
    assert!(stage.may_end("a"));
    stage.submit("request", &spec("pirate", 1, 1, 5)).unwrap();
    stage.prepared("pirate");
    let asked = |message: &Message| matches!(message, Message::Assign { .. });
    assert!(!stage.told("a").iter().any(asked), "{:?}", stage.told("a"));
}

#[test]
fn a_user_drains_a_worker_by_its_id() {
    let mut stage = Stage::running(1, 2, 20, &["a", "b"]);
    stage.tell(Event::Drain { request: 9, worker: worker("nobody") });
    assert!(stage.reply().is_err());
    stage.tell(Event::Drain { request: 9, worker: worker("b") });
    assert!(stage.reply().is_ok());
    assert!(stage.told("b").iter().any(|message| matches!(message, Message::Drain { .. })));
    assert!(stage.leaves_after("a").is_some(), "it leaves, whether or not it has answered yet");
}

#[test]
fn a_spare_takes_a_lost_members_place_at_once() {
    let mut stage = Stage::running(2, 2, 20, &["a", "b"]);
    stage.hello("c", None);
    stage.ready("c");
    assert_eq!(stage.view().crew.spares, [worker("c")]);
    stage.steps(1..=3, &["a", "b"]);
    assert_eq!(stage.view().generation.0, 1, "a spare waits");
    stage.down("b");
    stage.left("a", 1, 3, &[]);
    let (_, generation) = stage.formed("c").expect("no time passes");
    assert_eq!(generation.members.len(), 2);
    assert!(stage.view().crew.spares.is_empty());
}

#[test]
fn as_many_spares_load_as_the_job_wants() {
    let mut stage = Stage::empty();
    let mut spec = spec("pirate", 1, 1, 20);
    spec["cluster"]["spares"] = 1.into();
    stage.submit("request", &spec).unwrap();
    stage.prepared("pirate");
    let names = ["a", "b", "c", "d"];
    for name in names {
        stage.hello(name, None);
    }
    stage.tell(Event::Tick);
    assert_eq!(stage.view().members.len(), 2, "a member to be, and a spare");
}

#[test]
fn the_deadline_is_learnt_told_and_shown() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    assert_eq!(stage.view().crew.deadline_seconds, None);
    stage.steps(1..=5, &["a", "b"]);
    assert_eq!(stage.view().crew.deadline_seconds, Some(10.0), "three usual steps are less");
    assert_eq!(stage.view().crew.usual_step_seconds, Some(0.5));
    assert_eq!(stage.events("deadline").len(), 1);
    let mut slow = Stage::running(1, 2, 50, &["a", "b"]);
    for step in 1..=5 {
        slow.report_with("a", 0, step, |report| report.seconds = 20.0);
    }
    assert_eq!(slow.view().crew.deadline_seconds, Some(60.0));
}

#[test]
fn a_trainer_that_hangs_while_its_process_beats_is_found_and_the_others_are_not_blamed() {
    let mut stage = Stage::running(1, 3, 50, &["a", "b", "c"]);
    stage.steps(1..=6, &["a", "b", "c"]);
    let began = stage.now;
    // b computes step 7 and gets nowhere; a and c wait for it in the reduction.
    while stage.now < began + 15_000 && stage.view().crew.losses == 0 {
        stage.now += 250;
        stage.beat_of("a", 0, 6, MemberPhase::Reducing, 100);
        stage.beat_of("b", 1, 6, MemberPhase::Computing, 100);
        stage.beat_of("c", 2, 6, MemberPhase::Reducing, 100);
        stage.tell(Event::Tick);
    }
    let took = stage.now - began;
    assert!((10_000..=10_750).contains(&took), "max(10 s, 3 usual steps), and a beat: {took} ms");
    let lost = stage.published("member_lost").unwrap();
    assert_eq!(lost.worker, Some(worker("b")));
    assert!(lost.text.contains("no progress for") && lost.text.contains("computing"), "{}", lost.text);
    assert!(lost.detection_ms.unwrap() >= 10_000.0);
    assert!(
        stage
            .effects
            .iter()
            .any(|effect| matches!(effect, Effect::Close { worker: w, .. } if *w == worker("b")))
    );
    assert!(stage.was_told_to_leave("a") && stage.was_told_to_leave("c"));
    // It comes back and is not taken for the member that it was.
    let attachment = stage.attachment(1, 1, 6);
    stage.hello("b", Some(attachment));
    assert!(matches!(stage.told("b")[..], [Message::Welcome { attached: false }, ..]));
    stage.left("a", 1, 6, &[]);
    stage.left("c", 1, 6, &[]);
    stage.report("a", 2, 0, 7);
    assert_eq!(stage.view().crew.recoveries[0].cause, "hung");
}

#[test]
fn slow_is_not_hung_while_there_is_progress() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=6, &["a", "b"]);
    for turn in 0..200 {
        stage.now += 250;
        stage.beat_of("a", 0, 6, MemberPhase::Reducing, 1);
        stage.beat_of("b", 1, 6, MemberPhase::Computing, turn);
        stage.tell(Event::Tick);
    }
    assert_eq!((stage.view().state, stage.view().crew.losses), (JobState::Running, 0));
}

#[test]
fn a_collective_that_hangs_is_left_and_who_does_not_answer_is_lost() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=6, &["a", "b"]);
    stage.report("a", 1, 0, 7);
    let began = stage.now;
    while stage.now < began + 15_000 && stage.view().state == JobState::Running {
        stage.now += 250;
        stage.beat_of("a", 0, 7, MemberPhase::Reducing, 1);
        stage.beat_of("b", 1, 6, MemberPhase::Reducing, 1);
        stage.tell(Event::Tick);
    }
    assert!(stage.now - began <= 10_750, "{} ms", stage.now - began);
    let hung = stage.events("hung");
    assert!(
        hung[0].contains("collective of step 7 hangs") && hung[0].contains("b did not finish"),
        "{hung:?}"
    );
    assert_eq!(stage.view().crew.losses, 0, "nobody is lost for what all are in");
    stage.left("a", 1, 7, &[]);
    let asked = stage.now;
    while stage.now < asked + 15_000 && stage.view().crew.losses == 0 {
        stage.now += 250;
        stage.beat_alone("a");
        stage.beat_of("b", 1, 6, MemberPhase::Reducing, 1);
        stage.tell(Event::Tick);
    }
    assert!(stage.now - asked <= 10_250, "the same deadline: {} ms", stage.now - asked);
    assert_eq!(stage.view().generation.0, 2);
}

#[test]
fn a_first_step_may_take_longer_than_others() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    for _ in 0..400 {
        stage.now += 250;
        stage.beat_of("a", 0, 0, MemberPhase::Computing, 1);
        stage.beat_of("b", 1, 0, MemberPhase::Reducing, 1);
        stage.tell(Event::Tick);
    }
    assert_eq!(stage.view().state, JobState::Running, "100 s of compiling are no hang");
}

fn timed(data: f64, compute: f64, reduce: f64, tokens: u64) -> impl Fn(&mut StepReport) {
    move |report| {
        report.timings = Timings {
            data_seconds: data,
            compute_seconds: compute,
            reduce_seconds: reduce,
            tokens,
            ..Timings::default()
        };
    }
}

/// Steps in which c computes twice as long as the others, who wait for it.
fn with_a_straggler(stage: &mut Stage, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        stage.now += 500;
        stage.report_with("a", 0, step, timed(0.0, 0.2, 0.21, 100));
        stage.report_with("b", 1, step, timed(0.0, 0.2, 0.21, 100));
        stage.report_with("c", 2, step, timed(0.0, 0.4, 0.01, 100));
    }
}

#[test]
fn a_straggler_is_named_with_its_figures_beside_the_crews() {
    let mut stage = Stage::running(1, 3, 200, &["a", "b", "c"]);
    with_a_straggler(&mut stage, 1..=20);
    let view = stage.view();
    let [slow] = &view.crew.stragglers[..] else { panic!("{:?}", view.crew.stragglers) };
    assert_eq!((slow.worker.as_str(), slow.cause), ("c", "computing"));
    let close = |pair: [f64; 2], expected: [f64; 2]| {
        assert!(pair.iter().zip(expected).all(|(is, should)| (is - should).abs() < 1e-6), "{pair:?}");
    };
    close(slow.compute, [0.4, 0.2]);
    close(slow.reduce, [0.01, 0.21]);
    assert_eq!(stage.events("straggler").len(), 1, "said once");
    assert_eq!((view.state, view.crew.losses), (JobState::Running, 0), "slow is not lost");
    for step in 21..=60 {
        for (rank, name) in ["a", "b", "c"].into_iter().enumerate() {
            stage.report_with(name, rank as u32, step, timed(0.0, 0.2, 0.02, 100));
        }
    }
    assert!(stage.view().crew.stragglers.is_empty());
    assert_eq!(stage.events("straggler_over").len(), 1);
}

#[test]
fn a_member_that_waits_for_rows_is_slow_at_data() {
    let mut stage = Stage::running(1, 2, 200, &["a", "b"]);
    for step in 1..=20 {
        stage.report_with("a", 0, step, timed(0.0, 0.2, 0.3, 100));
        stage.report_with("b", 1, step, timed(0.3, 0.2, 0.0, 100));
    }
    let view = stage.view();
    assert_eq!(view.crew.stragglers[0].worker, worker("b"));
    assert_eq!(view.crew.stragglers[0].cause, "data");
}

#[test]
fn more_rows_make_nobody_a_straggler() {
    let mut stage = Stage::running(1, 2, 200, &["a", "b"]);
    for step in 1..=30 {
        stage.report_with("a", 0, step, timed(0.0, 0.4, 0.01, 200));
        stage.report_with("b", 1, step, timed(0.0, 0.2, 0.21, 100));
    }
    assert!(stage.view().crew.stragglers.is_empty(), "{:?}", stage.view().crew.stragglers);
}

#[test]
fn a_spare_takes_a_stragglers_place_if_the_job_wants_it() {
    for wanted in [false, true] {
        let mut stage = Stage::empty();
        let mut spec = spec("pirate", 1, 3, 200);
        spec["cluster"]["replace_stragglers"] = wanted.into();
        stage.submit("request", &spec).unwrap();
        stage.prepared("pirate");
        for name in ["a", "b", "c", "d"] {
            stage.hello(name, None);
            stage.ready(name);
        }
        assert_eq!(stage.view().state, JobState::Running, "{}", stage.view().reason);
        for step in 1..=16 {
            with_a_straggler(&mut stage, step..=step);
            stage.beat_alone("d");
        }
        stage.tell(Event::Tick);
        if !wanted {
            assert_eq!(stage.view().state, JobState::Running);
            continue;
        }
        assert!(!stage.events("member_replaced").is_empty(), "{:?}", stage.view().crew);
        assert_eq!(stage.leaves_after("c"), Some(17));
        with_a_straggler(&mut stage, 17..=17);
        for name in ["a", "b", "c"] {
            stage.left(name, 1, 17, &[]);
        }
        let (_, generation) = stage.formed("d").expect("it takes the place");
        let members: Vec<&str> = generation.members.iter().map(|member| member.worker.as_str()).collect();
        assert_eq!(members, ["a", "b", "d"]);
    }
}

#[test]
fn the_minority_takes_the_majoritys_state_and_is_not_asked_again_the_second_time() {
    let mut stage = Stage::running(1, 3, 50, &["a", "b", "c"]);
    stage.steps(1..=4, &["a", "b", "c"]);
    for generation in 1..=2 {
        let within = stage.within(generation);
        let hashes = ["good", "bad", "good"].map(str::to_owned).to_vec();
        stage.say("a", Said::Diverged { within: within.clone(), step: Step(4), hashes: hashes.clone() });
        assert!(stage.was_told_to_leave("b"));
        stage.say("b", Said::Diverged { within, step: Step(4), hashes });
        stage.left_with("a", generation, 4, "right");
        stage.left_with("b", generation, 4, "wrong");
        stage.left_with("c", generation, 4, "right");
        if generation == 1 {
            let (_, formed) = stage.formed("b").unwrap();
            let rank = formed.members.iter().position(|member| member.worker == worker("b")).unwrap() as u32;
            let Source::Members { receivers, donor } = &formed.start.source else { panic!("{formed:?}") };
            assert_eq!((receivers.as_slice(), donor.0 == rank), ([Rank(rank)].as_slice(), false));
        }
    }
    let diverged = stage.events("diverged");
    assert!(diverged.iter().any(|text| text.contains("a, c") && text.contains("b (bad)")), "{diverged:?}");
    assert!(diverged.iter().any(|text| text.contains("it takes theirs")));
    assert!(diverged.last().unwrap().contains("not asked again"), "{diverged:?}");
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!(generation.members.len(), 2);
    assert_eq!(stage.view().ledger.recomputed, 0);
}

#[test]
fn of_two_that_differ_nobody_knows_who_is_right() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=7, &["a", "b"]);
    let within = stage.within(1);
    let hashes = ["one", "other"].map(str::to_owned).to_vec();
    stage.say("a", Said::Diverged { within, step: Step(7), hashes });
    stage.left_with("a", 1, 7, "one");
    stage.left_with("b", 1, 7, "other");
    stage.tell(Event::Tick);
    stage.found(5);
    stage.pass(4000, &["a", "b"]);
    let view = stage.view();
    assert_eq!((view.state, view.step), (JobState::Running, Step(5)));
    assert_eq!(view.ledger.recomputed, announcement(6).rows + announcement(7).rows);
    stage.report("a", 2, 0, 6);
    let recovery = &stage.view().crew.recoveries[0];
    assert_eq!((recovery.cause.as_str(), recovery.steps_lost), ("diverged", 2));
}

#[test]
fn states_that_differ_are_found_at_any_break_without_a_comparison() {
    let mut stage = Stage::running(1, 4, 50, &["a", "b", "c", "d"]);
    stage.steps(1..=4, &["a", "b", "c", "d"]);
    stage.down("d");
    stage.left_with("a", 1, 4, "right");
    stage.left_with("b", 1, 4, "right");
    stage.left_with("c", 1, 4, "wrong");
    let (_, generation) = stage.formed("a").unwrap();
    let Source::Members { receivers, .. } = &generation.start.source else { panic!() };
    assert_eq!(receivers.len(), 1, "c takes over what a and b agree on");
}

#[test]
fn a_skipped_step_counts_as_skipped_and_names_its_samples() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=3, &["a", "b"]);
    let bad = |samples: &'static [u64]| {
        move |report: &mut StepReport| {
            report.skipped = Some("the loss is not finite".to_owned());
            report.bad_samples = samples.to_vec();
            // What is not a number was left out of the sum of losses.
            report.loss = 0.0;
        }
    };
    stage.report_with("a", 0, 4, bad(&[]));
    stage.report_with("b", 1, 4, bad(&[17, 23]));
    stage.steps(5..=5, &["a", "b"]);
    let ledger = stage.view().ledger;
    let through = |step: u64| (1..=step).map(|step| announcement(step).rows).sum::<u64>();
    assert_eq!(ledger.skipped, announcement(4).rows);
    assert_eq!(ledger.committed, through(5) - announcement(4).rows);
    assert_eq!(ledger.committed + ledger.skipped + ledger.leased + ledger.remaining, through(50));
    assert_eq!(stage.events("skipped").len(), 1, "once a step");
    assert!(stage.events("bad_samples")[0].contains("17, 23"));
    let saved = stage.machine.view(stage.moment(), &job()).unwrap();
    assert_eq!(saved.step, Step(5));
}

#[test]
fn a_bad_step_is_rolled_back_and_passed_over_on_the_way() {
    let mut stage = Stage::empty();
    let mut spec = spec("pirate", 1, 2, 50);
    spec["train"]["on_bad_step"] = "skip".into();
    spec["train"]["rollback_steps"] = 3.into();
    stage.submit("request", &spec).unwrap();
    stage.prepared("pirate");
    for name in ["a", "b"] {
        stage.hello(name, None);
        stage.ready(name);
    }
    stage.steps(1..=9, &["a", "b"]);
    for name in ["a", "b"] {
        let (within, samples) = (stage.within(1), vec![4]);
        let reason = "loss 9.0000 is 4.5 times the usual".to_owned();
        stage.say(name, Said::BadStep { within, step: Step(10), reason, samples });
    }
    stage.left("a", 1, 9, &[]);
    stage.left("b", 1, 9, &[]);
    stage.tell(Event::Tick);
    let limit = |effect: &Effect| matches!(effect, Effect::FindCheckpoint { up_to: Some(Step(6)), .. });
    let looks = stage.effects.iter().any(limit) || stage.view().reason.contains("newest good checkpoint");
    assert!(looks, "{}", stage.view().reason);
    stage.found(5);
    stage.pass(4000, &["a", "b"]);
    let view = stage.view();
    assert_eq!((view.state, view.step), (JobState::Running, Step(5)), "{}", view.reason);
    assert_eq!(view.ledger.recomputed, (6..=9).map(|step| announcement(step).rows).sum::<u64>());
    let bad = stage.events("bad_step");
    assert_eq!(bad.len(), 1, "{bad:?}");
    // What a generation is told of it outlives a restart: it is part of the durable record.
    stage.steps(6..=9, &["a", "b"]);
    stage.report_with("a", 0, 10, |report| report.skipped = Some("it was bad before".to_owned()));
    assert_eq!(stage.view().ledger.skipped, announcement(10).rows);
    let recovery = &stage.view().crew.recoveries[0];
    assert_eq!((recovery.cause.as_str(), recovery.steps_lost), ("bad_step", 4));
}

#[test]
fn too_many_bad_steps_fail_the_job() {
    let mut stage = Stage::running(1, 1, 50, &["a"]);
    for step in 1..=6 {
        stage.report_with("a", 0, step, |report| report.skipped = Some("the loss is not finite".to_owned()));
    }
    let view = stage.view();
    assert_eq!(view.state, JobState::Failed);
    assert!(view.reason.starts_with("SH0643"), "{}", view.reason);
}

#[test]
fn rows_that_count_twice_are_counted_and_stop_the_job() {
    let mut stage = Stage::running(1, 1, 50, &["a"]);
    stage.steps(1..=2, &["a"]);
    let twice = Announcement { rows: announcement(3).rows + 2, ..announcement(3) };
    stage.report_as("a", 1, 0, 3, twice);
    assert_eq!((stage.view().state, stage.view().ledger.duplicates), (JobState::Failed, 2));

    // A generation makes a step again that it began with.
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=3, &["a", "b"]);
    stage.down("b");
    stage.left("a", 1, 3, &[]);
    stage.report("a", 2, 0, 3);
    let view = stage.view();
    assert_eq!((view.state, view.ledger.duplicates), (JobState::Failed, announcement(3).rows));
    assert!(view.reason.starts_with("SH0640"), "{}", view.reason);
}

#[test]
fn a_step_that_nobody_could_report_in_time_is_recorded_later() {
    let mut stage = Stage::running(1, 2, 50, &["a", "b"]);
    stage.steps(1..=3, &["a", "b"]);
    // Steps 4 and 5 are made while the coordinator is away; b dies, and a says `Left` before its reports come.
    stage.down("b");
    stage.left("a", 1, 5, &[]);
    assert_eq!(stage.view().generation.0, 2);
    let records = |stage: &Stage| {
        let step = |effect: &Effect| match effect {
            Effect::Record(shanty_coordinator::machine::Change::Step(_, record)) => Some(record.step.0),
            _ => None,
        };
        stage.effects.iter().filter_map(step).collect::<Vec<u64>>()
    };
    stage.report("a", 1, 0, 4);
    assert_eq!(records(&stage), [4]);
    stage.report("a", 1, 0, 4);
    assert!(records(&stage).is_empty(), "once");
    stage.report("a", 1, 0, 6);
    assert!(records(&stage).is_empty(), "step 6 is not in the lineage yet");
    assert_eq!(stage.view().attempt, Attempt(1));
}

#[test]
fn a_loss_while_members_leave_after_a_step_makes_the_rest_leave_at_once() {
    let mut stage = Stage::running(1, 4, 50, &["a", "b", "c"]);
    stage.steps(1..=4, &["a", "b", "c"]);
    stage.says_draining("c");
    assert_eq!(stage.leaves_after("a"), Some(5));
    let rows = order().step_rows(5);
    stage.down("b");
    assert!(stage.was_told_to_leave("a") && stage.leaves_after("a").is_none());
    stage.left("a", 1, 4, &rows[0..2]);
    stage.left("c", 1, 4, &rows[4..6]);
    let (_, generation) = stage.formed("a").unwrap();
    assert_eq!(generation.members.len(), 1, "c may go: a holds what it holds");
    assert_eq!(stage.view().ledger.requeued, 4, "rows of b, and those that c takes with it");
    stage.report("a", 2, 0, 5);
    assert_eq!(stage.view().crew.recoveries[0].cause, "lost");
}
