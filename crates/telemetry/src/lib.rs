//! What a process tells of itself: logs ([`init`]), traces
//! ([`trace`]), what it takes ([`process`]), what its card says ([`card`]).
//!
//! Logs are structured; they go to the terminal, to one file a process, and to whoever listens.
//!
//! [`init`] once at the start of a program; keep the [`Guard`] until its end. Events are `tracing` events: a short,
//! constant message and fields. Nothing is ever written to stdout, and nothing that is written can stop the work:
//! a full queue drops lines and counts them ([`Guard::dropped`]).

pub mod card;
mod error;
mod forward;
pub mod process;
mod rotate;
pub mod tensorboard;
pub mod trace;

use std::{
    env, io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Layer, Registry, layer::SubscriberExt, util::SubscriberInitExt};

pub use error::Error;
pub use forward::{Forward, Level, LogLine};
pub use rotate::keep_newest;

/// Names of environment variables are declared in `shanty-config`; this crate depends on nothing of ours.
const SHANTY_LOG: &str = "SHANTY_LOG";
const NO_COLOR: &str = "NO_COLOR";

/// Where logs go.
#[derive(Debug, Default)]
pub struct Options {
    /// What is logged where `SHANTY_LOG` is not set: a level, or a filter such as `info,shanty_worker=debug`.
    /// `info` when absent.
    pub level: Option<String>,
    /// What stderr gets.
    pub format: Format,
    /// A file that gets JSON lines; it is rotated by size.
    pub file: Option<PathBuf>,
    /// Who else gets each line.
    pub forward: Option<Forward>,
}

/// What stderr gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Lines for people; coloured on a terminal unless `NO_COLOR` is set.
    #[default]
    Terminal,
    /// One JSON object a line.
    Json,
    /// Nothing.
    None,
}

/// Writes out what is queued when it is dropped; keep it until the program ends.
#[derive(Debug)]
#[must_use = "logs stop when the guard is dropped"]
pub struct Guard {
    _file: Option<WorkerGuard>,
    file_drops: Option<ErrorCounter>,
    forward_drops: Arc<AtomicU64>,
}

impl Guard {
    /// Lines that were dropped so far, because the file's queue or the listener's was full.
    pub fn dropped(&self) -> u64 {
        let of_file = self.file_drops.as_ref().map_or(0, ErrorCounter::dropped_lines) as u64;
        of_file + self.forward_drops.load(Ordering::Relaxed)
    }
}

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts logging for this process.
///
/// # Errors
/// [`Error::Filter`] for a filter that cannot be read, [`Error::File`] for a file that cannot be opened,
/// [`Error::Twice`] where the process logs already.
pub fn init(options: Options) -> Result<Guard, Error> {
    let (layers, guard) = build(options, &|name| env::var(name).ok())?;
    tracing_subscriber::registry().with(layers).try_init().map_err(|_| Error::Twice)?;
    Ok(guard)
}

/// The layers, with the environment as an argument.
fn build(
    options: Options,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<(Vec<BoxedLayer>, Guard), Error> {
    let set = |name: &str| environment(name).filter(|value| !value.is_empty());
    let (source, filter) = match (set(SHANTY_LOG), options.level) {
        (Some(filter), _) => (SHANTY_LOG, filter),
        (None, Some(filter)) => ("the log level", filter),
        (None, None) => ("the log level", "info".to_owned()),
    };
    let parsed = || parse_filter(source, &filter);
    let color = set(NO_COLOR).is_none() && io::IsTerminal::is_terminal(&io::stderr());

    let mut layers: Vec<BoxedLayer> = Vec::new();
    match options.format {
        Format::Terminal => {
            let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(color).compact();
            layers.push(lines.with_filter(parsed()?).boxed());
        }
        Format::Json => {
            let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).json().flatten_event(true);
            layers.push(lines.with_filter(parsed()?).boxed());
        }
        Format::None => {}
    }

    let mut guard = Guard { _file: None, file_drops: None, forward_drops: Arc::default() };
    if let Some(path) = options.file {
        let file = rotate::Rotating::open(&path).map_err(|source| Error::File { path, source })?;
        // Lossy on purpose: a slow disk must not slow training.
        let (writer, worker) =
            NonBlockingBuilder::default().lossy(true).thread_name("shanty-log").finish(file);
        guard.file_drops = Some(writer.error_counter());
        guard._file = Some(worker);
        let lines = tracing_subscriber::fmt::layer().with_writer(writer).json().flatten_event(true);
        layers.push(lines.with_filter(parsed()?).boxed());
    }
    if let Some(forward) = options.forward {
        let layer = forward::ForwardLayer { forward, dropped: Arc::clone(&guard.forward_drops) };
        layers.push(layer.with_filter(parsed()?).boxed());
    }
    Ok((layers, guard))
}

fn parse_filter(source: &str, filter: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder().parse(filter).map_err(|error| Error::Filter {
        named: source.to_owned(),
        filter: filter.to_owned(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests;
