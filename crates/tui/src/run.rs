//! Brings keys, news, time and the terminal together.

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crossterm::event::{Event, EventStream, KeyEventKind};
use futures::StreamExt;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use crate::{
    Error,
    feed::{self, Connect, Feed},
    state::{App, Input, Page, Tab, Wish},
    terminal::Screen,
    view::{self, Theme},
};

/// News that wait to be shown.
const QUEUE: usize = 256;
/// The screen is drawn no more often than this.
const FRAME: Duration = Duration::from_millis(100);
/// Frames after which the ages on the screen are drawn anew though nothing came.
const FRAMES_A_LOOK: u32 = 5;

/// What is shown, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the coordinator is.
    pub address: String,
    /// The job that is shown at first.
    pub job: Option<String>,
    /// What the terminal can do.
    pub theme: Theme,
    /// How often the coordinator is asked.
    pub every: Duration,
}

impl Options {
    fn app(&self) -> App {
        let app = App::new(&self.address);
        match &self.job {
            Some(job) => app.showing(job),
            None => app,
        }
    }
}

/// Shows jobs until the user has enough; `true` where a signal ended it.
///
/// # Errors
/// [`Error::Terminal`] where the terminal cannot be drawn on.
pub async fn run(options: Options, connect: Connect) -> Result<bool, Error> {
    let (news, mut incoming) = mpsc::channel(QUEUE);
    let (wanted, watched) = watch::channel(options.job.clone());
    let feed = Feed { connect, news, wanted: watched, every: options.every };
    let mut signals = Signals::new()?;
    let mut app = options.app();
    app.update(Input::Time(now()));
    let mut screen = Screen::take()?;
    let feed = tokio::spawn(feed.run());
    let mut events = EventStream::new();
    let mut frames = interval(FRAME);
    frames.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut changed, mut idle) = (true, 0);
    let ended = loop {
        tokio::select! {
            biased;
            () = signals.wait() => break Ok(true),
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => {
                    match app.update(Input::Key(key)) {
                        Some(Wish::Quit) => break Ok(false),
                        Some(Wish::Watch(job)) => drop(wanted.send_replace(Some(job))),
                        Some(Wish::Unwatch) => drop(wanted.send_replace(None)),
                        None => {}
                    }
                    // A key is answered at once.
                    if let Err(error) = screen.draw(&app, options.theme) {
                        break Err(error);
                    }
                }
                Some(Ok(_)) => changed = true,
                Some(Err(source)) => break Err(Error::Terminal { action: "read", source }),
                None => break Ok(true),
            },
            Some(first) = incoming.recv() => {
                app.update(Input::News(first));
                while let Ok(more) = incoming.try_recv() {
                    app.update(Input::News(more));
                }
                changed = true;
            }
            _ = frames.tick() => {
                idle += 1;
                if changed || idle >= FRAMES_A_LOOK {
                    app.update(Input::Time(now()));
                    if let Err(error) = screen.draw(&app, options.theme) {
                        break Err(error);
                    }
                    (changed, idle) = (false, 0);
                }
            }
        }
    };
    feed.abort();
    ended
}

/// Asks once and gives one page as text, for a screen of `size`: for terminals that cannot be drawn on.
///
/// # Errors
/// [`Error::Ask`] where the coordinator does not answer.
pub async fn once(
    options: &Options,
    connect: Connect,
    page: Option<Tab>,
    size: (u16, u16),
) -> Result<String, Error> {
    let failed = |reason: String| Error::Ask { address: options.address.clone(), reason };
    let channel = connect().await.map_err(failed)?;
    let mut app = options.app();
    app.update(Input::Time(now()));
    for news in feed::once(channel, options.job.as_deref()).await.map_err(failed)? {
        app.update(Input::News(news));
    }
    if let (Page::Job(_), Some(tab)) = (app.page, page) {
        app.page = Page::Job(tab);
    }
    Ok(view::text(&app, options.theme, size))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What ends a program from outside: the terminal must be given back before.
struct Signals([Signal; 4]);

impl Signals {
    fn new() -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Terminal { action: "hear signals for", source };
        let hear = |kind| signal(kind).map_err(failed);
        Ok(Self([
            hear(SignalKind::terminate())?,
            hear(SignalKind::interrupt())?,
            hear(SignalKind::hangup())?,
            hear(SignalKind::quit())?,
        ]))
    }

    async fn wait(&mut self) {
        let [terminate, interrupt, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}
