//! Messages that the coordinator has not acknowledged yet.
//!
//! The coordinator handles a stream's messages in order and answers beats. A message that was sent before a beat is
//! therefore handled once that beat is acknowledged. Until then it is kept, and sent again after a lost connection:
//! reports are keyed, so a repeat does no harm.

use std::collections::VecDeque;

use shanty_proto::v1::worker_message::Message;
use tokio::time::Instant;

/// More beats than this without an answer, and no further are sent: the connection is stuck.
const MOST_OPEN_BEATS: usize = 64;

/// What was sent and not acknowledged.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Messages with the number of the last beat before them.
    messages: VecDeque<(u64, Message)>,
    /// Beats of this connection with the time when they were sent.
    beats: VecDeque<(u64, Instant)>,
    /// Number of the last beat, over all connections.
    last_beat: u64,
}

impl Outbox {
    /// Notes a message that is sent now.
    pub(super) fn sent(&mut self, message: Message) {
        self.messages.push_back((self.last_beat, message));
    }

    /// The number of a beat that is sent at `now`; none while too many are open.
    pub(super) fn beat(&mut self, now: Instant) -> Option<u64> {
        if self.beats.len() >= MOST_OPEN_BEATS {
            return None;
        }
        self.last_beat += 1;
        self.beats.push_back((self.last_beat, now));
        Some(self.last_beat)
    }

    /// A beat was acknowledged: when it was sent. None for a beat of another connection.
    pub(super) fn acknowledged(&mut self, beat: u64) -> Option<Instant> {
        let mut sent = None;
        while let Some((number, at)) = self.beats.front().copied()
            && number <= beat
        {
            sent = (number == beat).then_some(at);
            self.beats.pop_front();
        }
        if sent.is_some() {
            self.messages.retain(|(before, _)| *before >= beat);
        }
        sent
    }

    /// The connection is gone: what must be sent again over the next one.
    pub(super) fn reconnect(&mut self) -> Vec<Message> {
        self.beats.clear();
        self.messages.drain(..).map(|(_, message)| message).collect()
    }
}

#[cfg(test)]
mod tests {
    use shanty_proto::v1::{Broken, Goodbye};

    use super::*;

    fn message(step: u64) -> Message {
        Message::Broken(Broken { step, ..Broken::default() })
    }

    #[test]
    fn messages_are_kept_until_a_later_beat_is_acknowledged() {
        let mut outbox = Outbox::default();
        let start = Instant::now();
        outbox.sent(message(1));
        let first = outbox.beat(start).unwrap();
        outbox.sent(message(2));
        let second = outbox.beat(start).unwrap();
        outbox.sent(message(3));
        assert_eq!(outbox.acknowledged(first), Some(start));
        assert_eq!(outbox.acknowledged(second), Some(start));
        assert_eq!(outbox.acknowledged(second), None);
        assert_eq!(outbox.reconnect(), [message(3)]);
    }

    #[test]
    fn an_answer_from_an_earlier_connection_counts_for_nothing() {
        let mut outbox = Outbox::default();
        let beat = outbox.beat(Instant::now()).unwrap();
        outbox.sent(Message::Goodbye(Goodbye::default()));
        assert_eq!(outbox.reconnect().len(), 1);
        outbox.sent(message(1));
        assert_eq!(outbox.acknowledged(beat), None);
        assert_eq!(outbox.reconnect(), [message(1)]);
    }

    #[test]
    fn a_stuck_connection_does_not_pile_up_beats() {
        let mut outbox = Outbox::default();
        let sent = (0..1000).filter_map(|_| outbox.beat(Instant::now())).count();
        assert_eq!(sent, MOST_OPEN_BEATS);
    }
}
