//! What is shown, and what keys and messages do to it: pure, so that every view can be tested without a terminal.

mod history;
mod job;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use shanty_proto::v1::{Checkpoint, Evaluation, Event, JobState, JobStatus, JobSummary, LogLine, StepRecord};

pub use self::{
    history::History,
    job::{Job, Level},
};
use crate::words::is_over;

/// Lines that a page key moves by.
const PAGE: usize = 10;

/// Something that happened outside.
#[derive(Debug, Clone)]
pub enum Input {
    /// A key was pressed.
    Key(KeyEvent),
    /// Milliseconds since the Unix epoch, this machine's clock.
    Time(u64),
    /// Something came from the coordinator, or its connection broke.
    News(News),
}

/// What comes from the coordinator.
#[derive(Debug, Clone)]
pub enum News {
    /// It answers.
    Connected,
    /// It does not, and why.
    Lost(String),
    /// All its jobs.
    Jobs(Vec<JobSummary>),
    /// It knows no job of this id.
    NoSuchJob(String),
    /// The watched job, as it stands.
    Status(Box<JobStatus>),
    /// Steps of the watched job so far, thinned out.
    History(Vec<StepRecord>),
    /// A step was committed.
    Step(StepRecord),
    /// Held-out rows were evaluated.
    Evaluation(Evaluation),
    /// A checkpoint was written.
    Checkpoint(Checkpoint),
    /// Events of the watched job so far.
    Events(Vec<Event>),
    /// Something happened to it.
    Event(Event),
    /// The log begins anew: lines that follow were perhaps shown before.
    LogsBegin,
    /// What its workers say.
    Logs(Vec<LogLine>),
}

/// What the state wants from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// News of this job.
    Watch(String),
    /// News of no job.
    Unwatch,
    /// To end.
    Quit,
}

/// Whether the coordinator answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Not yet.
    Connecting,
    /// Yes.
    Up,
    /// Not since this moment, for this reason.
    Lost {
        /// Milliseconds since the Unix epoch.
        since: u64,
        /// In words.
        reason: String,
    },
}

/// A part of a job's page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tab {
    /// A little of everything, by priority.
    Overview,
    /// Who works, where, how fast.
    Members,
    /// What it got over.
    Recoveries,
    /// What it could go on from.
    Checkpoints,
    /// What happened.
    Events,
    /// What its workers say.
    Logs,
}

impl Tab {
    /// All, in the order of their keys.
    pub const ALL: [Self; 6] =
        [Self::Overview, Self::Members, Self::Recoveries, Self::Checkpoints, Self::Events, Self::Logs];

    /// Its title.
    pub fn title(self) -> &'static str {
        match self {
            Self::Overview => "overview",
            Self::Members => "members",
            Self::Recoveries => "recoveries",
            Self::Checkpoints => "checkpoints",
            Self::Events => "events",
            Self::Logs => "logs",
        }
    }

    fn beside(self, by: usize) -> Self {
        let at = Self::ALL.iter().position(|tab| *tab == self).unwrap_or_default();
        Self::ALL[(at + by) % Self::ALL.len()]
    }
}

/// What is on the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// All jobs.
    Jobs,
    /// One job.
    Job(Tab),
}

/// Everything that is shown.
#[derive(Debug)]
pub struct App {
    /// Where the coordinator is.
    pub address: String,
    /// Milliseconds since the Unix epoch.
    pub now: u64,
    /// Whether the coordinator answers.
    pub link: Link,
    /// Its jobs: at work, then those that wait, then those that ended; none before it told.
    pub jobs: Option<Vec<JobSummary>>,
    /// The job under the cursor, by its place in the list.
    pub selected: usize,
    /// What is on the screen.
    pub page: Page,
    /// The job that is watched.
    pub job: Option<Job>,
    /// Lines that the page is scrolled by: from the top, in logs and events from the newest.
    pub scroll: usize,
    /// Whether the keys are explained.
    pub help: bool,
    /// Log lines that are shown: this level and those above.
    pub level: Level,
    /// What log lines must hold.
    pub filter: String,
    /// Whether keys go into the filter.
    pub typing: bool,
}

impl App {
    /// Shows the jobs of the coordinator at `address`.
    pub fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            now: 0,
            link: Link::Connecting,
            jobs: None,
            selected: 0,
            page: Page::Jobs,
            job: None,
            scroll: 0,
            help: false,
            level: Level::Info,
            filter: String::new(),
            typing: false,
        }
    }

    /// Shows one job from the start.
    #[must_use]
    pub fn showing(mut self, job_id: &str) -> Self {
        self.page = Page::Job(Tab::Overview);
        self.job = Some(Job::new(job_id));
        self
    }

    /// Takes something in; gives what is wanted because of it.
    pub fn update(&mut self, input: Input) -> Option<Wish> {
        match input {
            Input::Key(key) => return self.key(key),
            Input::Time(now) => self.now = now,
            Input::News(news) => self.news(news),
        }
        None
    }

    fn news(&mut self, news: News) {
        match news {
            News::Connected => self.link = Link::Up,
            News::Lost(reason) => {
                let since = match &self.link {
                    Link::Lost { since, .. } => *since,
                    Link::Connecting | Link::Up => self.now,
                };
                self.link = Link::Lost { since, reason };
            }
            News::Jobs(jobs) => self.take_jobs(jobs),
            other => {
                let now = self.now;
                if let Some(job) = &mut self.job {
                    job.take(other, now);
                }
            }
        }
    }

    fn take_jobs(&mut self, mut jobs: Vec<JobSummary>) {
        jobs.sort_by_key(order);
        let under = self.jobs.as_ref().and_then(|jobs| jobs.get(self.selected)).map(|job| job.job_id.clone());
        // The cursor stays on its job when the list moves.
        let place = under.and_then(|id| jobs.iter().position(|job| job.job_id == id));
        self.selected = place.unwrap_or(self.selected).min(jobs.len().saturating_sub(1));
        self.jobs = Some(jobs);
    }

    fn key(&mut self, key: KeyEvent) -> Option<Wish> {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Some(Wish::Quit);
        }
        if self.typing {
            self.typed(key.code);
            return None;
        }
        if self.help {
            self.help = false;
            return None;
        }
        match (key.code, self.page) {
            (KeyCode::Char('q'), _) => return Some(Wish::Quit),
            (KeyCode::Char('?' | 'h'), _) => self.help = true,
            (KeyCode::Enter | KeyCode::Right, Page::Jobs) => return self.open(),
            (KeyCode::Esc | KeyCode::Backspace, Page::Job(_)) => {
                (self.page, self.job, self.scroll) = (Page::Jobs, None, 0);
                return Some(Wish::Unwatch);
            }
            (KeyCode::Char(digit @ '1'..='6'), Page::Job(_)) => {
                self.show(Tab::ALL[digit as usize - '1' as usize]);
            }
            (KeyCode::Tab | KeyCode::Right, Page::Job(tab)) => self.show(tab.beside(1)),
            (KeyCode::BackTab | KeyCode::Left, Page::Job(tab)) => self.show(tab.beside(Tab::ALL.len() - 1)),
            (KeyCode::Char('l'), Page::Job(Tab::Logs)) => {
                (self.level, self.scroll) = (self.level.next(), 0);
            }
            (KeyCode::Char('w'), Page::Job(Tab::Logs)) => {
                self.scroll = 0;
                if let Some(job) = &mut self.job {
                    job.next_worker();
                }
            }
            (KeyCode::Char('/'), Page::Job(Tab::Logs)) => self.typing = true,
            (code, page) => self.move_by(code, page),
        }
        None
    }

    fn typed(&mut self, code: KeyCode) {
        self.scroll = 0;
        match code {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => (self.typing, self.filter) = (false, String::new()),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => {}
        }
    }

    fn open(&mut self) -> Option<Wish> {
        let id = self.jobs.as_ref()?.get(self.selected)?.job_id.clone();
        self.page = Page::Job(Tab::Overview);
        self.job = Some(Job::new(&id));
        self.scroll = 0;
        Some(Wish::Watch(id))
    }

    fn show(&mut self, tab: Tab) {
        (self.page, self.scroll) = (Page::Job(tab), 0);
    }

    fn move_by(&mut self, code: KeyCode, page: Page) {
        // What is newest stands last in logs and events: up means back in time.
        let newest_last = matches!(page, Page::Job(Tab::Logs | Tab::Events));
        let (place, most) = match page {
            Page::Jobs => {
                (&mut self.selected, self.jobs.as_ref().map_or(0, |jobs| jobs.len().saturating_sub(1)))
            }
            Page::Job(_) => (&mut self.scroll, usize::from(u16::MAX)),
        };
        let (less, more) = (place.saturating_sub(1), place.saturating_add(1));
        let (page_less, page_more) = (place.saturating_sub(PAGE), place.saturating_add(PAGE));
        let moved = match code {
            KeyCode::Up | KeyCode::Char('k') if newest_last => more,
            KeyCode::Down | KeyCode::Char('j') if newest_last => less,
            KeyCode::PageUp if newest_last => page_more,
            KeyCode::PageDown if newest_last => page_less,
            KeyCode::Up | KeyCode::Char('k') => less,
            KeyCode::Down | KeyCode::Char('j') => more,
            KeyCode::PageUp => page_less,
            KeyCode::PageDown => page_more,
            KeyCode::End | KeyCode::Char('G') if newest_last => 0,
            KeyCode::Home | KeyCode::Char('g') if !newest_last => 0,
            KeyCode::End | KeyCode::Char('G') | KeyCode::Home | KeyCode::Char('g') => most,
            _ => return,
        };
        *place = moved.min(most);
    }
}

/// At work, then those that wait by their place, then those that ended; of equals the newest first.
fn order(job: &JobSummary) -> (bool, u32, std::cmp::Reverse<u64>) {
    let ended = is_over(JobState::try_from(job.state).unwrap_or_default());
    (ended, job.place.unwrap_or_default(), std::cmp::Reverse(job.submitted_unix_ms))
}

#[cfg(test)]
mod tests;
