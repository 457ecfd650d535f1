//! Neighbours that hold the token and misbehave afterwards.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener},
    thread,
    time::Duration,
};

use super::{
    JoinOptions, Listener, Token,
    frame::{HEADER_BYTES, Header},
    join::find_neighbours,
    ring::Links,
    seal::Seal,
};
use crate::{AbortHandle, Collective, Compression, Error, Operation, Result};

/// What rank 0 says to a call when rank 1 answers the barrier and then does `misbehave`. Rank 1 takes what
/// it gets until rank 0 closes.
fn beside_a_bad_neighbour(
    misbehave: impl FnOnce(&Links) + Send,
    call: impl FnOnce(&mut dyn Collective) -> Result<()>,
) -> Error {
    beside(false, |links, _| misbehave(links), call)
}

/// As above, on plain links, or on encrypted ones with the means to seal parts to rank 0.
fn beside(
    encrypted: bool,
    misbehave: impl FnOnce(&Links, Option<Seal>) + Send,
    call: impl FnOnce(&mut dyn Collective) -> Result<()>,
) -> Error {
    let bad = TcpListener::bind("127.0.0.1:0").unwrap();
    bad.set_nonblocking(true).unwrap();
    let good = Listener::bind("127.0.0.1:0").unwrap();
    let options = JoinOptions {
        job: "pirate".to_owned(),
        generation: 4,
        rank: 0,
        members: vec![good.local_addr().to_string(), bad.local_addr().unwrap().to_string()],
        token: Token([9; 32]),
        deadline: Duration::from_secs(20),
        encrypted,
        compression: Compression::Off,
    };
    thread::scope(|scope| {
        let bad_options = JoinOptions { rank: 1, ..options.clone() };
        scope.spawn(move || {
            let (next, previous) = find_neighbours(&bad, &bad_options, &AbortHandle::new()).unwrap();
            let mut seal = next.key.as_ref().map(|key| Seal::new(key).unwrap());
            let links = Links { next: next.stream, previous: previous.stream };
            let barrier =
                Header { operation: Operation::Barrier, total_bytes: 0, payload_bytes: 0, ..header(1) };
            (&links.next).write_all(&part(&mut seal, barrier, b"")).unwrap();
            links.previous.set_nonblocking(false).unwrap();
            misbehave(&links, seal);
            let _ = io::copy(&mut &links.previous, &mut io::sink());
        });
        let mut member = good.join(&options, AbortHandle::new()).unwrap();
        member.set_call_deadline(Some(Duration::from_secs(20)));
        let error = call(&mut member).unwrap_err();
        assert!(matches!(member.all_reduce_u64(&mut [1]), Err(Error::Broken { .. })));
        error
    })
}

/// A part as it travels.
fn part(seal: &mut Option<Seal>, header: Header, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    let mut body = payload.to_vec();
    if let Some(seal) = seal {
        assert!(seal.close(&header.encode(), payload, &mut body));
    }
    bytes.extend_from_slice(&body);
    bytes
}

/// The header of an all-reduce of one integer.
fn header(sequence: u64) -> Header {
    Header {
        operation: Operation::AllReduceU64,
        generation: 4,
        sequence,
        total_bytes: 8,
        argument: 0,
        hop: 0,
        part: 0,
        payload_bytes: 8,
    }
}

fn count(member: &mut dyn Collective) -> Result<()> {
    member.all_reduce_u64(&mut [1])
}

#[test]
fn a_good_frame_is_taken_and_the_next_one_missed() {
    let error = beside_a_bad_neighbour(
        |links| {
            let mut frame = header(2).encode().to_vec();
            frame.extend_from_slice(&41u64.to_le_bytes());
            (&links.next).write_all(&frame).unwrap();
            // Closes once it has the barrier and the first count.
            (&links.previous).read_exact(&mut [0; HEADER_BYTES + HEADER_BYTES + 8]).unwrap();
            links.close();
        },
        |member| {
            let mut values = [1];
            member.all_reduce_u64(&mut values)?;
            assert_eq!(values, [42]);
            count(member)
        },
    );
    assert!(matches!(error, Error::PeerLost { sequence: 3, .. }), "{error}");
}

#[test]
fn garbage_names_the_peer() {
    let error = beside_a_bad_neighbour(|links| (&links.next).write_all(&[0xee; 500]).unwrap(), count);
    assert_eq!(error.code(), "SH0783");
    assert!(error.to_string().contains("rank 1 ("), "{error}");
}

#[test]
fn garbage_as_short_as_a_header_is_noticed_without_more() {
    // The peer keeps the connection and sends nothing else: the payload is not waited for.
    let send = |links: &Links| (&links.next).write_all(&[0xee; HEADER_BYTES]).unwrap();
    let error = beside_a_bad_neighbour(send, count);
    assert_eq!(error.code(), "SH0783");
}

#[test]
fn other_sequences_and_generations_are_refused() {
    let wrong = [
        Header { sequence: 1, ..header(2) },
        Header { sequence: 3, ..header(2) },
        Header { generation: 3, ..header(2) },
        Header { operation: Operation::AllGather, ..header(2) },
        Header { hop: 1, ..header(2) },
        Header { payload_bytes: 16, ..header(2) },
    ];
    for header in wrong {
        let send = move |links: &Links| (&links.next).write_all(&header.encode()).unwrap();
        let error = beside_a_bad_neighbour(send, count);
        assert_eq!(error.code(), "SH0783", "{header:?}: {error}");
    }
}

#[test]
fn a_frame_cut_short_is_a_lost_peer() {
    let error = beside_a_bad_neighbour(
        |links| {
            (&links.next).write_all(&header(2).encode()[..30]).unwrap();
            links.next.shutdown(Shutdown::Both).unwrap();
        },
        count,
    );
    assert_eq!(error.code(), "SH0782");
    assert!(error.to_string().contains("rank 1 ("), "{error}");
}

#[test]
fn a_next_rank_that_closes_is_noticed_while_sending() {
    // It takes nothing: the buffers fill, then it is gone. The rank before is still there and silent.
    let error = beside_a_bad_neighbour(
        |links| links.previous.shutdown(Shutdown::Both).unwrap(),
        |member| {
            let (input, mut output) = (vec![1.0; 1 << 22], vec![0.0; 1 << 22]);
            member.all_reduce_f32(&input, &mut output)
        },
    );
    assert_eq!(error.code(), "SH0782");
}

#[test]
fn a_sealed_part_is_taken_and_one_changed_on_its_way_is_not() {
    let error = beside(
        true,
        |links, mut seal| {
            let good = part(&mut seal, header(2), &41u64.to_le_bytes());
            (&links.next).write_all(&good).unwrap();
            let mut changed = part(&mut seal, Header { sequence: 3, ..header(2) }, &41u64.to_le_bytes());
            changed[HEADER_BYTES] ^= 1;
            (&links.next).write_all(&changed).unwrap();
        },
        |member| {
            let mut values = [1];
            member.all_reduce_u64(&mut values)?;
            assert_eq!(values, [42]);
            count(member)
        },
    );
    assert!(matches!(error, Error::Forged { sequence: 3, .. }), "{error}");
    assert_eq!(error.code(), "SH0727");
    assert!(error.to_string().contains("rank 1 ("), "{error}");
}

#[test]
fn what_is_not_sealed_is_refused_on_an_encrypted_link() {
    let send = |links: &Links, _: Option<Seal>| {
        let mut plain = part(&mut None, header(2), &41u64.to_le_bytes());
        plain.extend_from_slice(&[0; 16]);
        (&links.next).write_all(&plain).unwrap();
    };
    assert_eq!(beside(true, send, count).code(), "SH0727");
    // Garbage is known by its header already.
    let garbage = |links: &Links, _: Option<Seal>| (&links.next).write_all(&[0xee; 500]).unwrap();
    assert_eq!(beside(true, garbage, count).code(), "SH0783");
}
