//! The global order of rows: a pure function of seed and epoch, the same on every machine and for ever.
//!
//! Epoch `e` is a Fisher-Yates shuffle of all row ids. Its draws come from SplitMix64 (Steele, Lea, Flood,
//! "Fast splittable pseudorandom number generators", 2014) started at a key mixed from seed and epoch, and are
//! brought into range without bias by Lemire's multiply-shift with rejection ("Fast random integer generation
//! in an interval", 2019). Changing any constant here changes what a resumed job trains: the golden test
//! in this file must never be edited.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Error, MixPart};

/// SplitMix64's increment: 2^64 divided by the golden ratio, odd.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves about half of the output bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Hashes a row id for the row checksum of a step (the wrapping sum over its rows).
///
/// It is a bijection, so no two rows hash alike, and no row hashes to 0 but the one whose id is `-GAMMA`.
pub fn row_hash(id: u64) -> u64 {
    mix(id.wrapping_add(GAMMA))
}

/// A stream of uniform draws that depends on its key alone.
struct Draws {
    state: u64,
}

impl Draws {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GAMMA);
        mix(self.state)
    }

    /// A uniform number below `bound`, which must not be 0.
    fn below(&mut self, bound: u64) -> u64 {
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            let low = product as u64;
            // Of the 2^64 draws, the first `2^64 mod bound` of each bucket row would make some numbers likelier.
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }
}

/// The order of all row ids (`0..rows`) in an epoch, counted from 0.
pub fn epoch_order(seed: u64, epoch: u64, rows: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..rows).collect();
    shuffle(&mut order, epoch_key(seed, epoch));
    order
}

fn epoch_key(seed: u64, epoch: u64) -> u64 {
    mix(seed ^ mix(epoch.wrapping_add(GAMMA)))
}

fn shuffle(order: &mut [u64], key: u64) {
    let mut draws = Draws { state: key };
    for last in (1..order.len()).rev() {
        let other = draws.below(last as u64 + 1) as usize;
        order.swap(last, other);
    }
}

/// The order of the rows of a mix in an epoch, counted from 0.
///
/// Each source is a deck that is shuffled (pass 0), dealt from over the epochs, and shuffled anew when it is used up (pass
/// 1, …). What an epoch is dealt from all decks is then shuffled together. A row that comes a second time within an
/// epoch does so under an id of its own, higher by the number of all rows: see [`row_of`].
pub fn mixed_epoch_order(seed: u64, epoch: u64, parts: &[MixPart]) -> Vec<u64> {
    let rows: u64 = parts.iter().map(|part| part.rows).sum();
    let mut order = Vec::new();
    let mut first = 0;
    for (source, part) in parts.iter().enumerate() {
        let deck_key = mix(seed ^ mix((source as u64 + 1).wrapping_mul(GAMMA)));
        let mut deck: Option<(u64, Vec<u64>)> = None;
        let start = epoch.wrapping_mul(part.rows_per_epoch);
        for at in start..start.saturating_add(part.rows_per_epoch) {
            let pass = at / part.rows.max(1);
            if deck.as_ref().is_none_or(|(of, _)| *of != pass) {
                let mut cards: Vec<u64> = (first..first + part.rows).collect();
                shuffle(&mut cards, mix(deck_key ^ mix(pass.wrapping_add(GAMMA))));
                deck = Some((pass, cards));
            }
            let copy = pass - start / part.rows.max(1);
            let card = deck.as_ref().and_then(|(_, cards)| cards.get((at % part.rows.max(1)) as usize));
            order.extend(card.map(|card| copy * rows + card));
        }
        first += part.rows;
    }
    shuffle(&mut order, epoch_key(seed, epoch));
    order
}

/// The row that an id of an epoch's order stands for, of `rows` in all.
pub fn row_of(id: u64, rows: u64) -> u64 {
    id % rows.max(1)
}

/// The rows of a step (from 1), as [`Order::step_rows`] gives them; shuffles the whole epoch at each call.
pub fn step_rows(seed: u64, rows: u64, global_batch_size: u64, step: u64) -> Result<Vec<u64>, Error> {
    Ok(Order::new(seed, rows, global_batch_size)?.step_rows(step))
}

/// The part of a step's rows that a rank trains: contiguous, sizes differ by at most one, the longer first.
///
/// With fewer rows than ranks the last ranks get none; so does a rank that is not below `world_size`.
pub fn slice(rows: &[u64], world_size: u32, rank: u32) -> &[u64] {
    if rank >= world_size {
        return &[];
    }
    let (world_size, rank) = (world_size as usize, rank as usize);
    let (share, longer) = (rows.len() / world_size, rows.len() % world_size);
    let start = rank * share + rank.min(longer);
    let end = start + share + usize::from(rank < longer);
    &rows[start..end]
}

/// The order of a whole job: which rows each step trains.
///
/// Keeps the shuffle of the epoch it was last asked about, so that a step costs no more than its batch.
pub struct Order {
    seed: u64,
    rows: u64,
    parts: Vec<MixPart>,
    global_batch_size: u64,
    cached: Mutex<Option<(u64, Arc<Vec<u64>>)>>,
}

impl Order {
    /// The order of `rows` rows in batches of `global_batch_size`.
    ///
    /// # Errors
    /// [`Error::Impossible`] if either is 0.
    pub fn new(seed: u64, rows: u64, global_batch_size: u64) -> Result<Self, Error> {
        if rows == 0 {
            return Err(Error::Impossible {
                option: "rows",
                reason: "there are no rows to order".to_owned(),
            });
        }
        if global_batch_size == 0 {
            let reason = "a step must have at least one row".to_owned();
            return Err(Error::Impossible { option: "global_batch_size", reason });
        }
        Ok(Self { seed, rows, parts: Vec::new(), global_batch_size, cached: Mutex::new(None) })
    }

    /// The order of a mix of sources; without parts, of `rows` rows as they are.
    ///
    /// # Errors
    /// [`Error::Impossible`] if there is no row, or if a part has none or gives none.
    pub fn mixed(seed: u64, rows: u64, parts: &[MixPart], global_batch_size: u64) -> Result<Self, Error> {
        let order = Self::new(seed, rows, global_batch_size)?;
        if parts.is_empty() {
            return Ok(order);
        }
        let sum = |count: fn(&MixPart) -> u64| parts.iter().map(count).sum::<u64>();
        let is_whole = sum(|part| part.rows) == rows && sum(|part| part.rows_per_epoch) == rows;
        if !is_whole || parts.iter().any(|part| part.rows == 0 || part.rows_per_epoch == 0) {
            let reason = format!("its parts do not make up the {rows} rows of an epoch");
            return Err(Error::Impossible { option: "mix", reason });
        }
        Ok(Self { parts: parts.to_vec(), ..order })
    }

    /// Seed of the shuffles.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Rows of a step, but for an epoch's last, which may have fewer.
    pub fn global_batch_size(&self) -> u64 {
        self.global_batch_size
    }

    /// Steps that an epoch takes; its last, short batch is a step too.
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.global_batch_size)
    }

    /// The epoch (from 0) that a step (from 1) belongs to. Step 0, before training, belongs to epoch 0.
    pub fn epoch_of(&self, step: u64) -> u64 {
        step.saturating_sub(1) / self.steps_per_epoch()
    }

    /// How many rows a step (from 1) trains; none for step 0.
    pub fn rows_in_step(&self, step: u64) -> u64 {
        let Some(index) = step.checked_sub(1) else { return 0 };
        let start = (index % self.steps_per_epoch()) * self.global_batch_size;
        self.global_batch_size.min(self.rows - start)
    }

    /// The row ids of a step (from 1), in the order in which [`slice()`] deals them; none for step 0.
    pub fn step_rows(&self, step: u64) -> Vec<u64> {
        let Some(index) = step.checked_sub(1) else { return Vec::new() };
        let start = (index % self.steps_per_epoch()) * self.global_batch_size;
        let order = self.epoch(self.epoch_of(step));
        order[start as usize..(start + self.rows_in_step(step)) as usize].to_vec()
    }

    fn epoch(&self, epoch: u64) -> Arc<Vec<u64>> {
        // A poisoned lock holds a whole value all the same: it is only ever replaced.
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        match cached.as_ref() {
            Some((of, order)) if *of == epoch => Arc::clone(order),
            _ => {
                let order = Arc::new(match &*self.parts {
                    [] => epoch_order(self.seed, epoch, self.rows),
                    parts => mixed_epoch_order(self.seed, epoch, parts),
                });
                *cached = Some((epoch, Arc::clone(&order)));
                order
            }
        }
    }
}

impl Clone for Order {
    fn clone(&self) -> Self {
        let cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Self {
            seed: self.seed,
            rows: self.rows,
            parts: self.parts.clone(),
            global_batch_size: self.global_batch_size,
            cached: Mutex::new(cached),
        }
    }
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Order")
            .field("seed", &self.seed)
            .field("rows", &self.rows)
            .field("global_batch_size", &self.global_batch_size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// Figures of an implementation in Python, apart from this one; 0xe220… is SplitMix64's published first output for seed 0.
    /// Never edit them: a job resumed by a later version must go on with the rows that it would have trained.
    #[test]
    fn order_is_what_it_always_was() {
        let hashes = [0, 1, 2, 1000].map(row_hash);
        let expected =
            [0xe220_a839_7b1d_cdaf, 0x910a_2dec_8902_5cc1, 0x9758_35de_1c97_56ce, 0x3c1e_ba8b_4dcc_c148];
        assert_eq!(hashes, expected);
        assert_eq!(epoch_order(17, 0, 16), [2, 9, 10, 3, 6, 12, 15, 8, 4, 11, 13, 14, 0, 1, 7, 5]);
        assert_eq!(epoch_order(17, 1, 16), [3, 5, 9, 15, 2, 0, 8, 12, 4, 6, 13, 1, 10, 11, 7, 14]);
        assert_eq!(epoch_order(u64::MAX, 3, 16), [14, 13, 3, 4, 6, 2, 10, 7, 12, 9, 0, 8, 15, 1, 5, 11]);
        let long = epoch_order(17, 5, 100_003);
        let digest = long.iter().fold(0u64, |digest, id| digest.wrapping_mul(31).wrapping_add(*id));
        assert_eq!(digest, 0x6417_f2a5_a9c2_ec67);
    }

    #[test]
    fn hash_separates_neighbours() {
        let hashes: HashSet<u64> = (0..100_000).map(row_hash).collect();
        assert_eq!(hashes.len(), 100_000);
        assert!(!hashes.contains(&0));
        let flipped: u32 = (0..1000u64).map(|id| (row_hash(id) ^ row_hash(id + 1)).count_ones()).sum();
        // 1000 × 64 fair bits: 32,000 flips, standard deviation 126.
        assert!((31_000..33_000).contains(&flipped), "{flipped}");
    }

    #[test]
    fn short_last_batch_is_trained() {
        let order = Order::new(17, 10, 4).unwrap();
        assert_eq!(order.steps_per_epoch(), 3);
        let lengths: Vec<_> = (1..=6).map(|step| order.step_rows(step).len()).collect();
        assert_eq!(lengths, [4, 4, 2, 4, 4, 2]);
        assert_eq!((1..=7).map(|step| order.epoch_of(step)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 1, 2]);
        assert!(order.step_rows(0).is_empty());
        assert_eq!(order.rows_in_step(3), 2);
    }

    #[test]
    fn impossible_orders_are_refused() {
        assert!(Order::new(1, 0, 4).is_err());
        assert!(Order::new(1, 4, 0).is_err());
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let first = epoch_order(17, 0, 1000);
        assert_ne!(first, epoch_order(17, 1, 1000));
        assert_ne!(first, epoch_order(18, 0, 1000));
        assert_ne!(epoch_order(17, 1, 1000), epoch_order(18, 0, 1000));
        let in_place = first.iter().enumerate().filter(|(at, id)| *at as u64 == **id).count();
        // A random permutation has one fixed point on average; 10 has a chance of one in ten millions.
        assert!(in_place < 10, "{in_place}");
    }

    #[test]
    fn every_row_comes_first_equally_often() {
        let mut first = [0u32; 5];
        for epoch in 0..10_000 {
            first[epoch_order(3, epoch, 5)[0] as usize] += 1;
        }
        // 2,000 each, standard deviation 40.
        assert!(first.iter().all(|count| (1800..2200).contains(count)), "{first:?}");
    }

    #[test]
    fn cache_gives_what_a_fresh_shuffle_gives() {
        let order = Order::new(5, 23, 4).unwrap();
        for step in [1, 7, 3, 13, 1, 12] {
            assert_eq!(order.step_rows(step), step_rows(5, 23, 4, step).unwrap());
            assert_eq!(order.clone().step_rows(step), order.step_rows(step));
        }
    }

    proptest! {
        #[test]
        fn every_epoch_is_a_permutation(seed: u64, epoch: u64, rows in 0u64..2000) {
            let mut order = epoch_order(seed, epoch, rows);
            order.sort_unstable();
            prop_assert_eq!(order, (0..rows).collect::<Vec<_>>());
        }

        #[test]
        fn steps_of_an_epoch_train_each_row_once(
            seed: u64, rows in 1u64..300, batch in 1u64..40, epoch in 0u64..5,
        ) {
            let order = Order::new(seed, rows, batch).unwrap();
            let first = epoch * order.steps_per_epoch() + 1;
            let steps = first..first + order.steps_per_epoch();
            let trained: Vec<u64> = steps.flat_map(|step| order.step_rows(step)).collect();
            prop_assert_eq!(trained, epoch_order(seed, epoch, rows));
        }

        #[test]
        fn slices_partition_and_differ_by_at_most_one(rows in 0usize..200, world_size in 1u32..20) {
            let rows: Vec<u64> = (0..rows as u64).collect();
            let slices: Vec<&[u64]> = (0..world_size).map(|rank| slice(&rows, world_size, rank)).collect();
            prop_assert_eq!(slices.concat(), rows.clone());
            let lengths: Vec<usize> = slices.iter().map(|slice| slice.len()).collect();
            prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
            prop_assert!(lengths[0] - lengths[lengths.len() - 1] <= 1);
            prop_assert!(slice(&rows, world_size, world_size).is_empty());
        }
    }
}
