//! Hands each line to a listener: a bounded channel to the coordinator, or a test.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// A line of log on its way to a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Milliseconds since the Unix epoch, this machine's clock; for people.
    pub unix_ms: u64,
    /// How bad it is.
    pub level: Level,
    /// Which part of the program speaks.
    pub target: String,
    /// The message, then `key=value` of the event and of the spans around it.
    pub text: String,
}

/// How bad a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// For those who look for a defect, in detail.
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

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        })
    }
}

impl From<tracing::Level> for Level {
    fn from(level: tracing::Level) -> Self {
        match level {
            tracing::Level::TRACE => Self::Trace,
            tracing::Level::DEBUG => Self::Debug,
            tracing::Level::INFO => Self::Info,
            tracing::Level::WARN => Self::Warn,
            tracing::Level::ERROR => Self::Error,
        }
    }
}

/// A listener. It is called on the thread that logs, so it must not wait.
#[derive(Clone)]
pub struct Forward(Arc<dyn Fn(LogLine) -> bool + Send + Sync>);

impl Forward {
    /// Lines go to this function; it says whether it took the line. For tokio's channel:
    /// `Forward::new(move |line| sender.try_send(line).is_ok())`.
    pub fn new(take: impl Fn(LogLine) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }
}

impl From<SyncSender<LogLine>> for Forward {
    fn from(sender: SyncSender<LogLine>) -> Self {
        Self::new(move |line| sender.try_send(line).is_ok())
    }
}

impl fmt::Debug for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forward")
    }
}

pub(crate) struct ForwardLayer {
    pub(crate) forward: Forward,
    pub(crate) dropped: Arc<AtomicU64>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for ForwardLayer {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut text = fields.message;
        text.push_str(&fields.pairs);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<Fields>() {
                text.push_str(&fields.pairs);
            }
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = LogLine {
            unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            level: (*event.metadata().level()).into(),
            target: event.metadata().target().to_owned(),
            text,
        };
        if !(self.forward.0)(line) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The message, and ` key=value` of all other fields.
#[derive(Default)]
struct Fields {
    message: String,
    pairs: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write;
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.pairs, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        // A word needs no quotes; a text with spaces does, or its end is lost.
        let is_word =
            !value.is_empty() && !value.contains(|letter: char| letter.is_whitespace() || letter == '"');
        if is_word || field.name() == "message" {
            self.record_debug(field, &format_args!("{value}"));
        } else {
            self.record_debug(field, &value);
        }
    }
}
