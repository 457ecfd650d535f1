//! Memory on a card, as its owner hands it to somebody else.

use std::{any::Any, fmt, ops::Range, sync::Arc};

/// Some bytes of a card's memory, and the stream whose work fills or reads them. Clones are of the same bytes.
#[derive(Clone)]
pub struct Span {
    address: u64,
    bytes: usize,
    stream: u64,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Span {
    /// `bytes` bytes at `address`. Whoever uses them does so behind the work that is queued on `stream` (a
    /// `CUstream`; 0 is the default stream) at that time.
    ///
    /// # Safety
    /// The memory is the card's, of this size, and stays as long as `owner` lives; so does the stream.
    pub unsafe fn new(address: u64, bytes: usize, stream: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { address, bytes, stream, owner }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The stream of its owner's work.
    pub fn stream(&self) -> u64 {
        self.stream
    }

    /// A part of it, `None` where it does not reach that far.
    pub fn part(&self, bytes: Range<usize>) -> Option<Self> {
        let length = bytes.end.checked_sub(bytes.start)?;
        (bytes.end <= self.bytes).then(|| Self {
            address: self.address + bytes.start as u64,
            bytes: length,
            stream: self.stream,
            owner: Arc::clone(&self.owner),
        })
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, bytes, stream, .. } = self;
        write!(f, "Span({bytes} bytes at {address:#x}, stream {stream:#x})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_lies_inside_or_is_none() {
        let owner = Arc::new(());
        // SAFETY: nobody touches the memory.
        let span = unsafe { Span::new(0x1000, 64, 7, Arc::clone(&owner) as _) };
        let part = span.part(16..48).unwrap();
        assert_eq!((part.address(), part.bytes(), part.stream()), (0x1010, 32, 7));
        assert!(span.part(16..65).is_none());
        assert!(part.part(0..33).is_none(), "not beyond itself");
        drop(span);
        assert_eq!(Arc::strong_count(&owner), 2, "a part keeps the owner");
    }
}
