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
/// Acknowledged step reports that are kept: what a coordinator may have in its hands when it dies.
const MOST_RECENT_STEPS: usize = 64;

/// What was sent and not acknowledged.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Messages with the number of the last beat before them.
    messages: VecDeque<(u64, Message)>,
    /// Step reports that were acknowledged a moment ago: a coordinator that is killed may have heard them and not written
    /// them down yet.
    recent: VecDeque<Message>,
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
            while let Some((before, _)) = self.messages.front()
                && *before < beat
            {
                let known = self.messages.pop_front();
                self.recent.extend(known.map(|(_, message)| message).filter(is_step));
            }
            self.recent.drain(..self.recent.len().saturating_sub(MOST_RECENT_STEPS));
        }
        sent
    }

    /// The connection is gone: what must be sent again over the next one, steps of a moment ago first.
    pub(super) fn reconnect(&mut self) -> Vec<Message> {
        self.beats.clear();
        let unacknowledged = self.messages.drain(..).map(|(_, message)| message);
        self.recent.drain(..).chain(unacknowledged).collect()
    }
}

fn is_step(message: &Message) -> bool {
    matches!(message, Message::Step(_))
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
    fn steps_of_a_moment_ago_are_said_again_after_a_lost_connection() {
        use shanty_proto::v1::StepReport;

        let step = |step| Message::Step(StepReport { step, ..StepReport::default() });
        let mut outbox = Outbox::default();
        for number in 0..100 {
            outbox.sent(step(number));
            let beat = outbox.beat(Instant::now()).unwrap();
            outbox.acknowledged(beat);
        }
        outbox.sent(message(1));
        let again = outbox.reconnect();
        assert_eq!(again.len(), MOST_RECENT_STEPS + 1);
        assert_eq!(again[0], step(100 - MOST_RECENT_STEPS as u64));
        assert_eq!(again.last(), Some(&message(1)));
        assert!(outbox.reconnect().is_empty());
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
