//! Mixing sources by weight: how many rows of an epoch each source gives.
//!
//! An epoch of a mix has as many rows as all sources together, so that `epochs` and steps mean what they mean without one.
//! Of these rows each source gives its share by weight, rounded so that the counts add up (largest remainder). Which
//! rows those are follows from seed and epoch ([`order`](crate::order)): each source is a deck that is shuffled, dealt
//! from, and shuffled anew when it is used up. So a source that is given more than its rows repeats, but no row comes
//! again before all others of its source have come; and a source that is given less goes on, in the
//! next epoch, where it stopped.

use serde::{Deserialize, Serialize};

/// A source of a mix: contiguous rows of the training split, in the order of the sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixPart {
    /// Rows that the source has; at least 1.
    pub rows: u64,
    /// Rows of it that each epoch trains; at least 1.
    pub rows_per_epoch: u64,
}

/// Deals the rows of an epoch (as many as there are) to sources by weight. Empty if a source has no row.
pub(crate) fn deal(sources: &[(u64, f64)]) -> Vec<MixPart> {
    let total: u64 = sources.iter().map(|(rows, _)| rows).sum();
    let weights: f64 = sources.iter().map(|(_, weight)| weight).sum();
    let exact: Vec<f64> = sources.iter().map(|(_, weight)| total as f64 * (weight / weights)).collect();
    // Every source that is named is trained, be its weight ever so small.
    let mut counts: Vec<u64> = exact.iter().map(|exact| (exact.floor() as u64).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..sources.len()).collect();
    by_remainder.sort_by(|a, b| (exact[*b].fract()).total_cmp(&exact[*a].fract()).then(a.cmp(b)));
    let mut given: u64 = counts.iter().sum();
    for index in by_remainder.iter().cycle().take(2 * sources.len()) {
        if given < total {
            counts[*index] += 1;
            given += 1;
        }
    }
    while given > total {
        // More sources than rows for the small ones: the largest gives way.
        let Some(largest) = counts.iter_mut().max().filter(|count| **count > 1) else { break };
        *largest -= 1;
        given -= 1;
    }
    sources
        .iter()
        .zip(counts)
        .map(|((rows, _), rows_per_epoch)| MixPart { rows: *rows, rows_per_epoch })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_follow_weights() {
        let counts =
            |sources: &[(u64, f64)]| deal(sources).iter().map(|part| part.rows_per_epoch).collect::<Vec<_>>();
        assert_eq!(counts(&[(100, 1.0), (300, 1.0)]), [200, 200]);
        assert_eq!(counts(&[(100, 7.0), (300, 3.0)]), [280, 120]);
        assert_eq!(counts(&[(10, 1.0), (10, 1.0), (11, 1.0)]), [11, 10, 10]);
        assert_eq!(counts(&[(1000, 1e9), (1, 1e-9)]), [1000, 1]);
        assert_eq!(counts(&[(5, 2.0)]), [5]);
    }

    proptest! {
        #[test]
        fn counts_add_up_and_are_near_their_share(
            sources in prop::collection::vec((1u64..5000, 0.01f64..100.0), 1..8),
        ) {
            let parts = deal(&sources);
            let total: u64 = sources.iter().map(|(rows, _)| rows).sum();
            prop_assert_eq!(parts.iter().map(|part| part.rows_per_epoch).sum::<u64>(), total);
            let weights: f64 = sources.iter().map(|(_, weight)| weight).sum();
            for (part, (_, weight)) in parts.iter().zip(&sources) {
                let exact = total as f64 * weight / weights;
                // One up for rounding; one down for each source that is owed its single row.
                prop_assert!((part.rows_per_epoch as f64 - exact).abs() <= 1.0 + sources.len() as f64);
                prop_assert!(part.rows_per_epoch >= 1);
            }
        }
    }
}
