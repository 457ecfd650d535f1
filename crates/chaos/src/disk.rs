//! Disks that are full.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::Path,
};

use crate::{
    error::{Error, Result},
    fault::Blow,
};

/// The file that takes up what is free.
const FILLER: &str = ".shanty-chaos-filler";

/// Fills the disk that a folder lies on until the blow is healed. A disk with more than `most_bytes` free is left alone.
///
/// # Errors
/// [`Error::LargeDisk`], [`Error::Disk`]
pub fn fill(folder: &Path, most_bytes: u64) -> Result<Blow> {
    let fail = |action, source| Error::Disk { action, path: folder.to_owned(), source };
    let free = rustix::fs::statvfs(folder).map_err(|error| fail("look at", error.into()))?;
    let free_bytes = free.f_bavail.saturating_mul(free.f_frsize);
    if free_bytes > most_bytes {
        return Err(Error::LargeDisk { folder: folder.to_owned(), free_bytes, most_bytes });
    }
    let path = folder.join(FILLER);
    let mut file = File::create(&path).map_err(|source| fail("write a filler in", source))?;
    let blow = Blow::new(move || match fs::remove_file(&path) {
        // Another blow to the same disk that ended earlier took it away.
        Err(source) if source.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| Error::Disk { action: "remove", path: path.clone(), source }),
    });
    // Large pieces first; the last gaps byte by byte, so that not even a short line has room.
    for size in [1 << 20, 4096, 1] {
        let piece = vec![0xa5; size];
        // Others may free or take room meanwhile: an end is reached once a write fails.
        while file.write_all(&piece).is_ok() {}
    }
    Ok(blow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_disk_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(fill(folder.path(), 0), Err(Error::LargeDisk { .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
