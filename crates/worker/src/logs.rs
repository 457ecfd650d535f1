//! Log lines on their way to the coordinator, for `shanty logs` and the dashboard.
//!
//! The queue is bounded and never waited for: while the coordinator is away, or slow, lines beyond it are dropped and
//! counted by shanty-telemetry. The worker's own log file has them all.

use shanty_proto::v1;
use shanty_telemetry::{Forward, Level, LogLine};
use tokio::sync::mpsc::{Receiver, channel};

/// Lines that wait for the coordinator at most.
const QUEUE: usize = 1024;
/// A longer line is cut.
const LONGEST_LINE_BYTES: usize = 2048;

/// A listener for `shanty_telemetry::Options::forward`, and the queue's other end for
/// [`run_worker`](crate::run_worker). Lines of level info and above go to the coordinator.
pub fn forward(worker_id: &str) -> (Forward, Receiver<v1::LogLine>) {
    let (sender, receiver) = channel(QUEUE);
    let worker_id = worker_id.to_owned();
    let forward = Forward::new(move |line| match wire_line(&worker_id, line) {
        Some(line) => sender.try_send(line).is_ok(),
        None => true,
    });
    (forward, receiver)
}

/// As it travels; none for what stays here. What the transport logs while it sends lines must not become a line.
fn wire_line(worker_id: &str, line: LogLine) -> Option<v1::LogLine> {
    if line.level < Level::Info || !line.target.starts_with("shanty") {
        return None;
    }
    let mut text = line.text;
    if text.len() > LONGEST_LINE_BYTES {
        let end = (0..=LONGEST_LINE_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    Some(v1::LogLine {
        unix_ms: line.unix_ms,
        worker_id: worker_id.to_owned(),
        level: line.level.to_string(),
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: Level, target: &str, text: &str) -> LogLine {
        LogLine { unix_ms: 7, level, target: target.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn only_our_own_lines_of_interest_travel() {
        let sent = wire_line("w1", line(Level::Warn, "shanty_worker::session", "gone")).unwrap();
        assert_eq!(
            (sent.worker_id.as_str(), sent.level.as_str(), sent.text.as_str()),
            ("w1", "warn", "gone")
        );
        assert!(wire_line("w1", line(Level::Debug, "shanty_worker", "gone")).is_none());
        assert!(wire_line("w1", line(Level::Error, "h2::codec", "gone")).is_none());
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let sent = wire_line("w1", line(Level::Info, "shanty", &"ä".repeat(5000))).unwrap();
        assert!(sent.text.len() <= LONGEST_LINE_BYTES + '…'.len_utf8());
        assert!(sent.text.ends_with("ä…"));
    }
}
