//! The header in front of every piece of data. A receiver knows the header that must come next and
//! compares; what it decodes of another one serves the error message.
//!
//! Numbers are little-endian, also those in the data: the crate does not compile elsewhere.

use crate::Operation;

const _: () = assert!(cfg!(target_endian = "little"), "data travels as it lies in memory, little-endian");

/// Size of a header.
pub(super) const HEADER_BYTES: usize = 48;

const MAGIC: [u8; 4] = *b"shty";

/// What a piece of data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub operation: Operation,
    pub generation: u64,
    pub sequence: u64,
    /// Bytes that each member brings to the operation.
    pub total_bytes: u64,
    /// What else members must agree on: the root of a broadcast.
    pub argument: u32,
    pub hop: u32,
    pub part: u32,
    /// Bytes that follow.
    pub payload_bytes: u32,
}

/// How a header differs from the one that had to come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// The same call with another length: theirs.
    Length(u64),
    /// Something else.
    Other(String),
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.operation.number().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.total_bytes.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.argument.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.hop.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.part.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    /// Compares with what came.
    pub(super) fn compare(&self, came: &[u8; HEADER_BYTES]) -> Result<(), Difference> {
        if *came == self.encode() {
            return Ok(());
        }
        let Some(theirs) = Self::decode(came) else {
            return Err(Difference::Other("bytes that are no header".to_owned()));
        };
        let same_call = theirs.operation == self.operation
            && theirs.generation == self.generation
            && theirs.sequence == self.sequence
            && theirs.argument == self.argument;
        if same_call && theirs.total_bytes != self.total_bytes {
            return Err(Difference::Length(theirs.total_bytes));
        }
        let Self { operation, generation, sequence, argument, hop, part, payload_bytes, .. } = theirs;
        Err(Difference::Other(format!(
            "{operation} {sequence} of generation {generation}, argument {argument}, hop {hop}, part {part}, {payload_bytes} bytes"
        )))
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if bytes[0..4] != MAGIC {
            return None;
        }
        Some(Self {
            operation: Operation::of_number(word(4))?,
            generation: long(8),
            sequence: long(16),
            total_bytes: long(24),
            argument: word(32),
            hop: word(36),
            part: word(40),
            payload_bytes: word(44),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            operation: Operation::AllReduceF32,
            generation: 7,
            sequence: u64::MAX - 1,
            total_bytes: 1 << 40,
            argument: 3,
            hop: 2,
            part: 900,
            payload_bytes: 65536,
        }
    }

    #[test]
    fn a_header_survives_the_wire() {
        for operation in (1..=5).filter_map(Operation::of_number) {
            let header = Header { operation, ..header() };
            assert_eq!(Header::decode(&header.encode()), Some(header));
            assert_eq!(header.compare(&header.encode()), Ok(()));
        }
    }

    #[test]
    fn each_field_is_compared() {
        let ours = header();
        let others = [
            Header { operation: Operation::AllGather, ..ours },
            Header { generation: 6, ..ours },
            Header { sequence: 1, ..ours },
            Header { argument: 0, ..ours },
            Header { hop: 3, ..ours },
            Header { part: 901, ..ours },
            Header { payload_bytes: 4, ..ours },
        ];
        for theirs in others {
            assert!(matches!(ours.compare(&theirs.encode()), Err(Difference::Other(_))), "{theirs:?}");
        }
        let longer = Header { total_bytes: 5, ..ours };
        assert_eq!(ours.compare(&longer.encode()), Err(Difference::Length(5)));
        assert!(matches!(ours.compare(&[0; HEADER_BYTES]), Err(Difference::Other(_))));
    }
}
