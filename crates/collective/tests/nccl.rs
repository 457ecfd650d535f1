//! What becomes of NCCL's failures, with a library that fails on purpose.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{
    thread,
    time::{Duration, Instant},
};

use common::{
    boxed,
    fake::{Fake, nccl_group},
    is_break, join_all, listeners, on_all_once, options, wait_for,
};
use shanty_collective::{
    AbortHandle, Collective, Error,
    nccl::{self, Device, JoinOptions, Libraries},
};
use shanty_diagnostic::{Diagnose, Kind};

const LONG: Duration = Duration::from_secs(20);
/// Far more than it takes on a busy machine, far less than any deadline.
const AT_ONCE: Duration = Duration::from_secs(5);

fn within(deadline: Duration) -> JoinOptions {
    JoinOptions { generation: 1, deadline }
}

fn alone(fake: &Fake) -> Result<nccl::NcclCollective, Error> {
    let device = Device::open(0, &fake.libraries)?;
    let id = device.unique_id()?;
    device.join_with(id, 0, 1, &within(LONG), AbortHandle::new(), None)
}

#[test]
fn a_missing_library_is_named_with_the_place() {
    let fake = Fake::new(&[]);
    let error = Libraries::at("/nowhere/libnccl.so.2", &fake.file).version().unwrap_err();
    assert_eq!((error.code(), error.diagnostic().kind), ("SH0720", Kind::User));
    assert!(error.to_string().contains("/nowhere/libnccl.so.2"), "{error}");
    let error = Libraries::at(&fake.file, "/nowhere/libcuda.so.1").version().unwrap_err();
    assert_eq!(error.code(), "SH0720");
    assert!(error.to_string().contains("libcuda"), "{error}");
}

#[test]
fn a_missing_function_is_named_with_the_file() {
    let fake = Fake::new(&["-DFAKE_LACKS_INIT"]);
    let error = fake.libraries.version().unwrap_err();
    assert_eq!(error.code(), "SH0721");
    assert!(error.to_string().contains("ncclCommInitRankConfig"), "{error}");
}

#[test]
fn an_old_library_says_how_old_it_is() {
    let fake = Fake::new(&["-DFAKE_VERSION=21304", "-DFAKE_LACKS_INIT"]);
    let error = fake.libraries.version().unwrap_err();
    assert_eq!(error.code(), "SH0722");
    assert!(error.to_string().contains("2.13.4"), "{error}");
}

/// The fake takes a configuration of exactly the size that its version has.
#[test]
fn libraries_of_all_versions_are_started() {
    for version in [21_403, 21_602, 21_701, 21_803, 22_203, 22_602, 22_703, 22_809] {
        let fake = Fake::new(&[&format!("-DFAKE_VERSION={version}")]);
        assert_eq!(fake.libraries.version().unwrap(), version);
        let mut member = alone(&fake).unwrap();
        let mut values = [7];
        member.all_reduce_u64(&mut values).unwrap();
        assert_eq!(values, [7], "{version}");
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let fake = Fake::new(&[]);
    let error = Device::open(99, &fake.libraries).err().unwrap();
    assert_eq!(error.code(), "SH0723");
}

#[test]
fn a_start_that_fails_says_what_nccl_says() {
    let fake = Fake::new(&["-DFAKE_INIT_FAILS=5"]);
    let error = alone(&fake).err().unwrap();
    assert_eq!((error.code(), error.diagnostic().kind), ("SH0724", Kind::User));
    assert!(error.to_string().contains("invalid usage (the fake's last word)"), "{error}");
}

#[test]
fn a_start_that_never_ends_is_given_up_at_its_deadline() {
    let fake = Fake::new(&[]);
    let device = Device::open(0, &fake.libraries).unwrap();
    let id = device.unique_id().unwrap();
    let limit = Duration::from_millis(60);
    let start = Instant::now();
    // The other rank never comes.
    let error = device.join_with(id, 0, 2, &within(limit), AbortHandle::new(), None).err().unwrap();
    assert!(start.elapsed() >= limit && start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    assert_eq!((error.code(), error.diagnostic().kind), ("SH0781", Kind::Transient), "{error}");
}

#[test]
fn a_start_that_never_ends_is_aborted() {
    let fake = Fake::new(&["-DFAKE_INIT_HANGS"]);
    let device = Device::open(0, &fake.libraries).unwrap();
    let id = device.unique_id().unwrap();
    let abort = AbortHandle::new();
    let start = Instant::now();
    let joined = thread::scope(|scope| {
        let join = scope.spawn(|| device.join_with(id, 0, 1, &within(LONG), abort.clone(), None).map(|_| ()));
        thread::sleep(Duration::from_millis(20));
        abort.abort("told to leave");
        join.join().unwrap()
    });
    assert_eq!(joined, Err(Error::Aborted { reason: "told to leave".to_owned() }));
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn a_call_that_fails_ends_the_generation() {
    let fake = Fake::new(&["-DFAKE_CALL_FAILS=4"]);
    let mut member = alone(&fake).unwrap();
    let error = member.all_reduce_f32(&[1.0], &mut [0.0]).unwrap_err();
    assert_eq!((error.code(), error.diagnostic().kind), ("SH0724", Kind::Transient), "{error}");
    assert!(matches!(member.broadcast(0, &mut [1]), Err(Error::Broken { .. })));
}

#[test]
fn what_nccl_notices_by_itself_ends_a_call() {
    let fake = Fake::new(&["-DFAKE_BREAKS_AFTER=1"]);
    let mut member = alone(&fake).unwrap();
    let mut sum = [0.0];
    member.all_reduce_f32(&[1.5], &mut sum).unwrap();
    assert_eq!(sum, [1.5]);
    let error = member.all_reduce_f32(&[1.0], &mut sum).unwrap_err();
    assert!(error.to_string().contains("remote process exited"), "{error}");
}

#[test]
fn work_that_never_ends_is_ended_by_deadline_and_by_abort() {
    let fake = Fake::new(&["-DFAKE_WORK_HANGS"]);
    let mut member = alone(&fake).unwrap();
    member.set_call_deadline(Some(Duration::from_millis(50)));
    let error = member.all_reduce_f32(&[1.0], &mut [0.0]).unwrap_err();
    assert_eq!(error.code(), "SH0786", "{error}");

    let mut member = alone(&fake).unwrap();
    let abort = member.abort_handle();
    let start = Instant::now();
    let error = thread::scope(|scope| {
        let call = scope.spawn(|| member.all_reduce_u64(&mut [1]).unwrap_err());
        thread::sleep(Duration::from_millis(20));
        abort.abort("a peer is lost");
        call.join().unwrap()
    });
    assert_eq!(error, Error::Aborted { reason: "a peer is lost".to_owned() });
    assert!(start.elapsed() < AT_ONCE);
}

/// What all ranks of a generation say when they join.
fn join_each(libraries: [&Libraries; 2], devices: [u32; 2]) -> Vec<Result<(), Error>> {
    let (listeners, members) = listeners(2);
    let links = join_all(&listeners, &members, 1);
    thread::scope(|scope| {
        let joins: Vec<_> = links
            .into_iter()
            .zip(libraries.into_iter().zip(devices))
            .map(|(side, (libraries, device))| {
                scope.spawn(move || {
                    let device = Device::open(device, libraries);
                    nccl::join(side, device.as_ref(), &within(LONG), AbortHandle::new()).map(|_| ())
                })
            })
            .collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    })
}

#[test]
fn two_ranks_on_one_device_are_refused_by_name() {
    let fake = Fake::new(&[]);
    let results = join_each([&fake.libraries; 2], [3, 3]);
    let shared = Error::SharedDevice { first: 0, second: 1 };
    assert_eq!((shared.code(), shared.diagnostic().kind), ("SH0725", Kind::User));
    assert_eq!(results, [Err(shared.clone()), Err(shared)]);
}

#[test]
fn a_member_without_nccl_is_named_to_the_others() {
    let (fake, none) = (Fake::new(&[]), Libraries::at("/nowhere/libnccl.so.2", "/nowhere"));
    let results = join_each([&fake.libraries, &none], [0, 1]);
    let errors: Vec<_> = results.into_iter().map(Result::unwrap_err).collect();
    assert_eq!((errors[0].code(), errors[1].code()), ("SH0726", "SH0720"));
    assert!(errors[0].to_string().contains("rank 1"), "{}", errors[0]);
}

#[test]
fn members_with_different_versions_are_refused() {
    let (new, old) = (Fake::new(&[]), Fake::new(&["-DFAKE_VERSION=22703"]));
    for result in join_each([&new.libraries, &old.libraries], [0, 1]) {
        let error = result.unwrap_err();
        assert_eq!(error.code(), "SH0726");
        assert!(error.to_string().contains("2.28.9, rank 1 has 2.27.3"), "{error}");
    }
}

#[test]
fn nobody_waits_for_an_id_that_cannot_be_made() {
    let (good, bad) = (Fake::new(&[]), Fake::new(&["-DFAKE_ID_FAILS=2"]));
    let errors: Vec<_> =
        join_each([&bad.libraries, &good.libraries], [0, 1]).into_iter().map(Result::unwrap_err).collect();
    assert_eq!((errors[0].code(), errors[1].code()), ("SH0724", "SH0726"), "{errors:?}");
}

#[test]
fn a_peer_that_dies_while_nccl_starts_is_noticed_by_its_links() {
    let fake = Fake::new(&[]);
    let (listeners, members) = listeners(2);
    let mut links = join_all(&listeners, &members, 1);
    drop(links.pop());
    let device = Device::open(0, &fake.libraries).unwrap();
    let id = device.unique_id().unwrap();
    let start = Instant::now();
    let joined = device.join_with(id, 0, 2, &within(LONG), AbortHandle::new(), links.pop());
    let error = joined.err().unwrap();
    assert!(error.to_string().contains("rank 1 ("), "{error}");
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn members_join_anew_after_an_abort() {
    let fake = Fake::new(&[]);
    let (listeners, members) = listeners(2);
    for generation in 1..4 {
        let group = boxed(nccl_group(&fake, &listeners, &members, generation));
        let abort = group[1].abort_handle();
        let errors = on_all_once(group, |member| {
            let mut values = [1];
            member.all_reduce_u64(&mut values).unwrap();
            assert_eq!(values, [2]);
            if member.rank() == 1 {
                abort.abort("leave");
            }
            member.all_reduce_u64(&mut values).unwrap_err()
        });
        assert!(errors.iter().all(is_break), "{errors:?}");
    }
    // The listener is still good for plain links.
    let options = options(&members[..1], 0, 9);
    wait_for("a last generation", || listeners[0].join(&options, AbortHandle::new()).is_ok());
}
