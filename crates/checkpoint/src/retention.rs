//! Which checkpoints are kept: a pure function of the list.

use crate::manifest::Key;

/// A checkpoint, as far as retention needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// What names it.
    pub key: Key,
    /// What is known of its files.
    pub health: Health,
}

/// What is known of a checkpoint's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Sizes and hashes were checked.
    Good,
    /// A check failed.
    Damaged,
    /// Not checked.
    Unknown,
}

/// Says which checkpoints to delete, oldest first.
///
/// Kept are: the `keep` newest that are not known to be damaged (at least one), the newest that is known
/// to be good, everything in `pinned`, and, as long as none is known to be good, everything.
/// Damaged ones are deleted once they are older than the newest good one.
pub fn retain(list: &[Candidate], keep: usize, pinned: &[Key]) -> Vec<Key> {
    let mut newest_first = list.to_vec();
    newest_first.sort_unstable_by(|a, b| b.key.cmp(&a.key));
    let Some(newest_good) = newest_first.iter().find(|entry| entry.health == Health::Good) else {
        return Vec::new();
    };
    let newest_good = newest_good.key;

    let mut kept = 0;
    let mut delete = Vec::new();
    for entry in newest_first {
        let counts = entry.health != Health::Damaged;
        let within = counts && kept < keep.max(1);
        kept += usize::from(within);
        if !within && entry.key < newest_good && !pinned.contains(&entry.key) {
            delete.push(entry.key);
        }
    }
    delete.reverse();
    delete
}
