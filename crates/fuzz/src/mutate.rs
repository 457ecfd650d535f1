//! Changes of inputs, the same for the same seed.

/// splitmix64.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Numbers at which lengths and counts break.
const EDGES: [u64; 10] = [0, 1, 7, 255, 65_535, 1 << 31, (1 << 32) - 1, 1 << 40, i64::MAX as u64, u64::MAX];

/// Changes `input` a few times; `others` lends parts, `words` are put in whole.
pub(crate) fn mutate(
    random: &mut Random,
    input: &mut Vec<u8>,
    others: &[Vec<u8>],
    words: &[&str],
    longest: usize,
) {
    for _ in 0..1 + random.below(6) {
        let at = random.below(input.len() + 1);
        match random.below(9) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.next() as u8,
            2 => input.insert(at, random.next() as u8),
            3 if at < input.len() => {
                let end = (at + 1 + random.below(16)).min(input.len());
                input.drain(at..end);
            }
            4 => input.truncate(at),
            5 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)];
                let end = (at + width).min(input.len());
                input.splice(at..end, edge[..width].iter().copied());
            }
            6 if !words.is_empty() => {
                let word = words[random.below(words.len())];
                input.splice(at..at, word.bytes());
            }
            7 if !others.is_empty() => {
                let other = &others[random.below(others.len())];
                let from = random.below(other.len() + 1);
                let to = (from + random.below(64)).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
            _ if at < input.len() => {
                // A stretch once more: long lists, deep nests.
                let end = (at + 1 + random.below(32)).min(input.len());
                let part = input[at..end].to_vec();
                for _ in 0..1 + random.below(20) {
                    input.splice(at..at, part.iter().copied());
                }
            }
            _ => {}
        }
    }
    input.truncate(longest);
}
