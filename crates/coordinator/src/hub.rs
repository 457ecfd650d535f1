//! Those who watch jobs. The newest status of each job is always there; points go to whoever keeps up.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use shanty_proto::JobId;
use tokio::sync::{broadcast, watch};

use crate::{
    facts::Facts,
    machine::{
        JobView, Point,
        record::{EventRecord, SaidLine},
    },
    metrics::Recorder,
    store::LogLine,
    traces::Traces,
};

/// Points that a slow watcher may be behind before it misses some.
const POINTS: usize = 512;
/// Lines of a worker that are remembered, for the event of its death.
const REMEMBERED_LINES: usize = 10;
/// Workers whose lines are remembered.
const REMEMBERED_WORKERS: usize = 4096;

/// What watchers of one job share.
#[derive(Debug)]
struct Topic {
    status: watch::Sender<Arc<JobView>>,
    points: broadcast::Sender<Arc<Point>>,
    logs: broadcast::Sender<Arc<Vec<LogLine>>>,
}

/// A watcher's ends.
#[derive(Debug)]
pub(crate) struct Watch {
    pub status: watch::Receiver<Arc<JobView>>,
    pub points: broadcast::Receiver<Arc<Point>>,
    pub logs: broadcast::Receiver<Arc<Vec<LogLine>>>,
    /// What its members say of their devices.
    pub facts: Facts,
}

/// The topics of all jobs.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    topics: Mutex<HashMap<JobId, Topic>>,
    /// What workers say of their devices.
    pub facts: Facts,
    /// What workers said last, by the worker.
    said: Mutex<HashMap<String, VecDeque<LogLine>>>,
    /// Counts what passes.
    pub recorder: Recorder,
    /// Traces it, where somebody wants that.
    pub traces: Traces,
}

impl Hub {
    /// Passes things on, and traces them.
    pub fn new(traces: Traces) -> Self {
        Self { traces, ..Self::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<JobId, Topic>) -> T) -> T {
        // A map of senders is whole after any panic.
        act(&mut self.topics.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sets a job's newest status.
    pub fn set_status(&self, view: JobView) {
        self.recorder.status(&view);
        let view = Arc::new(view);
        self.with(|topics| match topics.get(&view.id) {
            Some(topic) => drop(topic.status.send_replace(view)),
            None => {
                let id = view.id.clone();
                let topic = Topic {
                    status: watch::channel(view).0,
                    points: broadcast::channel(POINTS).0,
                    logs: broadcast::channel(POINTS).0,
                };
                topics.insert(id, topic);
            }
        });
    }

    /// Tells a job's watchers; nobody may be there.
    pub fn publish(&self, job: &JobId, point: Point) {
        self.recorder.point(job, &point);
        self.traces.point(job, &point);
        self.with(|topics| topics.get(job).map(|topic| topic.points.send(Arc::new(point))));
    }

    /// Passes log lines to those who follow.
    pub fn log(&self, job: &JobId, lines: &[LogLine]) {
        self.remember(lines);
        self.with(|topics| {
            let topic = topics.get(job)?;
            (topic.logs.receiver_count() > 0).then(|| topic.logs.send(Arc::new(lines.to_vec())))
        });
    }

    fn remember(&self, lines: &[LogLine]) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        for line in lines {
            if said.len() >= REMEMBERED_WORKERS && !said.contains_key(&line.worker) {
                let when = |lines: &VecDeque<LogLine>| lines.back().map_or(0, |last| last.unix_ms);
                let oldest =
                    said.iter().min_by_key(|(_, lines)| when(lines)).map(|(worker, _)| worker.clone());
                oldest.and_then(|worker| said.remove(&worker));
            }
            let of_worker = said.entry(line.worker.clone()).or_default();
            if of_worker.len() >= REMEMBERED_LINES {
                of_worker.pop_front();
            }
            of_worker.push_back(line.clone());
        }
    }

    /// An event as it is kept and told: of a worker that was lost, with what it said last.
    pub fn with_last_words(&self, event: &mut EventRecord) {
        let Some(worker) = event.worker.as_ref().filter(|_| event.kind == "member_lost") else { return };
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |line: &LogLine| SaidLine {
            unix_ms: line.unix_ms,
            level: line.level.clone(),
            text: line.text.clone(),
        };
        event.log = said.get(worker.as_str()).into_iter().flatten().map(line).collect();
    }

    /// Begins to watch a job, if there is one.
    pub fn watch(&self, job: &JobId) -> Option<Watch> {
        self.with(|topics| {
            let topic = topics.get(job)?;
            Some(Watch {
                points: topic.points.subscribe(),
                logs: topic.logs.subscribe(),
                status: topic.status.subscribe(),
                facts: self.facts.clone(),
            })
        })
    }
}
