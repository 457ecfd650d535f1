//! The world's time goes on: messages, work, collectives, faults.

use std::collections::VecDeque;

use super::*;

impl World {
    pub fn tick(&mut self, faults: &Faults) {
        self.now += TICK;
        self.tell(Event::Tick);
        let (due, later) = std::mem::take(&mut self.answers).into_iter().partition(|(at, _)| *at <= self.now);
        self.answers = later;
        let due: Vec<(u64, Event)> = due;
        due.into_iter().for_each(|(_, event)| self.tell(event));
        self.keep_staffed();
        for at in 0..self.workers.len() {
            self.live(at);
        }
        self.collectives();
        if self.now < 1000 + faults.until * TICK {
            self.strike(faults);
        }
    }

    pub fn state(&self) -> JobState {
        self.machine.view(self.moment(), &self.job).expect("the job is there").state
    }

    pub fn describe(&self) -> String {
        let view = self.machine.view(self.moment(), &self.job).expect("the job is there");
        let doing: Vec<String> = self
            .workers
            .iter()
            .filter(|worker| worker.alive)
            .map(|worker| {
                format!("{}:{:?}:{:?}@{}", worker.id, worker.session, worker.doing(), worker.state.applied())
            })
            .collect();
        format!("{:?} {} step {} of {}; {}", view.state, view.reason, view.step, view.steps, doing.join(" "))
    }

    fn keep_staffed(&mut self) {
        let living = self.workers.iter().filter(|worker| worker.alive).count();
        self.workers.retain(|worker| worker.alive || worker.session.is_some());
        if living < self.wanted && self.chance.once_in(10) {
            self.spawned += 1;
            let worker = Worker::new(self.spawned, self.now + self.chance.below(60));
            self.workers.push(worker);
        }
    }

    /// A worker's own doings: its stream, its beats, its rows.
    fn live(&mut self, at: usize) {
        let now = self.now;
        if !self.workers[at].alive {
            // The kernel closes the stream of a dead process.
            if let Some(session) = self.workers[at].session.take() {
                let worker = self.workers[at].id.clone();
                self.tell(Event::Down { worker, session, reason: "the stream broke".to_owned() });
            }
            return;
        }
        if self.workers[at].session.is_none() && now >= self.workers[at].hello_at {
            self.sessions += 1;
            let worker = &mut self.workers[at];
            worker.session = Some(self.sessions);
            worker.inbox.clear();
            worker.outbox.clear();
            worker.beats.clear();
            let hello = Event::Hello {
                worker: worker.id.clone(),
                session: self.sessions,
                info: worker.info(),
                attachment: worker.attachment(),
            };
            self.tell(hello);
        }
        // What it said arrives even while it is paused.
        while self.workers[at].outbox.front().is_some_and(|(due, _)| *due <= now) {
            let worker = &mut self.workers[at];
            let (_, message) = worker.outbox.pop_front().expect("there is one");
            let (id, session) =
                (worker.id.clone(), worker.session.expect("it says something only on a stream"));
            self.tell(Event::Said { worker: id, session, message });
        }
        if now < self.workers[at].paused_until {
            return;
        }
        while self.workers[at].inbox.front().is_some_and(|(due, _)| *due <= now) {
            let (late, load) = (now + self.delay(), 20 + self.chance.below(150));
            let worker = &mut self.workers[at];
            let (_, message) = worker.inbox.pop_front().expect("there is one");
            if matches!(message, Message::Form { .. }) {
                worker.row_until = 0;
            }
            worker.hear(now, late, load, message, CREDIT);
        }
        self.beat(at);
        self.load(at);
        self.compute(at);
    }

    fn beat(&mut self, at: usize) {
        let late = self.now + self.delay();
        let worker = &mut self.workers[at];
        if worker.session.is_none() || self.now < worker.next_beat {
            return;
        }
        worker.next_beat = self.now + BEAT;
        worker.sequence += 1;
        worker.beats.push_back((worker.sequence, self.now));
        let attachment = worker.attachment().filter(|_| worker.doing() != Some(&Doing::Left));
        let beat = Said::Beat {
            sequence: worker.sequence,
            phase: worker.phase(),
            attachment,
            // Waiting for others is no progress.
            progress: if worker.hung || worker.waits() { 0 } else { self.now },
        };
        worker.say(late, beat);
    }

    fn load(&mut self, at: usize) {
        let late = self.now + self.delay();
        let worker = &mut self.workers[at];
        let Some((job, attempt, _)) = worker.assigned.clone() else { return };
        if worker.hung || worker.ready_said || self.now < worker.load_until || worker.session.is_none() {
            return;
        }
        worker.ready_said = true;
        worker.loaded = worker.part;
        let base_hash = "b".to_owned();
        let (seconds, trainable_parameters, part) = (0.1, 1, worker.part);
        worker.say(late, Said::BaseReady { job, attempt, base_hash, seconds, trainable_parameters, part });
    }

    fn compute(&mut self, at: usize) {
        let (now, row) = (self.now, 5 + self.chance.below(25));
        let (steps, once) = (self.steps, self.chance.once_in(2));
        self.let_go(at);
        let late = self.now + self.delay();
        let worker = &mut self.workers[at];
        let Some(member) = worker.member.clone().filter(|_| !worker.hung) else { return };
        let step = worker.state.applied() + 1;
        if member.doing == Doing::Waiting && member.stop_after.is_some_and(|last| step > last) {
            return worker.leave(late, member.generation.generation);
        }
        match member.doing {
            Doing::Waiting if step > steps => {
                worker.set_doing(Doing::Finishing);
            }
            Doing::Waiting if worker.has_credit(now, step) => {
                let start = &member.generation.start;
                let explicit = start.applied.0 + 1 == step && !start.rows.is_empty();
                worker.to_compute = if explicit {
                    start.rows[member.rank as usize].compute.iter().copied().collect()
                } else {
                    let world_size = member.generation.members.len() as u32;
                    let rows = self.order.step_rows(step);
                    order::slice(&rows, world_size, member.rank).iter().copied().collect::<VecDeque<_>>()
                };
                worker.row_until = now + row;
                worker.set_doing(Doing::Computing);
            }
            Doing::Computing if now >= worker.row_until => match worker.to_compute.pop_front() {
                Some(done) => {
                    worker.sum.push(done);
                    worker.row_until = now + row;
                }
                // The credit is looked at again before the reduction is entered.
                None if worker.has_credit(now, step) => worker.set_doing(Doing::Reducing),
                None => {}
            },
            Doing::Finishing if member.rank == 0 && once => self.finish(at),
            _ => {}
        }
    }

    /// What a worker does that was asked to end, or that holds the state for all who did.
    fn let_go(&mut self, at: usize) {
        let late = self.now + self.delay();
        if let Some(within) = self.workers[at].keep.take() {
            let applied = self.workers[at].state.applied();
            self.write_checkpoint(at, within, applied, late);
        }
        let now = self.now;
        let worker = &mut self.workers[at];
        if worker.drained || worker.dies_at.is_some_and(|at| now >= at) {
            worker.alive = false;
        }
    }

    fn finish(&mut self, at: usize) {
        let late = self.now + self.delay();
        let worker = &mut self.workers[at];
        let within = worker.within().expect("it is a member");
        if !worker.has_credit(self.now, self.steps) || worker.session.is_none() {
            return;
        }
        self.finished = Some(worker.state.clone());
        worker.say(late, Said::Finished { within, step: Step(self.steps), adapter: "/adapter".to_owned() });
    }

    /// What members do together: connect and move state, and reduce.
    fn collectives(&mut self) {
        let mut generations: Vec<Arc<GenerationRecord>> = self
            .workers
            .iter()
            .filter_map(|worker| worker.member.as_ref().map(|member| Arc::clone(&member.generation)))
            .collect();
        generations.sort_by_key(|generation| generation.generation);
        generations.dedup_by_key(|generation| generation.generation);
        for generation in generations {
            let number = generation.generation.0;
            let places: Vec<usize> = generation
                .members
                .iter()
                .filter_map(|member| self.workers.iter().position(|worker| worker.id == member.worker))
                .filter(|at| {
                    let member = self.workers[*at].member.as_ref();
                    member.is_some_and(|member| member.generation.generation.0 == number)
                })
                .collect();
            let all_here = places.len() == generation.members.len();
            self.connect(&generation, &places, all_here);
            self.reduce(&generation, &places, all_here);
        }
    }

    fn connect(&mut self, generation: &GenerationRecord, places: &[usize], all_here: bool) {
        let number = generation.generation.0;
        let connecting = |worker: &Worker| worker.is_in(number, &[Doing::Connecting]);
        if !places.iter().any(|at| connecting(&self.workers[*at])) {
            return;
        }
        if all_here && places.iter().all(|at| connecting(&self.workers[*at])) {
            let given = match &generation.start.source {
                Source::Fresh => State::default(),
                Source::Checkpoint(path) => {
                    let found = self.checkpoints.iter().find(|(record, _, _)| record.path == *path);
                    found.expect("it was found before").1.clone()
                }
                Source::Members { donor, .. } => self.workers[places[donor.0 as usize]].state.clone(),
            };
            assert_eq!(given.applied(), generation.start.applied.0);
            for at in places {
                let worker = &mut self.workers[*at];
                worker.state = given.clone();
                worker.state.evaluated = generation.start.evaluated.map(|step| step.0);
                worker.state.checkpoint = generation.start.checkpoint.map(|step| step.0);
                worker.set_doing(Doing::Waiting);
            }
            return;
        }
        self.fail_where(generation, places, all_here, Doing::Connecting);
    }

    /// A collective that lacks a member fails, sooner or later, for those who are in it.
    fn fail_where(&mut self, generation: &GenerationRecord, places: &[usize], all_here: bool, doing: Doing) {
        let number = generation.generation.0;
        let gone = !all_here
            || places.iter().any(|at| {
                let out = [Doing::Left, Doing::Broken];
                !self.workers[*at].alive || self.workers[*at].is_in(number, &out)
            });
        if !gone {
            return;
        }
        for at in places {
            // A member that has not heard of the generation yet is no reason to give up at once.
            if self.workers[*at].is_in(number, std::slice::from_ref(&doing)) && self.chance.once_in(60) {
                self.break_at(*at);
            }
        }
    }

    fn break_at(&mut self, at: usize) {
        let late = self.now + self.delay();
        let worker = &mut self.workers[at];
        let Some(within) = worker.within() else { return };
        worker.set_doing(Doing::Broken);
        worker.say(late, Said::Broken { within, error: "the ring broke".to_owned() });
    }

    /// The reduction of a step: once all are in it, each may get the whole sum; a loss in between leaves others without.
    fn reduce(&mut self, generation: &GenerationRecord, places: &[usize], all_here: bool) {
        let number = generation.generation.0;
        let reducing: Vec<usize> =
            places.iter().copied().filter(|at| self.workers[*at].is_in(number, &[Doing::Reducing])).collect();
        let Some(first) = reducing.first() else { return };
        let step =
            reducing.iter().map(|at| self.workers[*at].state.applied() + 1).min().expect("there is one");
        let is_first = |worker: &Worker| worker.state.applied() + 1 == step;
        let _ = first;
        let has_sum =
            |world: &Self, at: usize| world.summed.contains(&(number, step, at_id(&world.workers[at])));
        let begun = places.iter().any(|at| has_sum(self, *at));
        let entered = |worker: &Worker| worker.is_in(number, &[Doing::Reducing]) && is_first(worker);
        if all_here && !begun && places.iter().all(|at| entered(&self.workers[*at])) {
            if !self.chance.once_in(3) {
                return;
            }
            // All rows are in the sum from here on; who gets hold of it is another matter.
            let rows: Vec<u64> = places.iter().flat_map(|at| self.workers[*at].sum.clone()).collect();
            self.sums.insert((number, step), rows);
            let lucky = places[self.chance.below(places.len() as u64) as usize];
            self.summed.insert((number, step, at_id(&self.workers[lucky])));
            return;
        }
        if begun {
            for at in &reducing {
                // One that hangs gets hold of nothing.
                if is_first(&self.workers[*at]) && !self.workers[*at].hung && self.chance.once_in(2) {
                    let everybody = all_here
                        && places.iter().all(|other| {
                            let worker = &self.workers[*other];
                            worker.is_in(
                                number,
                                &[Doing::Reducing, Doing::Waiting, Doing::Computing, Doing::Finishing],
                            )
                        });
                    if has_sum(self, *at) || everybody {
                        self.apply(*at, number, step);
                    }
                }
            }
        }
        self.fail_where(generation, places, all_here, Doing::Reducing);
    }

    /// The sum is whole: the step is applied, and nobody is asked.
    fn apply(&mut self, at: usize, number: u64, step: u64) {
        let late = self.now + self.delay();
        let mut trained = self.sums[&(number, step)].clone();
        let mut expected = self.order.step_rows(step);
        trained.sort_unstable();
        expected.sort_unstable();
        assert_eq!(trained, expected, "rows of step {step} in generation {number}");
        if number < self.newest {
            // One that was cut off may finish the step in flight, whose rows are tried again without it; no more, as
            // the next one needs all members.
            let next = &self.announced[&(number + 1)].start;
            let goes_on = matches!(next.source, Source::Members { .. });
            let in_flight = step <= next.applied.0 + 1;
            assert!(!goes_on || in_flight, "generation {number} applied {step} after it was left");
        }
        let worker = &mut self.workers[at];
        worker.state.steps.push(trained);
        worker.sum.clear();
        worker.set_doing(Doing::Waiting);
        self.summed.insert((number, step, at_id(&self.workers[at])));
        let announcement = Announcement {
            tokens: expected.len() as u64,
            rows: expected.len() as u64,
            row_hash: expected.iter().fold(0, |sum: u64, row| sum.wrapping_add(order::row_hash(*row))),
        };
        let worker = &mut self.workers[at];
        let rank = Rank(worker.member.as_ref().expect("it is a member").rank);
        let within = worker.within().expect("it is a member");
        let report = StepReport {
            within: within.clone(),
            step: Step(step),
            rank,
            loss: 1.0,
            reduced: announcement,
            leased: announcement,
            gradient_norm: 1.0,
            learning_rate: 1.0,
            seconds: 0.1,
            timings: Timings::default(),
            skipped: None,
            bad_samples: Vec::new(),
        };
        worker.say(late, Said::Step(report.clone()));
        if self.chance.once_in(8) {
            // Reports may come twice.
            self.workers[at].say(late, Said::Step(report));
        }
        let due = step.is_multiple_of(3) || step == self.steps;
        if rank == Rank(0) && due && self.workers[at].has_credit(self.now, step) {
            self.write_checkpoint(at, within, step, late);
        }
    }

    fn write_checkpoint(
        &mut self,
        at: usize,
        within: shanty_coordinator::machine::Within,
        step: u64,
        late: u64,
    ) {
        let record = CheckpointRecord {
            attempt: within.attempt,
            step: Step(step),
            generation: within.generation,
            path: format!("checkpoints/{step}-a{}-g{}", within.attempt, within.generation),
            size_bytes: 1,
            seconds: 0.0,
            unix_ms: self.now,
            loss: None,
        };
        let path = record.path.clone();
        let good = !self.chance.once_in(6);
        self.checkpoints.push((record, self.workers[at].state.clone(), good));
        let said = Said::Checkpoint {
            within,
            step: Step(step),
            path,
            size_bytes: 1,
            seconds: 0.0,
            removed: Vec::new(),
            held_seconds: 0.0,
        };
        self.workers[at].say(late, said);
    }

    fn strike(&mut self, faults: &Faults) {
        let mut hits = |often: u64| often > 0 && self.chance.once_in(often);
        let (kill, cut, pause) = (hits(faults.kill), hits(faults.cut_stream), hits(faults.pause));
        let (broken, restart, all) =
            (hits(faults.break_collective), hits(faults.restart_coordinator), hits(faults.kill_all));
        let (drains, hangs) = (hits(faults.drain), hits(faults.hang));
        if all {
            for at in 0..self.workers.len() {
                self.kill(at);
            }
        }
        let count = self.workers.len() as u64;
        if count > 0 {
            let at = self.chance.below(count) as usize;
            if kill {
                self.kill(at);
            }
            if cut && let Some(session) = self.workers[at].session.take() {
                let again = self.now + self.chance.below(500);
                let worker = &mut self.workers[at];
                worker.hello_at = again;
                worker.inbox.clear();
                worker.outbox.clear();
                let worker = worker.id.clone();
                self.tell(Event::Down { worker, session, reason: "the network broke".to_owned() });
            }
            if drains && !self.workers[at].draining {
                let late = self.now + self.delay();
                self.workers[at].draining = true;
                self.workers[at].say(late, Said::Draining { reason: "a test".to_owned() });
            }
            // One that makes no step has nothing to hang in.
            if hangs && self.workers[at].is_in(self.newest, &[Doing::Computing, Doing::Reducing]) {
                self.workers[at].hung = true;
            }
            if pause {
                self.workers[at].paused_until = self.now + self.chance.below(900);
            }
            if broken
                && !self.workers[at].hung
                && matches!(
                    self.workers[at].doing(),
                    Some(Doing::Computing | Doing::Reducing | Doing::Connecting)
                )
            {
                self.break_at(at);
            }
        }
        if restart {
            self.restart();
        }
    }

    fn kill(&mut self, at: usize) {
        self.kills += 1;
        self.workers[at].alive = false;
        // What was on its way may still arrive, or not.
        let keep = self.chance.below(self.workers[at].outbox.len() as u64 + 1) as usize;
        let worker = &mut self.workers[at];
        worker.outbox.truncate(keep);
        let Some(session) = worker.session else { return };
        let said: Vec<Said> = worker.outbox.drain(..).map(|(_, said)| said).collect();
        let id = worker.id.clone();
        for message in said {
            self.tell(Event::Said { worker: id.clone(), session, message });
        }
    }

    /// kill -9 of the coordinator: what is not durable is gone, and every stream breaks.
    fn restart(&mut self) {
        let survive = self.chance.below(self.disk.pending.len() as u64 + 1) as usize;
        self.disk.pending.truncate(survive);
        self.disk.flush();
        self.answers.clear();
        self.machine_was_restarted = true;
        let mut machine = Machine::new(options(), [9; 32]);
        self.now += 50 + self.chance.below(200);
        for record in self.disk.jobs.values().cloned() {
            let steps = self.disk.steps.values().cloned().collect();
            let stored = StoredJob {
                record,
                steps,
                evaluations: Vec::new(),
                checkpoints: Vec::new(),
                events: Vec::new(),
            };
            machine.restore(self.moment(), stored);
        }
        self.machine = machine;
        for at in 0..self.workers.len() {
            let again = self.now + self.chance.below(300);
            let worker = &mut self.workers[at];
            // Messages that were sent but not read yet are lost with the stream.
            worker.session = None;
            worker.hello_at = again;
            worker.inbox.clear();
            worker.outbox.clear();
        }
    }
}

/// A number for a worker, for keys.
fn at_id(worker: &Worker) -> u64 {
    worker.id.as_str()[1..].parse().expect("a worker's id is w and a number")
}

impl World {
    /// Every row of every step is exactly once in the final adapter.
    pub fn check_lineage(&self) {
        let state = self.finished.as_ref().expect("the job has finished");
        assert_eq!(state.applied(), self.steps);
        for (step, rows) in (1..).zip(&state.steps) {
            let mut expected = self.order.step_rows(step);
            expected.sort_unstable();
            assert_eq!(*rows, expected, "rows of step {step}");
        }
        let view = self.machine.view(self.moment(), &self.job).expect("the job is there");
        assert_eq!(view.step.0, self.steps);
        assert_eq!(view.ledger.remaining + view.ledger.leased, 0);
    }
}
