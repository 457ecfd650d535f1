//! Memory of the device, with the fake library of `tests/common/fake_nccl.c`, whose device memory is the host's.

use std::{
    path::{Path, PathBuf},
    process::Command,
    slice,
    sync::Arc,
    thread,
    time::Duration,
};

use shanty_cuda::Span;

use super::{Device, JoinOptions, Libraries};
use crate::{AbortHandle, Collective, DeviceCollective, Error};

/// The fake, built anew into `folder`.
fn fake(folder: &Path, flags: &[&str]) -> Libraries {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/fake_nccl.c");
    let library: PathBuf = folder.join("libfake.so");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-pthread"])
        .args(flags)
        .arg("-o")
        .args([&library, &source])
        .status()
        .expect("the tests of NCCL need a C compiler, `cc`");
    assert!(status.success(), "cc failed");
    Libraries::at(&library, &library)
}

fn on_ranks<T: Send>(
    libraries: &Libraries,
    world_size: u32,
    work: impl Fn(&mut dyn DeviceCollective, u32) -> T + Sync,
) -> Vec<T> {
    let id = Device::open(0, libraries).unwrap().unique_id().unwrap();
    let work = &work;
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let device = Device::open(rank, libraries).unwrap();
                    let options = JoinOptions { generation: 1, deadline: Duration::from_secs(20) };
                    let abort = AbortHandle::new();
                    let mut member = device.join_with(id, rank, world_size, &options, abort, None).unwrap();
                    member.set_call_deadline(Some(Duration::from_secs(20)));
                    work(member.on_device().unwrap(), rank)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Memory of the caller's own, filled with a number.
fn own(number: f32, elements: usize) -> (Span, Arc<Vec<f32>>) {
    let numbers = Arc::new(vec![number; elements]);
    let address = numbers.as_ptr() as u64;
    // SAFETY: the fake's device memory is the host's; the span keeps the vector.
    (unsafe { Span::new(address, elements * 4, 0, Arc::clone(&numbers) as _) }, numbers)
}

fn read(span: &Span) -> Vec<f32> {
    // SAFETY: the fake's device memory is the host's, and the tests read after the work is done.
    unsafe { slice::from_raw_parts(span.address() as *const f32, span.bytes() / 4) }.to_vec()
}

#[test]
fn device_memory_is_reduced_where_it_lies_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake(folder.path(), &[]);
    let sums = on_ranks(&libraries, 3, |member, rank| {
        let (input, numbers) = own(rank as f32 + 1.0, 1000);
        let output = member.allocate(4000).unwrap();
        // More calls than can be under way at a time; each adds a part.
        for part in 0..100 {
            let part = part * 40..(part + 1) * 40;
            let (from, to) = (input.part(part.clone()).unwrap(), output.part(part).unwrap());
            member.queue_all_reduce_f32(&from, &to).unwrap();
        }
        member.wait().unwrap();
        assert!(numbers.iter().all(|number| *number == rank as f32 + 1.0), "the input was written");
        read(&output)
    });
    assert!(sums.iter().all(|sum| *sum == vec![6.0; 1000]));
}

#[test]
fn bytes_go_up_and_down_and_to_all() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake(folder.path(), &[]);
    let results = on_ranks(&libraries, 2, |member, rank| {
        let mine = member.allocate(8).unwrap();
        member.upload(&[rank as u8 + 1; 8], &mine).unwrap();
        let all = member.allocate(16).unwrap();
        member.queue_all_gather(&mine, &all).unwrap();
        member.queue_broadcast(1, &mine).unwrap();
        member.hold(&mine).unwrap();
        let (mut gathered, mut sent) = ([0; 16], [0; 8]);
        member.download(&all, &mut gathered).unwrap();
        member.download(&mine, &mut sent).unwrap();
        (gathered, sent)
    });
    let gathered = [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2];
    assert_eq!(results, [(gathered, [2; 8]); 2]);
}

#[test]
fn wrong_spans_are_refused_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake(folder.path(), &[]);
    on_ranks(&libraries, 2, |member, _| {
        let (a, b) = (member.allocate(8).unwrap(), member.allocate(12).unwrap());
        let odd = member.allocate(7).unwrap();
        let errors = [
            member.queue_all_reduce_f32(&a, &b).unwrap_err(),
            member.queue_all_reduce_f32(&odd, &odd).unwrap_err(),
            member.queue_all_gather(&a, &b).unwrap_err(),
            member.queue_broadcast(2, &a).unwrap_err(),
            member.upload(&[1], &a).unwrap_err(),
            member.download(&a, &mut [0; 9]).unwrap_err(),
        ];
        assert!(errors.iter().all(|error| error.code() == "SH0787"), "{errors:?}");
        member.queue_all_reduce_f32(&a, &a).unwrap();
        member.wait().unwrap();
    });
}

#[test]
fn ranks_that_queue_different_work_hear_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake(folder.path(), &[]);
    let errors = on_ranks(&libraries, 2, |member, rank| {
        let span = member.allocate(8 + 4 * rank as usize).unwrap();
        let queued = member.queue_all_reduce_f32(&span, &span);
        queued.and_then(|()| member.wait()).unwrap_err()
    });
    assert!(errors.iter().all(|error| matches!(error, Error::LengthMismatch { .. })), "{errors:?}");
}

#[test]
fn what_is_queued_ends_with_an_abort() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = fake(folder.path(), &["-DFAKE_WORK_HANGS"]);
    let device = Device::open(0, &libraries).unwrap();
    let options = JoinOptions { generation: 1, deadline: Duration::from_secs(20) };
    let abort = AbortHandle::new();
    let id = device.unique_id().unwrap();
    let mut member = device.join_with(id, 0, 1, &options, abort.clone(), None).unwrap();
    let span = member.allocate(8).unwrap();
    member.queue_all_reduce_f32(&span, &span).unwrap();
    // Nobody waits in a call when the abort comes: the communicator is ended all the same.
    abort.abort("told to leave");
    let aborted = Error::Aborted { reason: "told to leave".to_owned() };
    assert_eq!(member.wait(), Err(aborted.clone()));
    assert_eq!(member.queue_broadcast(0, &span), Err(aborted));
}
