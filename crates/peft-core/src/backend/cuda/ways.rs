//! How many threads load a base, and what each takes of the card.

/// More threads than this gain nothing: the bus is full.
const MOST_LANES: usize = 8;

/// Bytes of a slot: whole blocks of every size in every kind of number.
const SMALLEST_SLOT: usize = 1 << 14;
const FAIR_SLOT: usize = 1 << 20;
const LARGEST_SLOT: usize = 1 << 23;

/// How many threads there are, and what each takes of the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ways {
    pub count: usize,
    /// Bytes of a slot, of which each has two.
    pub slot: usize,
    /// Blocks of the largest matrix.
    pub blocks: usize,
}

impl Ways {
    /// First slots get smaller, then there are fewer threads; one thread with the smallest slots is the least.
    pub fn within(count: usize, largest: usize, blocks: usize, room: u64) -> Self {
        // A piece of a small tensor, widened to f32, is small as well.
        let slot = (4 * largest).next_power_of_two().clamp(SMALLEST_SLOT, LARGEST_SLOT);
        let mut ways = Self { count: count.clamp(1, MOST_LANES), slot, blocks };
        while ways.bytes() > room && (ways.slot > SMALLEST_SLOT || ways.count > 1) {
            if ways.slot > FAIR_SLOT || ways.count == 1 {
                ways.slot /= 2;
            } else {
                ways.count -= 1;
            }
        }
        ways
    }

    /// What all take of the card.
    pub fn bytes(&self) -> u64 {
        (self.count * (2 * self.slot + 4 * self.blocks)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_take_no_more_of_the_card_than_there_is_room() {
        let most = Ways::within(64, 1 << 29, 917_504, u64::MAX);
        assert_eq!(most, Ways { count: MOST_LANES, slot: LARGEST_SLOT, blocks: 917_504 });
        assert_eq!(Ways::within(2, 1000, 16, u64::MAX), Ways { count: 2, slot: SMALLEST_SLOT, blocks: 16 });
        let mut last = most.bytes();
        for room in [most.bytes() - 1, 100 << 20, 30 << 20, 8 << 20] {
            let ways = Ways::within(64, 1 << 29, 917_504, room);
            assert!(ways.bytes() <= room, "{room}: {ways:?}");
            // Less than before where that is too much now, and no less where it is not.
            assert_eq!(ways.bytes() < last, last > room, "{room}: {ways:?}");
            assert!(ways.slot.is_power_of_two() && ways.slot >= SMALLEST_SLOT);
            last = ways.bytes();
        }
        assert_eq!(Ways::within(64, 1 << 29, 16, 0), Ways { count: 1, slot: SMALLEST_SLOT, blocks: 16 });
    }
}
