//! The sum of gradients over all members, begun while the last micro-batch computes.
//!
//! A backward pass makes the flat gradient front to back. As soon as a piece of it is final, it is summed over the
//! members: on a card by work that is queued beside the pass, in host memory by a thread that gets a copy. So the local
//! sum is never touched, and whole whatever becomes of the reduction. Pieces and their order are the same whether they
//! are summed early or late, and so are the bits.

use std::{collections::VecDeque, ops::Range, sync::mpsc, thread, time::Instant};

use shanty_collective::{Collective, DeviceCollective, Error, Result};
use shanty_peft_core::backend::cuda::CardFlat;

use crate::engine::{Memory, NoSink, PIECE, Reducer, SumSink};

/// What of a reduction is begun.
#[derive(Debug, Default)]
pub(super) struct Begun {
    /// When the member had nothing else left to do; none if nothing was begun.
    pub(super) since: Option<Instant>,
    /// The first pieces, summed, where they lie in host memory.
    sums: VecDeque<Vec<f32>>,
    /// How many numbers are queued, where they lie on a card.
    queued: usize,
    /// What broke it.
    failed: Option<Error>,
}

/// Told of every piece that is summed.
pub(super) type Advance<'a> = &'a (dyn Fn() + Sync);

/// Carries out `work`, which makes the last part of a sum of `length` numbers and tells what is final; meanwhile sums
/// that over the members.
pub(super) fn beside<R>(
    collective: &mut dyn Collective,
    length: usize,
    advance: Advance<'_>,
    mut work: impl FnMut(&mut dyn SumSink) -> R,
) -> (R, Begun) {
    if let Some(device) = collective.on_device() {
        let mut sink = OnCard { device, length, begun: Begun::default() };
        let done = work(&mut sink);
        return (done, Begun { since: Some(Instant::now()), ..sink.begun });
    }
    thread::scope(|scope| {
        let (sender, pieces) = mpsc::channel();
        let reducer = thread::Builder::new()
            .name("reduction".to_owned())
            .spawn_scoped(scope, move || sum_each(collective, &pieces, advance));
        let Ok(reducer) = reducer else {
            // Without a thread everything is summed afterwards.
            return (work(&mut NoSink), Begun { since: Some(Instant::now()), ..Begun::default() });
        };
        let mut sink = InPieces { sender, sent: 0, length };
        let done = work(&mut sink);
        let since = Some(Instant::now());
        drop(sink);
        let begun = reducer.join().unwrap_or_else(|_| {
            let first = "the thread that sums gradients died".to_owned();
            Begun { failed: Some(Error::Broken { first }), ..Begun::default() }
        });
        (done, Begun { since, ..begun })
    })
}

/// Sums what comes until nothing comes any more, or it breaks.
fn sum_each(
    collective: &mut dyn Collective,
    pieces: &mpsc::Receiver<Vec<f32>>,
    advance: Advance<'_>,
) -> Begun {
    let mut begun = Begun::default();
    for own in pieces {
        let mut sum = vec![0.0; own.len()];
        match collective.all_reduce_f32(&own, &mut sum) {
            Ok(()) => {
                begun.sums.push_back(sum);
                advance();
            }
            Err(error) => {
                begun.failed = Some(error);
                break;
            }
        }
    }
    begun
}

/// The pieces that are final once everything before `end` is, of those after `done`.
fn whole_pieces(done: usize, end: usize, length: usize) -> impl Iterator<Item = Range<usize>> {
    (done..length)
        .step_by(PIECE)
        .map(move |start| start..(start + PIECE).min(length))
        .take_while(move |piece| piece.end <= end)
}

/// Hands copies of pieces in host memory to the thread that sums them.
struct InPieces {
    sender: mpsc::Sender<Vec<f32>>,
    sent: usize,
    length: usize,
}

impl SumSink for InPieces {
    fn ready(&mut self, range: Range<usize>, memory: Memory<'_>) {
        // A sum on a card that is to be summed over TCP goes through the host afterwards.
        let Memory::Host(gradient) = memory else { return };
        for piece in whole_pieces(self.sent, range.end, self.length) {
            self.sent = piece.end;
            // If the reduction broke, nobody takes it.
            let _ = self.sender.send(gradient[piece].to_vec());
        }
    }
}

/// Queues pieces on a card beside the pass.
struct OnCard<'a> {
    device: &'a mut dyn DeviceCollective,
    length: usize,
    begun: Begun,
}

impl SumSink for OnCard<'_> {
    fn ready(&mut self, range: Range<usize>, memory: Memory<'_>) {
        let Memory::Card(flat) = memory else { return };
        // The place of the sum is reserved when a member first needs it: then everything is summed afterwards.
        if flat.spans().is_none() {
            return;
        }
        if self.begun.failed.is_none()
            && let Err(error) = queue(self.device, flat, &mut self.begun.queued, range.end, self.length)
        {
            self.begun.failed = Some(error);
        }
    }
}

/// Queues the pieces that end before `end`.
fn queue(
    device: &mut dyn DeviceCollective,
    flat: &CardFlat,
    queued: &mut usize,
    end: usize,
    length: usize,
) -> Result<()> {
    let reason = || "the gradient is no memory of its own".to_owned();
    let missing = || Error::Argument { operation: "queue_all_reduce_f32", reason: reason() };
    let [own, sum] = flat.spans().ok_or_else(missing)?;
    for piece in whole_pieces(*queued, end, length) {
        let bytes = piece.start * size_of::<f32>()..piece.end * size_of::<f32>();
        let (own, sum) = (own.part(bytes.clone()).ok_or_else(missing)?, sum.part(bytes).ok_or_else(missing)?);
        device.queue_all_reduce_f32(&own, &sum)?;
        *queued = piece.end;
    }
    Ok(())
}

/// The members of a generation, as a gradient's pieces see them: front to back.
pub(super) struct Members<'a> {
    collective: &'a mut dyn Collective,
    begun: Begun,
    advance: Advance<'a>,
}

impl<'a> Members<'a> {
    /// With what is begun already.
    pub(super) fn new(collective: &'a mut dyn Collective, begun: Begun, advance: Advance<'a>) -> Self {
        Self { collective, begun, advance }
    }
}

impl Reducer for Members<'_> {
    fn reduce(&mut self, own: &[f32], sum: &mut [f32]) -> Result<()> {
        match (self.begun.sums.pop_front(), &self.begun.failed) {
            (Some(early), _) => {
                sum.copy_from_slice(&early);
                Ok(())
            }
            (None, Some(error)) => Err(error.clone()),
            (None, None) => {
                self.collective.all_reduce_f32(own, sum)?;
                (self.advance)();
                Ok(())
            }
        }
    }

    fn reduce_on_card(&mut self, flat: &CardFlat) -> Option<Result<()>> {
        let device = self.collective.on_device()?;
        if let Some(error) = self.begun.failed.take() {
            return Some(Err(error));
        }
        // The integers that come next go the same way: when they are there, so are the sums.
        Some(queue(device, flat, &mut self.begun.queued, flat.length(), flat.length()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
        time::Duration,
    };

    use shanty_collective::{AbortHandle, HopHook, local};

    use super::*;

    const LENGTH: usize = 3 * PIECE + 1234;

    fn gradient(rank: u32) -> Vec<f32> {
        (0..LENGTH).map(|i| ((i as u32).wrapping_mul(2_654_435_761) ^ rank) as f32 * 1e-3 - 1e6).collect()
    }

    /// The sum at one member, of which `told` numbers were told while they were made.
    fn reduced(collective: &mut dyn Collective, told: &[Range<usize>]) -> (Vec<f32>, usize) {
        let own = gradient(collective.rank());
        let ((), begun) = beside(collective, LENGTH, &|| {}, |sink| {
            for range in told {
                sink.ready(range.clone(), Memory::Host(&own));
            }
        });
        let early = begun.sums.len();
        let mut sum = vec![0.0; LENGTH];
        let mut members = Members::new(collective, begun, &|| {});
        for (own, sum) in own.chunks(PIECE).zip(sum.chunks_mut(PIECE)) {
            members.reduce(own, sum).unwrap();
        }
        (sum, early)
    }

    fn on_two<T: Send>(work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
        let work = &work;
        thread::scope(|scope| {
            let members: Vec<_> = local::group(2)
                .into_iter()
                .map(|mut member| scope.spawn(move || work(&mut member)))
                .collect();
            members.into_iter().map(|member| member.join().unwrap()).collect()
        })
    }

    fn bits(numbers: &[f32]) -> Vec<u32> {
        numbers.iter().map(|number| number.to_bits()).collect()
    }

    #[test]
    fn early_sums_have_the_bits_of_late_ones() {
        let late = on_two(|member| reduced(member, &[]));
        let early = on_two(|member| {
            // Members need not have made as much at the same time.
            let half = PIECE / 2 + member.rank() as usize;
            reduced(member, &[0..half, half..2 * PIECE + 5, 2 * PIECE + 5..LENGTH])
        });
        assert_eq!((late[0].1, early[0].1), (0, 4), "pieces summed before the end");
        for (sum, _) in early.iter().chain(&late) {
            assert!(bits(sum) == bits(&late[0].0));
        }
    }

    /// The work goes on until a piece is summed that it made itself: without a reduction beside it, it would not end.
    #[test]
    fn pieces_are_summed_while_the_work_goes_on() {
        on_two(|member| {
            member.set_call_deadline(Some(Duration::from_secs(60)));
            let own = gradient(member.rank());
            let summed = AtomicUsize::new(0);
            let advance = || {
                summed.fetch_add(1, Ordering::SeqCst);
            };
            let start = Instant::now();
            let ((), begun) = beside(member, LENGTH, &advance, |sink| {
                sink.ready(0..PIECE, Memory::Host(&own));
                while summed.load(Ordering::SeqCst) == 0 {
                    assert!(start.elapsed() < Duration::from_secs(60), "nothing is summed meanwhile");
                    thread::yield_now();
                }
                sink.ready(PIECE..LENGTH, Memory::Host(&own));
            });
            assert_eq!(begun.sums.len(), 4);
        });
    }

    #[test]
    fn one_that_has_nothing_to_compute_sums_with_one_that_has() {
        let sums = on_two(|member| {
            let all = std::slice::from_ref(&(0..LENGTH));
            let told = if member.rank() == 0 { all } else { &[] };
            reduced(member, told).0
        });
        assert!(bits(&sums[0]) == bits(&sums[1]));
    }

    #[test]
    fn gaps_and_tails_are_summed_too() {
        let sums = on_two(|member| reduced(member, &[0..5, PIECE + 7..2 * PIECE]));
        assert_eq!(sums[0].1, 2);
        assert!(bits(&sums[0].0) == bits(&sums[1].0));
    }

    #[test]
    fn a_break_in_the_middle_lets_the_work_end_and_is_told_then() {
        let results = on_two(|member| {
            let abort: AbortHandle = member.abort_handle();
            if member.rank() == 1 {
                let mut calls = 0;
                let hook: HopHook = Box::new(move |_| {
                    calls += 1;
                    if calls == 2 {
                        abort.abort("dies");
                    }
                });
                member.set_hop_hook(Some(hook));
            }
            let own = gradient(member.rank());
            let (made, begun) = beside(member, LENGTH, &|| {}, |sink| {
                sink.ready(0..LENGTH, Memory::Host(&own));
                "whole"
            });
            assert_eq!((made, &own), ("whole", &gradient(member.rank())));
            let (mut sum, mut members) = (vec![0.0; PIECE], Members::new(member, begun, &|| {}));
            members.reduce(&own[..PIECE], &mut sum).unwrap();
            members.reduce(&own[PIECE..2 * PIECE], &mut sum).unwrap_err()
        });
        assert!(matches!(results[0], Error::PeerLost { .. }), "{}", results[0]);
        assert!(matches!(results[1], Error::Aborted { .. }), "{}", results[1]);
    }
}
