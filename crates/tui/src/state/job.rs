//! The job that is watched.

use std::collections::{BTreeMap, VecDeque};

use shanty_proto::v1::{Event, JobStatus, LogLine, Member};

use super::{History, News};

/// Log lines that are kept.
const LOG_LINES: usize = 2000;
/// Events that are kept.
const EVENTS: usize = 2000;

/// How bad a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// All.
    Trace,
    /// For those who look for a defect.
    Debug,
    /// What a user may want to know.
    Info,
    /// What a user should know.
    Warn,
    /// What went wrong.
    Error,
}

impl Level {
    /// As the wire has it; a word that is not known is shown always.
    pub fn of(line: &LogLine) -> Self {
        match line.level.as_str() {
            "trace" => Self::Trace,
            "debug" => Self::Debug,
            "info" => Self::Info,
            "warn" => Self::Warn,
            _ => Self::Error,
        }
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }

    /// The next that is worth a key: workers send what is info and above.
    #[must_use]
    pub fn next(self) -> Self {
        match self {
            Self::Trace | Self::Debug | Self::Info => Self::Warn,
            Self::Warn => Self::Error,
            Self::Error => Self::Info,
        }
    }
}

/// The job that is watched, as far as it is known.
#[derive(Debug)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Where it stands; none before the coordinator told.
    pub status: Option<JobStatus>,
    /// When that came, milliseconds since the Unix epoch.
    pub received: u64,
    /// Why there is nothing to show.
    pub missing: Option<String>,
    /// Its steps.
    pub history: History,
    /// What happened, oldest first.
    pub events: VecDeque<Event>,
    /// What its workers say, oldest first.
    pub logs: VecDeque<LogLine>,
    /// The worker whose lines are shown; all where none.
    pub worker: Option<String>,
}

impl Job {
    pub(super) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            status: None,
            received: 0,
            missing: None,
            history: History::default(),
            events: VecDeque::new(),
            logs: VecDeque::new(),
            worker: None,
        }
    }

    pub(super) fn take(&mut self, news: News, now: u64) {
        match news {
            News::Status(status) if status.job_id == self.id => {
                for event in &status.events {
                    self.event(event.clone());
                }
                (self.status, self.received, self.missing) = (Some(*status), now, None);
            }
            News::NoSuchJob(reason) => self.missing = Some(reason),
            News::History(steps) => self.history.restore(steps),
            News::Step(step) => self.step(step),
            News::Evaluation(evaluation) => {
                if let Some(status) = &mut self.status
                    && !status.evaluations.contains(&evaluation)
                {
                    status.evaluations.push(evaluation);
                }
            }
            News::Checkpoint(checkpoint) => {
                if let Some(status) = &mut self.status
                    && !status.checkpoints.iter().any(|known| known.path == checkpoint.path)
                {
                    status.checkpoints.push(checkpoint);
                }
            }
            News::Events(events) => events.into_iter().for_each(|event| self.event(event)),
            News::Event(event) => self.event(event),
            News::LogsBegin => self.logs.clear(),
            News::Logs(lines) => {
                self.logs.extend(lines);
                let over = self.logs.len().saturating_sub(LOG_LINES);
                self.logs.drain(..over);
            }
            News::Status(_) | News::Connected | News::Lost(_) | News::Jobs(_) => {}
        }
    }

    fn step(&mut self, step: shanty_proto::v1::StepRecord) {
        // The number of the page moves with the curve, not with the next whole status.
        if let Some(status) = &mut self.status
            && (step.attempt, step.generation) >= (status.attempt, status.generation)
        {
            status.step = step.step;
            status.loss = Some(step.loss);
            status.learning_rate = Some(step.learning_rate);
            status.gradient_norm = Some(step.gradient_norm);
        }
        self.history.push(step);
    }

    fn event(&mut self, event: Event) {
        let key =
            |event: &Event| (event.unix_ms, event.kind.clone(), event.text.clone(), event.worker_id.clone());
        let is_known = self.events.iter().rev().take_while(|known| known.unix_ms >= event.unix_ms);
        if is_known.into_iter().any(|known| key(known) == key(&event)) {
            // A status tells of it without what a lost worker said; the event itself comes with it.
            let known = self.events.iter_mut().rev().find(|known| key(known) == key(&event));
            if let Some(known) = known.filter(|known| known.log.is_empty()) {
                known.log = event.log;
            }
            return;
        }
        // The order of arrival is the order of time but for what is told again after a reconnection.
        let place =
            self.events.iter().rposition(|known| known.unix_ms <= event.unix_ms).map_or(0, |at| at + 1);
        self.events.insert(place, event);
        let over = self.events.len().saturating_sub(EVENTS);
        self.events.drain(..over);
    }

    /// Members by rank, then those without one.
    pub fn members(&self) -> Vec<&Member> {
        let mut members: Vec<&Member> = self.status.iter().flat_map(|status| &status.members).collect();
        members.sort_by_key(|member| (member.rank.unwrap_or(u32::MAX), member.worker_id.clone()));
        members
    }

    /// The log lines that are to be shown, oldest first.
    pub fn lines<'a>(
        &'a self,
        level: Level,
        filter: &'a str,
    ) -> impl DoubleEndedIterator<Item = &'a LogLine> {
        self.logs.iter().filter(move |line| {
            Level::of(line) >= level
                && self.worker.as_ref().is_none_or(|worker| *worker == line.worker_id)
                && (filter.is_empty() || line.text.contains(filter))
        })
    }

    /// Shows the lines of the next worker alone; after the last one, of all.
    pub(super) fn next_worker(&mut self) {
        let speakers: BTreeMap<&str, ()> =
            self.logs.iter().map(|line| (line.worker_id.as_str(), ())).collect();
        let mut speakers = speakers.into_keys();
        let next = match &self.worker {
            None => speakers.next(),
            Some(worker) => speakers.find(|speaker| *speaker > worker.as_str()),
        };
        self.worker = next.map(str::to_owned);
    }
}
