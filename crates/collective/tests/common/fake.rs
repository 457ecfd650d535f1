//! NCCL and the CUDA driver without a card: `fake_nccl.c`, built when a test asks for it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    thread,
};

use shanty_collective::{
    Collective,
    nccl::{self, Device, JoinOptions, Libraries, NcclCollective},
    tcp::Listener,
};

use super::{HANGS, join_all};

/// A build of the fake. Each has state of its own.
pub struct Fake {
    pub libraries: Libraries,
    pub file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Fake {
    /// `flags` choose what goes wrong, as the source says.
    pub fn new(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libfake.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/fake_nccl.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-pthread"]).args(flags).arg("-o").args([&file, &source]);
        let status = cc.status().expect("the tests of NCCL need a C compiler, `cc`");
        assert!(status.success(), "{cc:?} failed");
        Self { libraries: Libraries::at(&file, &file), file, _folder: folder }
    }

    /// One without faults, shared by the tests of a binary.
    pub fn sound() -> &'static Self {
        static SOUND: OnceLock<Fake> = OnceLock::new();
        SOUND.get_or_init(|| Self::new(&[]))
    }
}

/// A generation over the fake, each rank on a device of its own.
pub fn nccl_group(
    fake: &Fake,
    listeners: &[Listener],
    members: &[String],
    generation: u64,
) -> Vec<NcclCollective> {
    let links = join_all(listeners, members, generation);
    thread::scope(|scope| {
        let joins: Vec<_> = links
            .into_iter()
            .map(|side| {
                scope.spawn(move || {
                    let device = Device::open(side.rank(), &fake.libraries).unwrap();
                    // As a worker does: one handle for links and communicator.
                    let abort = side.abort_handle();
                    let options = JoinOptions { generation, deadline: HANGS };
                    nccl::join(side, Ok(&device), &options, abort).unwrap()
                })
            })
            .collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    })
}

/// As `nccl_group`, with listeners of its own.
pub fn nccl_members(world_size: u32) -> Vec<NcclCollective> {
    let (listeners, members) = super::listeners(world_size);
    nccl_group(Fake::sound(), &listeners, &members, 1)
}
