//! Log lines on their way to the coordinator, for `shanty logs` and the dashboard.
//!
//! The queue is bounded and never waited for: while the coordinator is away, or slow, lines beyond it are left out
//! and counted. The worker's own log file has them all.

use std::{
    fmt::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use shanty_proto::v1::LogLine;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

/// Lines that wait for the coordinator at most.
const QUEUE: usize = 1024;
/// A longer line is cut.
const LONGEST_LINE_BYTES: usize = 2048;

/// A layer that queues what this worker logs, at level info and above.
#[derive(Debug, Clone)]
pub struct LogForwarder {
    sender: Sender<LogLine>,
    worker_id: Arc<str>,
    left_out: Arc<AtomicU64>,
}

/// A layer for the subscriber, and the queue's other end for [`run_worker`](crate::run_worker).
pub fn forwarder(worker_id: &str) -> (LogForwarder, Receiver<LogLine>) {
    let (sender, receiver) = channel(QUEUE);
    let left_out = Arc::new(AtomicU64::new(0));
    (LogForwarder { sender, worker_id: worker_id.into(), left_out }, receiver)
}

impl LogForwarder {
    fn queue(&self, level: Level, text: String) {
        let line = LogLine {
            unix_ms: unix_ms(),
            worker_id: self.worker_id.to_string(),
            level: level.as_str().to_ascii_lowercase(),
            text,
        };
        if self.sender.try_send(line).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<S: Subscriber> Layer<S> for LogForwarder {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        // What the transport logs while it sends lines must not become a line.
        if level > Level::INFO || !event.metadata().target().starts_with("shanty") {
            return;
        }
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 && self.sender.capacity() > 1 {
            self.queue(Level::WARN, format!("{left_out} log lines were left out"));
        } else {
            self.left_out.fetch_add(left_out, Ordering::Relaxed);
        }
        let mut line = Line::default();
        event.record(&mut line);
        self.queue(level, line.finish());
    }
}

/// A message with its fields: `step applied step=3 loss=1.25`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn finish(mut self) -> String {
        self.message.push_str(&self.fields);
        if self.message.len() > LONGEST_LINE_BYTES {
            self.message.truncate(self.message.floor_char_boundary(LONGEST_LINE_BYTES));
            self.message.push('…');
        }
        self.message
    }

    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value}"),
            name => write!(self.fields, " {name}={value}"),
        };
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, format_args!("{value}"));
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tracing::{debug, info, warn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn lines_have_level_and_fields_and_debug_stays_here() {
        let (layer, mut lines) = forwarder("w1");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            info!(step = 3, loss = 1.25, reason = %"because", "step applied");
            debug!("not sent");
        });
        let line = lines.try_recv().unwrap();
        assert_eq!((line.worker_id.as_str(), line.level.as_str()), ("w1", "info"));
        assert_eq!(line.text, "step applied step=3 loss=1.25 reason=because");
        assert!(lines.try_recv().is_err());
    }

    #[test]
    fn lines_beyond_the_queue_are_counted() {
        let (layer, mut lines) = forwarder("w1");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for line in 0..QUEUE + 10 {
                warn!(line, "much to say");
            }
            while lines.try_recv().is_ok() {}
            info!("quiet again");
        });
        assert_eq!(lines.try_recv().unwrap().text, "10 log lines were left out");
        assert_eq!(lines.try_recv().unwrap().text, "quiet again");
    }
}
