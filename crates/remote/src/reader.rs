//! Reading an object from its start to its end, one piece ahead.

use std::{
    io::{self, Read},
    sync::mpsc::Receiver,
};

use bytes::{Buf, Bytes};

use crate::{Error, Object};

/// Bytes of one request. Two are held at a time: the one that is read and the one that is on its way.
const PIECE: u64 = 8 << 20;

/// Reads an object from its start to its end, with one request on its way while the last answer is read.
///
/// Errors are [`io::Error`]s with an [`Error`] in them: [`Error::inside`] takes it out.
#[derive(Debug)]
pub struct Reader {
    object: Object,
    current: Bytes,
    /// The end of what was asked for.
    asked: u64,
    done: u64,
    coming: Option<Receiver<Result<Bytes, Error>>>,
}

impl Reader {
    pub(crate) fn new(object: Object) -> Self {
        Self { object, current: Bytes::new(), asked: 0, done: 0, coming: None }
    }

    fn ask(&mut self) -> Result<(), Error> {
        if !self.object.serves_ranges() {
            if self.coming.is_none() && self.asked == 0 {
                self.asked = self.object.size();
                self.coming = Some(self.object.stream()?);
            }
            return Ok(());
        }
        let end = (self.asked + PIECE).min(self.object.size());
        self.coming = match end > self.asked {
            true => Some(self.object.range_later(self.asked..end)?),
            false => None,
        };
        self.asked = end;
        Ok(())
    }

    fn next_piece(&mut self) -> Result<(), Error> {
        if self.coming.is_none() {
            self.ask()?;
        }
        let Some(coming) = &self.coming else { return Ok(()) };
        match coming.recv() {
            Ok(piece) => self.current = piece?,
            // The sender goes when its last piece is sent.
            Err(_) if self.done == self.object.size() => self.coming = None,
            Err(_) => {
                let reason = format!("it ended after {} of {} bytes", self.done, self.object.size());
                return Err(Error::Unreachable { url: self.object.url(), reason });
            }
        }
        self.done += self.current.len() as u64;
        if self.object.serves_ranges() {
            self.ask()?;
        }
        Ok(())
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && self.done < self.object.size() && !buffer.is_empty() {
            self.next_piece().map_err(io::Error::other)?;
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
