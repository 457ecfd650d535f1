//! Dealing the rows of a step that is tried again.

use std::collections::BTreeSet;

use super::record::RankRows;

/// Deals a step's rows after a break: sums that are kept stay where they are, the rest goes, in order, to
/// whoever has least.
///
/// `kept` has the kept rows of each rank (empty: none). A sum with a row that the step does not have, or that
/// another rank's sum has already, cannot be used: that rank is dealt to as if it kept nothing. Returns nothing
/// if no sum is kept: the regular slices are as good then.
pub fn deal(rows: &[u64], kept: &[Vec<u64>]) -> Vec<RankRows> {
    let of_step: BTreeSet<u64> = rows.iter().copied().collect();
    let mut taken = BTreeSet::new();
    let mut ranks: Vec<RankRows> = Vec::with_capacity(kept.len());
    for sum in kept {
        let distinct: BTreeSet<u64> = sum.iter().copied().collect();
        let usable =
            distinct.len() == sum.len() && distinct.is_subset(&of_step) && distinct.is_disjoint(&taken);
        if usable {
            taken.extend(distinct);
        }
        ranks.push(RankRows { kept: if usable { sum.clone() } else { Vec::new() }, compute: Vec::new() });
    }
    if taken.is_empty() || ranks.is_empty() {
        return Vec::new();
    }
    for row in rows.iter().filter(|row| !taken.contains(row)) {
        let least = ranks.iter_mut().min_by_key(|rank| rank.kept.len() + rank.compute.len());
        least.expect("there is at least one rank").compute.push(*row);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_kept_means_regular_slices() {
        assert!(deal(&[1, 2, 3], &[vec![], vec![]]).is_empty());
        assert!(deal(&[1, 2, 3], &[]).is_empty());
    }

    #[test]
    fn kept_rows_stay_and_the_rest_evens_out() {
        let ranks = deal(&[5, 9, 2, 7, 1, 4], &[vec![5, 9], vec![], vec![2]]);
        assert_eq!(ranks[0], RankRows { kept: vec![5, 9], compute: vec![] });
        assert_eq!(ranks[1], RankRows { kept: vec![], compute: vec![7, 1] });
        assert_eq!(ranks[2], RankRows { kept: vec![2], compute: vec![4] });
    }

    #[test]
    fn a_sum_that_overlaps_or_is_of_other_rows_is_dropped() {
        let ranks = deal(&[1, 2, 3, 4], &[vec![1, 2], vec![2, 3], vec![8], vec![4, 4]]);
        assert_eq!(ranks.iter().map(|rank| rank.kept.len()).collect::<Vec<_>>(), [2, 0, 0, 0]);
        assert_eq!(ranks.iter().map(|rank| rank.compute.len()).sum::<usize>(), 2);
    }

    proptest! {
        #[test]
        fn every_row_is_dealt_once(
            rows in proptest::collection::btree_set(0u64..500, 0..60),
            owners in proptest::collection::vec(0usize..6, 60),
            ranks in 1usize..6,
        ) {
            let rows: Vec<u64> = rows.into_iter().collect();
            let mut kept = vec![Vec::new(); ranks];
            for (row, owner) in rows.iter().zip(&owners) {
                if let Some(sum) = kept.get_mut(*owner) {
                    sum.push(*row);
                }
            }
            let dealt = deal(&rows, &kept);
            if kept.iter().all(Vec::is_empty) {
                prop_assert!(dealt.is_empty());
                return Ok(());
            }
            let mut all: Vec<u64> = dealt.iter().flat_map(|rank| rank.kept.iter().chain(&rank.compute)).copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, rows);
            // Nobody computes beyond what evens out: whoever was dealt to has at most one more than anybody.
            let total = |rank: &RankRows| rank.kept.len() + rank.compute.len();
            let least = dealt.iter().map(total).min().unwrap();
            prop_assert!(dealt.iter().filter(|rank| !rank.compute.is_empty()).all(|rank| total(rank) <= least + 1));
        }
    }
}
