//! Watchers of jobs and readers of logs: each at its own pace, and nothing piles up for one that is slow.

use std::time::Duration;

use shanty_proto::{
    JobId,
    v1::{Pulse, TailLogsResponse, WatchJobResponse, watch_job_response::Update},
};
use tokio::{
    sync::{broadcast::error::RecvError, broadcast::error::TryRecvError, mpsc},
    time::{Interval, MissedTickBehavior, interval},
};
use tonic::Status;

use super::wire_view;
use crate::{
    engine::Engine,
    facts::Facts,
    hub::Watch,
    machine::{JobView, Point, record::JobState},
    store::LogFilter,
};

/// What makes a status worth sending again: state, reason, and who the members are.
fn gist(view: &JobView) -> impl PartialEq + use<> {
    let members: Vec<_> = view
        .members
        .iter()
        .map(|member| (member.worker.clone(), member.rank, member.reason.clone()))
        .collect();
    (view.state, view.reason.clone(), view.attempt, view.generation, members)
}

type Watcher = mpsc::Sender<Result<WatchJobResponse, Status>>;

/// One watcher, and what it was too slow for.
struct Listener<'a> {
    sender: &'a Watcher,
    missed: u64,
}

impl Listener<'_> {
    /// Waits until there is room for the update: one that reads slowly gets fewer, and no queue grows.
    async fn say(&mut self, update: Update) -> Option<()> {
        let missed = std::mem::take(&mut self.missed);
        self.sender.send(Ok(WatchJobResponse { update: Some(update), missed })).await.ok()
    }
}

/// Looks at a job again and again, for a watcher that wants to know how its members are between two steps.
pub(super) struct Pulses {
    engine: Engine,
    job: JobId,
    facts: Facts,
    ticks: Interval,
    /// A tick has passed, and its pulse was not sent yet.
    due: bool,
}

impl Pulses {
    pub fn new(engine: Engine, job: JobId, facts: Facts, every: Duration) -> Self {
        let mut ticks = interval(every);
        // One that fell behind is not made up for.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { engine, job, facts, ticks, due: false }
    }

    /// The next. May be dropped half-way and asked for again: nothing is lost.
    async fn next(pulses: &mut Option<Self>) -> Option<Pulse> {
        let Some(pulses) = pulses else { return std::future::pending().await };
        if !pulses.due {
            pulses.ticks.tick().await;
            pulses.due = true;
        }
        let (job, facts) = (pulses.job.clone(), pulses.facts.clone());
        let look = pulses.engine.look(move |machine, now| {
            machine.view(now, &job).map(|view| facts.pulse_out(&view, now.unix_ms))
        });
        let pulse = look.await;
        pulses.due = false;
        pulse.ok().flatten()
    }
}

fn update(point: &Point) -> Update {
    match point {
        Point::Step(step) => Update::Step(wire_view::step_out(step)),
        Point::Evaluation(evaluation) => Update::Evaluation(wire_view::evaluation_out(evaluation)),
        Point::Checkpoint(checkpoint) => Update::Checkpoint(wire_view::checkpoint_out(checkpoint)),
        Point::Event(event) => Update::Event(wire_view::event_out(event)),
    }
}

/// Sends a job's status and points until it has ended, or the watcher is gone. A watcher that reads slowly misses
/// points (the channel of points overwrites its oldest), never the last status.
pub(super) async fn follow(watch: Watch, pulses: Option<Pulses>, sender: &Watcher) {
    let _ = follow_to_the_end(watch, pulses, Listener { sender, missed: 0 }).await;
}

async fn follow_to_the_end(
    mut watch: Watch,
    mut pulses: Option<Pulses>,
    mut listener: Listener<'_>,
) -> Option<()> {
    let mut last = watch.status.borrow_and_update().clone();
    listener.say(Update::Status(watch.facts.status_out(&last))).await?;
    while !last.state.is_final() {
        tokio::select! {
            biased;
            point = watch.points.recv() => match point {
                Ok(point) => listener.say(update(&point)).await?,
                // It missed some: it gets where the job is now instead.
                Err(RecvError::Lagged(missed)) => {
                    listener.missed += missed;
                    last = watch.status.borrow_and_update().clone();
                    if !last.state.is_final() {
                        listener.say(Update::Status(watch.facts.status_out(&last))).await?;
                    }
                }
                Err(RecvError::Closed) => return None,
            },
            changed = watch.status.changed() => {
                changed.ok()?;
                let now = watch.status.borrow_and_update().clone();
                let is_news = gist(&now) != gist(&last);
                last = now;
                if is_news && !last.state.is_final() {
                    listener.say(Update::Status(watch.facts.status_out(&last))).await?;
                }
            }
            pulse = Pulses::next(&mut pulses) => listener.say(Update::Pulse(pulse?)).await?,
        }
    }
    loop {
        match watch.points.try_recv() {
            Ok(point) => listener.say(update(&point)).await?,
            Err(TryRecvError::Lagged(missed)) => listener.missed += missed,
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        }
    }
    listener.say(Update::Status(watch.facts.status_out(&last))).await
}

/// Sends a job's log lines until it has ended, or the watcher is gone.
pub(super) async fn tail(
    mut watch: Watch,
    filter: &LogFilter,
    sender: &mpsc::Sender<Result<TailLogsResponse, Status>>,
) {
    let mut missed = 0;
    loop {
        let ended = JobState::is_final(watch.status.borrow_and_update().state);
        let lines = tokio::select! {
            biased;
            lines = watch.logs.recv() => match lines {
                Ok(lines) => lines,
                Err(RecvError::Lagged(lots)) => {
                    missed += lots;
                    continue;
                }
                Err(RecvError::Closed) => return,
            },
            // Workers send their last lines after the end; a moment later nobody does.
            () = tokio::time::sleep(Duration::from_secs(1)), if ended => return,
            changed = watch.status.changed(), if !ended => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let wanted = lines.iter().filter(|line| filter.lets_through(line));
        let lines: Vec<_> = wanted.cloned().map(wire_view::log_line_out).collect();
        if lines.is_empty() {
            continue;
        }
        let missed = std::mem::take(&mut missed);
        if sender.send(Ok(TailLogsResponse { lines, missed })).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shanty_proto::{Attempt, Generation, Step};

    use super::*;
    use crate::machine::{Event as MachineEvent, Machine, Moment, Options, record::StepRecord};
    use crate::{hub::Hub, store::LogLine};

    fn view() -> JobView {
        let json = r#"{"name": "pirate", "base": {"model": "/b"}, "adapter": {}, "data": {"train": "/d"}}"#;
        let mut machine = Machine::new(Options::default(), [0; 32]);
        let submit = MachineEvent::Submit {
            request: 1,
            request_id: "r".to_owned(),
            spec: Arc::new(serde_json::from_str(json).expect("a job file")),
            spec_json: Arc::from(json),
        };
        machine.apply(Moment::default(), submit);
        machine.views(Moment::default()).remove(0)
    }

    fn step(number: u64) -> Point {
        Point::Step(StepRecord {
            step: Step(number),
            attempt: Attempt(1),
            generation: Generation(1),
            loss: 1.0,
            learning_rate: 1.0,
            gradient_norm: 1.0,
            tokens: 1,
            tokens_per_second: 1.0,
            workers: 1,
            unix_ms: 1,
            skipped: false,
        })
    }

    #[tokio::test]
    async fn a_slow_watcher_misses_points_but_never_the_end() {
        let hub = Hub::default();
        let running = view();
        hub.set_status(running.clone());
        let (sender, mut receiver) = mpsc::channel(1);
        let watch = hub.watch(&running.id).expect("the job is there");
        let following = tokio::spawn(async move { follow(watch, None, &sender).await });
        for number in 1..=5000 {
            hub.publish(&running.id, step(number));
            // The watcher's task runs, and waits for somebody to read.
            tokio::task::yield_now().await;
        }
        hub.set_status(JobView { state: JobState::Succeeded, step: Step(5000), ..running });
        let (mut steps, mut statuses, mut missed) = (Vec::new(), Vec::new(), 0);
        while let Some(response) = receiver.recv().await {
            let response = response.expect("no error");
            missed += response.missed;
            match response.update.expect("an update") {
                Update::Step(step) => steps.push(step.step),
                Update::Status(status) => statuses.push((status.state(), status.step)),
                other => panic!("{other:?}"),
            }
        }
        following.await.expect("it ends by itself");
        assert!(steps.len() < 600, "{} steps waited for the watcher", steps.len());
        assert_eq!(steps.len() as u64 + missed, 5000, "what it missed is counted");
        assert!(steps.is_sorted() && steps.last() == Some(&5000), "the newest are among them");
        assert_eq!(statuses.last(), Some(&(shanty_proto::v1::JobState::Succeeded, 5000)));
    }

    #[tokio::test]
    async fn a_slow_reader_of_logs_is_told_how_much_it_missed_and_nothing_piles_up() {
        let hub = Hub::default();
        let running = view();
        hub.set_status(running.clone());
        let (sender, mut receiver) = mpsc::channel(1);
        let watch = hub.watch(&running.id).expect("the job is there");
        let reading = tokio::spawn(async move { tail(watch, &LogFilter::all(1), &sender).await });
        let line = |number: u64| LogLine {
            unix_ms: number,
            worker: "a".to_owned(),
            level: "info".to_owned(),
            text: number.to_string(),
        };
        for number in 1..=5000 {
            hub.log(&running.id, &[line(number)]);
            tokio::task::yield_now().await;
        }
        hub.set_status(JobView { state: JobState::Succeeded, ..running });
        let (mut lines, mut missed) = (Vec::new(), 0);
        while let Some(response) = receiver.recv().await {
            let response = response.expect("no error");
            missed += response.missed;
            lines.extend(response.lines.iter().map(|line| line.unix_ms));
        }
        reading.await.expect("it ends by itself");
        assert!(lines.len() < 600, "{} lines waited for the reader", lines.len());
        assert_eq!((lines.len() as u64 + missed, lines.last()), (5000, Some(&5000)));
    }
}
