//! One member's place in the ring: a link to the next rank, a link from the rank before, and the loop
//! that drives an operation over both.
//!
//! One thread does it all: sockets do not block, and the loop sends what can be sent, takes what has come,
//! and sleeps in `poll` only when neither moves. So sending and receiving overlap, nothing is copied
//! between threads, and a small operation costs no thread hand-over.

use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    frame::{Difference, HEADER_BYTES, Header},
    pass::{Pass, Place},
    seal::{LinkKey, Seal, TAG_BYTES},
};
use crate::{AbortHandle, Error, HopHook, HopPoint, Operation, Result};

/// A connection whose other end has proved itself, with its key if it is encrypted.
pub(super) struct Link {
    pub stream: TcpStream,
    pub key: Option<LinkKey>,
}

/// The two links. Closed together.
pub(super) struct Links {
    pub next: TcpStream,
    pub previous: TcpStream,
}

impl Links {
    /// Wakes whoever waits on them, here and at the neighbours.
    pub(super) fn close(&self) {
        // A link that is closed already cannot be closed again; that is all that can go wrong.
        let _ = self.next.shutdown(Shutdown::Both);
        let _ = self.previous.shutdown(Shutdown::Both);
    }
}

/// A member's place in the ring.
pub(super) struct Ring {
    links: Arc<Links>,
    next: String,
    previous: String,
    generation: u64,
    sequence: u64,
    abort: AbortHandle,
    /// What seals parts to the next rank and opens those of the rank before, on encrypted links.
    seals: Option<Seals>,
    pub(super) hook: Option<HopHook>,
    pub(super) deadline: Option<Duration>,
}

struct Seals {
    next: Seal,
    previous: Seal,
    /// The part that is on its way out.
    sealed: Vec<u8>,
}

impl Ring {
    /// Takes over connected, authenticated links. `next` and `previous` name the neighbours in errors.
    pub(super) fn new(
        next_link: Link,
        previous_link: Link,
        next: String,
        previous: String,
        generation: u64,
        abort: AbortHandle,
    ) -> io::Result<Self> {
        let seal = |key: &LinkKey| Seal::new(key).ok_or_else(|| io::Error::other("a key that is none"));
        let seals = match (&next_link.key, &previous_link.key) {
            (Some(next), Some(previous)) => {
                Some(Seals { next: seal(next)?, previous: seal(previous)?, sealed: Vec::new() })
            }
            _ => None,
        };
        let links = Links { next: next_link.stream, previous: previous_link.stream };
        for link in [&links.next, &links.previous] {
            link.set_nonblocking(true)?;
            link.set_nodelay(true)?;
        }
        let links = Arc::new(links);
        let weak = Arc::downgrade(&links);
        abort.on_abort(move || {
            if let Some(links) = weak.upgrade() {
                links.close();
            }
        });
        Ok(Self { links, next, previous, generation, sequence: 0, abort, seals, hook: None, deadline: None })
    }

    /// Closes the links.
    pub(super) fn close(&self) {
        self.links.close();
    }

    /// A neighbour whose link is closed or broken, by a look that takes nothing out.
    pub(super) fn lost_neighbour(&self) -> Option<String> {
        let Links { next, previous } = &*self.links;
        let is_lost = |link: &TcpStream| match link.peek(&mut [0]) {
            Ok(bytes) => bytes == 0,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        let lost =
            [(next, &self.next), (previous, &self.previous)].into_iter().find(|(link, _)| is_lost(link));
        lost.map(|(_, name)| name.clone())
    }

    /// Carries out an operation. After an error the links are closed, so that the neighbours notice too.
    pub(super) fn run(&mut self, pass: &mut impl Pass) -> Result<()> {
        self.sequence += 1;
        let result = self.drive(pass);
        if result.is_err() {
            self.links.close();
            // An abort closes the links first and is noticed by that.
            self.abort.check()?;
        }
        result
    }

    fn drive(&mut self, pass: &mut impl Pass) -> Result<()> {
        let call = Call { operation: pass.operation(), sequence: self.sequence, start: Instant::now() };
        let mut sending = Sending::new(Place { hop: pass.sends().start, part: 0 });
        let mut receiving = Receiving::new(pass.receives().start);
        loop {
            let sent = self.send(pass, &call, &mut sending, receiving.place)?;
            let received = self.receive(pass, &call, &mut receiving)?;
            let to_send = sending.place.hop < pass.sends().end;
            let to_receive = receiving.place.hop < pass.receives().end;
            if !to_send && !to_receive {
                return Ok(());
            }
            if !sent && !received {
                let can_send = to_send && pass.is_ready(sending.place, receiving.place);
                self.sleep(&call, to_send, can_send, to_receive)?;
            }
        }
    }

    /// Sends one part or a piece of one. Says whether anything moved.
    fn send(
        &mut self,
        pass: &mut impl Pass,
        call: &Call,
        sending: &mut Sending,
        received: Place,
    ) -> Result<bool> {
        let place = sending.place;
        if place.hop >= pass.sends().end || !pass.is_ready(place, received) {
            return Ok(false);
        }
        if !sending.is_prepared {
            pass.prepare(place);
        }
        let payload = pass.outgoing(place);
        let header = self.header(pass, place, payload.len()).encode();
        if let Some(seals) = &mut self.seals
            && !sending.is_prepared
            && !seals.next.close(&header, payload, &mut seals.sealed)
        {
            return Err(call.lost(&self.next, "a part cannot be encrypted"));
        }
        sending.is_prepared = true;
        let body = self.seals.as_ref().map_or(payload, |seals| &seals.sealed);
        let written = if sending.done < HEADER_BYTES {
            let pieces = [IoSlice::new(&header[sending.done..]), IoSlice::new(body)];
            (&self.links.next).write_vectored(&pieces)
        } else {
            (&self.links.next).write(&body[sending.done - HEADER_BYTES..])
        };
        let bytes = HEADER_BYTES + body.len();
        let Some(written) = self.moved(written, call, &self.next)? else { return Ok(false) };
        sending.done += written;
        if sending.done == bytes {
            *sending = Sending::new(following(place, pass.parts_out(place.hop)));
        }
        Ok(true)
    }

    /// Takes in one part or a piece of one. Says whether anything moved.
    fn receive(&mut self, pass: &mut impl Pass, call: &Call, receiving: &mut Receiving) -> Result<bool> {
        let place = receiving.place;
        let hops = pass.receives();
        if place.hop >= hops.end {
            return Ok(false);
        }
        if place.part == 0 && receiving.done == 0 && !receiving.announced {
            receiving.announced = true;
            if let Some(hook) = &mut self.hook {
                let (operation, sequence) = (call.operation, call.sequence);
                hook(HopPoint {
                    operation,
                    sequence,
                    hop: place.hop - hops.start,
                    hops: hops.end - hops.start,
                });
                // What has come in already could still complete the call.
                self.abort.check()?;
            }
        }
        let payload = pass.incoming(place);
        let payload_bytes = payload.len();
        let tag_bytes = if self.seals.is_some() { TAG_BYTES } else { 0 };
        let Receiving { header, tag, done, .. } = receiving;
        let done_of_body = done.saturating_sub(HEADER_BYTES);
        let done_of_tag = done_of_body.saturating_sub(payload_bytes);
        let rest = [
            IoSliceMut::new(&mut header[(*done).min(HEADER_BYTES)..]),
            IoSliceMut::new(&mut payload[done_of_body.min(payload_bytes)..]),
            IoSliceMut::new(&mut tag[done_of_tag..tag_bytes]),
        ];
        let read = read_pieces(&self.links.previous, rest);
        let Some(read) = self.moved(read, call, &self.previous)? else { return Ok(false) };
        let header_was_due = receiving.done < HEADER_BYTES;
        receiving.done += read;
        if header_was_due && receiving.done >= HEADER_BYTES {
            self.check_header(&self.header(pass, place, payload_bytes), &receiving.header)?;
        }
        if receiving.done == HEADER_BYTES + payload_bytes + tag_bytes {
            if let Some(seals) = &mut self.seals
                && !seals.previous.open(&receiving.header, pass.incoming(place), receiving.tag)
            {
                let (peer, operation, sequence) = (self.previous.clone(), call.operation, call.sequence);
                return Err(Error::Forged { peer, operation, sequence });
            }
            pass.received(place);
            receiving.place = following(place, pass.parts_in(place.hop));
            receiving.done = 0;
            receiving.announced = receiving.place.part != 0;
        }
        Ok(true)
    }

    fn header(&self, pass: &impl Pass, place: Place, payload_bytes: usize) -> Header {
        Header {
            operation: pass.operation(),
            generation: self.generation,
            sequence: self.sequence,
            total_bytes: pass.total_bytes() as u64,
            argument: pass.argument(),
            hop: place.hop,
            part: place.part,
            payload_bytes: payload_bytes as u32,
        }
    }

    fn check_header(&self, due: &Header, came: &[u8; HEADER_BYTES]) -> Result<()> {
        let Err(difference) = due.compare(came) else { return Ok(()) };
        let (peer, operation, sequence) = (self.previous.clone(), due.operation, due.sequence);
        Err(match difference {
            Difference::Length(theirs_bytes) => {
                let ours_bytes = due.total_bytes;
                Error::LengthMismatch { peer, operation, sequence, ours_bytes, theirs_bytes }
            }
            Difference::Other(found) => Error::Unexpected { peer, operation, sequence, found },
        })
    }

    /// Turns the outcome of a read or write into bytes moved, nothing for now, or a lost peer.
    fn moved(&self, outcome: io::Result<usize>, call: &Call, peer: &str) -> Result<Option<usize>> {
        match outcome {
            Ok(0) => Err(call.lost(peer, "it closed the connection")),
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(call.lost(peer, error)),
        }
    }

    /// Waits until a link moves, breaks, or time is up.
    fn sleep(&self, call: &Call, to_send: bool, can_send: bool, to_receive: bool) -> Result<()> {
        let Links { next, previous } = &*self.links;
        let timeout = match self.deadline {
            None => None,
            Some(limit) => match limit.checked_sub(call.start.elapsed()) {
                Some(left) => Some(timespec(left)),
                None => {
                    let peer = if to_receive { &self.previous } else { &self.next };
                    let (operation, sequence) = (call.operation, call.sequence);
                    return Err(Error::Deadline { peer: peer.clone(), operation, sequence, limit });
                }
            },
        };
        // Nothing ever comes from the next rank, so "readable" says that it closed the link. That
        // matters only while it still has to get something: one that has all may leave.
        let mut of_next = PollFlags::empty();
        of_next.set(PollFlags::IN, to_send);
        of_next.set(PollFlags::OUT, can_send);
        let mut polled = Vec::with_capacity(2);
        if to_send {
            polled.push(PollFd::new(next, of_next));
        }
        if to_receive {
            polled.push(PollFd::new(previous, PollFlags::IN));
        }
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(call.lost(&self.next, io::Error::from(error))),
        }
        let broken = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        if to_send && polled[0].revents().intersects(broken) {
            match next.peek(&mut [0]) {
                Ok(0) => return Err(call.lost(&self.next, "it closed the connection")),
                Ok(_) => {
                    let found = "bytes on a link that it only reads".to_owned();
                    let (peer, operation, sequence) = (self.next.clone(), call.operation, call.sequence);
                    return Err(Error::Unexpected { peer, operation, sequence, found });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(call.lost(&self.next, error)),
            }
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // What was sent is still delivered.
        self.links.close();
    }
}

struct Call {
    operation: Operation,
    sequence: u64,
    start: Instant,
}

impl Call {
    fn lost(&self, peer: &str, reason: impl ToString) -> Error {
        Error::PeerLost {
            peer: peer.to_owned(),
            operation: self.operation,
            sequence: self.sequence,
            reason: reason.to_string(),
        }
    }
}

struct Sending {
    place: Place,
    /// Whether the part is ready to be written.
    is_prepared: bool,
    /// Bytes of header and body that are out.
    done: usize,
}

impl Sending {
    fn new(place: Place) -> Self {
        Self { place, is_prepared: false, done: 0 }
    }
}

struct Receiving {
    place: Place,
    header: [u8; HEADER_BYTES],
    /// What ends a part on an encrypted link.
    tag: [u8; TAG_BYTES],
    /// Bytes of header, payload and tag that are in.
    done: usize,
    /// Whether the hook knows of this hop.
    announced: bool,
}

impl Receiving {
    fn new(hop: u32) -> Self {
        let (header, tag) = ([0; HEADER_BYTES], [0; TAG_BYTES]);
        Self { place: Place { hop, part: 0 }, header, tag, done: 0, announced: false }
    }
}

/// Reads into those of the pieces that still have room.
fn read_pieces(mut link: &TcpStream, mut pieces: [IoSliceMut<'_>; 3]) -> io::Result<usize> {
    let first = pieces.iter().position(|piece| !piece.is_empty()).unwrap_or(0);
    link.read_vectored(&mut pieces[first..])
}

fn following(place: Place, parts: u32) -> Place {
    if place.part + 1 < parts {
        Place { part: place.part + 1, ..place }
    } else {
        Place { hop: place.hop + 1, part: 0 }
    }
}

/// Rounded up to a millisecond, so that the time is really up when it is.
fn timespec(duration: Duration) -> Timespec {
    let rounded = duration + Duration::from_millis(1);
    Timespec { tv_sec: rounded.as_secs() as i64, tv_nsec: rounded.subsec_nanos().into() }
}

/// Waits until one of `streams` can be read, or `timeout`. For the short waits of joining.
pub(super) fn wait_readable(streams: &[&dyn AsFd], timeout: Duration) {
    let mut polled: Vec<_> =
        streams.iter().map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)).collect();
    // Whatever this says, the caller looks at each stream itself.
    let _ = poll(&mut polled, Some(&timespec(timeout)));
}
