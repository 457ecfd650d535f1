//! `ncclConfig_t`, whose size and fields differ from version to version.
//!
//! The library copies `size` bytes and fills what a `version` older than its own did not have. So each is told no
//! more than it knows itself, and no more than this crate does.

use std::{
    ffi::{c_int, c_uint},
    mem::offset_of,
    ptr,
};

use cudarc::nccl::sys::ncclConfig_t as Config;

/// The version whose fields the type has.
const NEWEST: c_int = 22_800;
const MAGIC: c_uint = 0xcafe_beef;
/// `NCCL_CONFIG_UNDEF_INT`: the library chooses.
const UNDEFINED: c_int = c_int::MIN;

/// Where the configuration of a version ends.
const ENDS: [(c_int, usize); 6] = [
    (21_400, padded(offset_of!(Config, cgaClusterSize))),
    (21_700, padded(offset_of!(Config, splitShare))),
    (21_800, padded(offset_of!(Config, trafficClass))),
    // One more number fits into the padding of the version before.
    (22_600, padded(offset_of!(Config, commName))),
    (22_700, padded(offset_of!(Config, nChannelsPerNetPeer))),
    (NEWEST, size_of::<Config>()),
];

const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(align_of::<Config>())
}

/// A configuration for a library of this version: calls do not block, all else is left to it.
pub(super) fn config(library: c_int) -> Config {
    let (since, size) = ENDS.into_iter().rev().find(|(since, _)| *since <= library).unwrap_or(ENDS[0]);
    Config {
        size,
        magic: MAGIC,
        version: if since == NEWEST { NEWEST } else { library }.unsigned_abs(),
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_told_as_much_as_it_knows() {
        // Sizes of the C type in the headers of these versions, 64-bit.
        let sizes = [
            (21_400, 24),
            (21_602, 24),
            (21_701, 40),
            (21_803, 48),
            (22_505, 48),
            (22_602, 48),
            (22_703, 72),
            (22_809, 80),
            (23_007, 80),
        ];
        for (version, size) in sizes {
            assert_eq!(config(version).size, size, "{version}");
        }
    }

    #[test]
    fn a_newer_library_hears_of_the_newest_version_that_is_known_here() {
        assert_eq!((config(23_007).version, config(21_701).version), (22_800, 21_701));
    }
}
