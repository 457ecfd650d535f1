//! Which checkpoints are kept: a pure function of the list, and its application.

use std::{cmp::Reverse, io::ErrorKind};

use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use crate::{
    error::{Error, Result},
    manifest::{Key, Loss, MANIFEST, Manifest},
    store::{Store, failed, file_path},
};

/// A checkpoint, as far as retention needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// What names it.
    pub key: Key,
    /// What is known of its files.
    pub health: Health,
    /// Mean loss of the held-out rows with it, where it is known.
    pub loss: Option<Loss>,
}

/// How many checkpoints are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// The newest; at least one.
    pub newest: usize,
    /// Those with the lowest loss, beside them.
    pub best: usize,
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

/// What retention did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Checkpoints that were deleted, oldest first.
    pub checkpoints: Vec<Key>,
    /// Leftovers without a manifest that were deleted, oldest first.
    pub unfinished: Vec<Key>,
}

/// The `count` checkpoints of the lowest loss, best first; of equals the older. Neither damaged ones nor those whose loss
/// is unknown or no number are among them.
pub fn best(list: &[Candidate], count: usize) -> Vec<Key> {
    let mut known: Vec<(f64, Key)> = list
        .iter()
        .filter(|entry| entry.health != Health::Damaged)
        .filter_map(|entry| Some((entry.loss?.value(), entry.key)))
        .filter(|(loss, _)| !loss.is_nan())
        .collect();
    known.sort_by(|(one, key), (other, other_key)| one.total_cmp(other).then(key.cmp(other_key)));
    known.truncate(count);
    known.into_iter().map(|(_, key)| key).collect()
}

/// Says which checkpoints to delete, oldest first.
///
/// Only what is older than the newest that is known to be good is ever deleted; with none, nothing. Of those,
/// kept are the ones in `pinned`, the [`best`], and the ones among the newest (at least one) that are not known to be
/// damaged.
pub fn retain(list: &[Candidate], keep: Keep, pinned: &[Key]) -> Vec<Key> {
    let best = best(list, keep.best);
    let mut newest_first = list.to_vec();
    newest_first.sort_unstable_by_key(|entry| Reverse(entry.key));
    let Some(newest_good) = newest_first.iter().find(|entry| entry.health == Health::Good) else {
        return Vec::new();
    };
    let newest_good = newest_good.key;

    let mut kept = 0;
    let mut delete = Vec::new();
    for entry in newest_first {
        let within = entry.health != Health::Damaged && kept < keep.newest.max(1);
        kept += usize::from(within);
        let is_kept = pinned.contains(&entry.key) || best.contains(&entry.key);
        if !within && entry.key < newest_good && !is_kept {
            delete.push(entry.key);
        }
    }
    delete.reverse();
    delete
}

impl Store {
    /// Deletes what [`retain`] says, and leftovers without a manifest that are older than the newest good
    /// checkpoint. If there is anything to delete, it first checks files until it has found that one.
    /// Checkpoints of a newer format stay.
    ///
    /// # Errors
    /// [`Error::Store`]
    pub async fn apply_retention(&self, keep: Keep, pinned: &[Key]) -> Result<Removed> {
        let (mut candidates, mut manifests) = (Vec::new(), Vec::new());
        let mut unfinished = Vec::new();
        for key in self.keys().await? {
            match self.read_manifest(key).await {
                Ok(Some(manifest)) => {
                    candidates.push(Candidate { key, health: Health::Unknown, loss: manifest.state.loss });
                    manifests.push(manifest);
                }
                Ok(None) => unfinished.push(key),
                Err(Error::Damaged { .. }) => {
                    candidates.push(Candidate { key, health: Health::Damaged, loss: None });
                }
                Err(Error::FutureFormat { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if !is_worth_a_check(&candidates, &unfinished, keep, pinned) {
            return Ok(Removed::default());
        }

        let newest_good = self.check_health(&mut candidates, &manifests).await?;
        let checkpoints = retain(&candidates, keep, pinned);
        unfinished.retain(|key| newest_good.is_some_and(|good| *key < good) && !pinned.contains(key));
        unfinished.reverse();
        for key in checkpoints.iter().chain(&unfinished) {
            self.delete(*key).await?;
        }
        Ok(Removed { checkpoints, unfinished })
    }

    /// Checks from the newest on until one is good, and returns that.
    async fn check_health(
        &self,
        candidates: &mut [Candidate],
        manifests: &[Manifest],
    ) -> Result<Option<Key>> {
        for manifest in manifests {
            let key = manifest.key();
            let health = match self.verify(manifest).await {
                Ok(()) => Health::Good,
                Err(Error::Damaged { .. }) => Health::Damaged,
                Err(error) => return Err(error),
            };
            for candidate in candidates.iter_mut().filter(|candidate| candidate.key == key) {
                candidate.health = health;
            }
            if health == Health::Good {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Deletes a checkpoint's folder, the manifest first: what is left of a deletion that breaks off is no
    /// checkpoint.
    async fn delete(&self, key: Key) -> Result<()> {
        let Some(objects) = self.objects()? else { return Ok(()) };
        let gone = |result: object_store::Result<()>, path: &Path| match result {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("delete", path.as_ref())(error)),
        };
        let manifest = file_path(key, MANIFEST);
        gone(objects.delete(&manifest).await, &manifest)?;
        let folder = Path::from(key.path());
        let files: Vec<_> =
            objects.list(Some(&folder)).try_collect().await.map_err(failed("list", folder.as_ref()))?;
        for file in files {
            gone(objects.delete(&file.location).await, &file.location)?;
        }
        // What a killed writer was in the middle of is no object, and keeps the folder.
        let Some(on_disk) = self.folder_of(key) else { return Ok(()) };
        match tokio::fs::remove_dir_all(on_disk).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                let source =
                    object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(error) };
                Err(failed("delete", folder.as_ref())(source))
            }
            _ => Ok(()),
        }
    }
}

/// Whether anything would go if the newest were good: checking reads whole files.
fn is_worth_a_check(candidates: &[Candidate], unfinished: &[Key], keep: Keep, pinned: &[Key]) -> bool {
    let mut hoped = candidates.to_vec();
    let Some(newest) = hoped.iter_mut().find(|candidate| candidate.health == Health::Unknown) else {
        return false;
    };
    newest.health = Health::Good;
    let newest = newest.key;
    unfinished.iter().any(|key| *key < newest) || !retain(&hoped, keep, pinned).is_empty()
}
