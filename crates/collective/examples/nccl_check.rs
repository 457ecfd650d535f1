//! Checks NCCL on a machine with NVIDIA cards, as far as its cards allow: every call with one rank; a peer that never
//! comes; an abort while starting; generations one after the other; two processes on one card; and, with several
//! cards, a process on each, of which one is killed.
//!
//! `cargo build --release -p shanty-collective --example nccl_check`, then run it there; 0 says that all is well.

#![expect(clippy::print_stdout, reason = "a program that reports")]

use std::{
    env,
    error::Error as Any,
    net::TcpListener,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use shanty_collective::{
    AbortHandle, Collective, Compression, Error,
    nccl::{self, Device, JoinOptions, Libraries, NcclCollective},
    tcp::{self, Listener, Token},
};

type Outcome = Result<(), Box<dyn Any>>;

/// As many f32 as the adapter of an 8B model has at rank 16.
const ADAPTER: usize = 42_000_000;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        None => all(),
        Some("member") => member(&arguments[1..]),
        Some(other) => Err(format!("unknown mode `{other}`").into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> Outcome {
    let libraries = Libraries::of_the_system();
    let device = Device::open(0, &libraries)?;
    println!("NCCL {}, device {:02x?}", device.nccl_version(), device.uuid()?);
    every_call(&device)?;
    a_peer_that_never_comes(&device)?;
    an_abort_while_starting(&device)?;
    an_abort_in_the_middle(&device)?;
    generations(&device)?;
    one_card_for_two()?;
    let cards = (1..16).take_while(|index| Device::open(*index, &libraries).is_ok()).count() + 1;
    drop(device);
    if cards > 1 {
        a_card_each(cards)?;
    } else {
        println!("several cards: SKIPPED, this machine has one");
    }
    println!("all is well");
    Ok(())
}

fn within(deadline: Duration) -> JoinOptions {
    JoinOptions { generation: 1, deadline }
}

fn alone(device: &Device) -> Result<NcclCollective, Error> {
    device.join_with(device.unique_id()?, 0, 1, &within(LIMIT), AbortHandle::new(), None)
}

fn expect(what: &str, is_true: bool) -> Outcome {
    println!("{what}: {}", if is_true { "ok" } else { "WRONG" });
    if is_true { Ok(()) } else { Err(what.to_owned().into()) }
}

fn every_call(device: &Device) -> Outcome {
    let mut member = alone(device)?;
    member.set_call_deadline(Some(LIMIT));
    let input: Vec<f32> = (0..1_000_003).map(|i| i as f32 * 0.5 - 1e5).collect();
    let mut output = vec![0.0; input.len()];
    member.all_reduce_f32(&input, &mut output)?;
    expect("all-reduce of f32", input == output)?;
    let mut words = [u64::MAX, 7, 1 << 40];
    member.all_reduce_u64(&mut words)?;
    expect("all-reduce of u64", words == [u64::MAX, 7, 1 << 40])?;
    let mut gathered = [0; 5];
    member.all_gather(b"pearl", &mut gathered)?;
    expect("all-gather", &gathered == b"pearl")?;
    let mut sent = *b"black";
    member.broadcast(0, &mut sent)?;
    expect("broadcast", &sent == b"black")?;
    member.all_reduce_f32(&[], &mut [])?;

    let on_device = member.on_device().ok_or("no memory of the device")?;
    let bytes: &[u8] = &input.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    let (from, to) = (on_device.allocate(bytes.len())?, on_device.allocate(bytes.len())?);
    on_device.upload(bytes, &from)?;
    on_device.queue_all_reduce_f32(&from, &to)?;
    on_device.queue_broadcast(0, &to)?;
    let mut back = vec![0; bytes.len()];
    on_device.download(&to, &mut back)?;
    expect("sums in the device's memory", back == bytes)?;
    on_device.queue_all_gather(&from, &to)?;
    on_device.wait()?;

    let adapter = on_device.allocate(4 * ADAPTER)?;
    let sum = on_device.allocate(4 * ADAPTER)?;
    for pieces in [1, 10, 40] {
        let start = Instant::now();
        for piece in 0..pieces {
            let range = piece * 4 * (ADAPTER / pieces)..(piece + 1) * 4 * (ADAPTER / pieces);
            let parts = (adapter.part(range.clone()), sum.part(range));
            let (Some(from), Some(to)) = parts else { return Err("a part is missing".into()) };
            on_device.queue_all_reduce_f32(&from, &to)?;
        }
        let queued = start.elapsed();
        on_device.wait()?;
        println!(
            "  {ADAPTER} f32 in {pieces} pieces: queued in {queued:.1?}, done in {:.1?}",
            start.elapsed()
        );
    }
    let (rounds, start) = (1000, Instant::now());
    for _ in 0..rounds {
        member.all_reduce_u64(&mut [1; 5])?;
    }
    println!("  a step's check: {:.1?}", start.elapsed() / rounds);
    Ok(())
}

fn a_peer_that_never_comes(device: &Device) -> Outcome {
    let limit = Duration::from_secs(2);
    let start = Instant::now();
    let id = device.unique_id()?;
    let joined = device.join_with(id, 0, 2, &within(limit), AbortHandle::new(), None);
    let waited = start.elapsed();
    println!(
        "  gave up after {waited:.2?}: {}",
        joined.as_ref().err().map_or_else(String::new, Error::to_string)
    );
    let is_right = matches!(joined, Err(Error::Join { .. }));
    expect("a peer that never comes", is_right && waited >= limit && waited < limit + Duration::from_secs(2))
}

fn an_abort_while_starting(device: &Device) -> Outcome {
    let (abort, id) = (AbortHandle::new(), device.unique_id()?);
    let start = Instant::now();
    let joined = thread::scope(|scope| {
        let join =
            scope.spawn(|| device.join_with(id, 0, 2, &within(LIMIT), abort.clone(), None).map(|_| ()));
        thread::sleep(Duration::from_millis(300));
        abort.abort("told to leave");
        join.join()
    });
    println!("  ended {:.2?} after the start", start.elapsed());
    expect("an abort while starting", matches!(joined, Ok(Err(Error::Aborted { .. }))))
}

fn an_abort_in_the_middle(device: &Device) -> Outcome {
    let mut member = alone(device)?;
    let abort = member.abort_handle();
    let start = Instant::now();
    let outcome = thread::scope(|scope| {
        let calls = scope.spawn(move || {
            loop {
                if let Err(error) = member.all_reduce_f32(&vec![1.0; 1 << 22], &mut vec![0.0; 1 << 22]) {
                    return error;
                }
            }
        });
        thread::sleep(Duration::from_millis(300));
        abort.abort("told to leave");
        calls.join()
    });
    println!("  ended {:.2?} after the start", start.elapsed());
    expect("an abort in the middle", matches!(outcome, Ok(Error::Aborted { .. })))
}

fn generations(device: &Device) -> Outcome {
    let start = Instant::now();
    for _ in 0..5 {
        let mut member = alone(device)?;
        member.all_reduce_u64(&mut [1])?;
    }
    println!("  {:.0?} each", start.elapsed() / 5);
    expect("generations one after the other", true)
}

/// Addresses of this machine that were free a moment ago.
fn addresses(count: usize) -> Result<Vec<String>, Box<dyn Any>> {
    let bound: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    Ok(bound.iter().map(|listener| listener.local_addr().map(|a| a.to_string())).collect::<Result<_, _>>()?)
}

fn spawn(rank: usize, device: usize, members: &[String], work: &str) -> std::io::Result<Child> {
    Command::new(env::current_exe()?)
        .args(["member", &rank.to_string(), &device.to_string(), &members.join(","), work])
        .stdout(Stdio::piped())
        .spawn()
}

fn one_card_for_two() -> Outcome {
    let members = addresses(2)?;
    let children: Vec<_> = (0..2).map(|rank| spawn(rank, 0, &members, "sum")).collect::<Result<_, _>>()?;
    for child in children {
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        println!("  {said}");
        expect("two processes on one card are refused", said.contains("ranks 0 and 1 share one GPU"))?;
    }
    Ok(())
}

#[expect(clippy::zombie_processes, reason = "an error ends this program, and its children with it")]
fn a_card_each(cards: usize) -> Outcome {
    let members = addresses(cards)?;
    let children: Vec<_> =
        (0..cards).map(|rank| spawn(rank, rank, &members, "sum")).collect::<Result<_, _>>()?;
    for child in children {
        let output = child.wait_with_output()?;
        println!("  {}", String::from_utf8_lossy(&output.stdout).trim());
        expect("a process on each card", output.status.success())?;
    }
    let members = addresses(cards)?;
    let mut children: Vec<_> =
        (0..cards).map(|rank| spawn(rank, rank, &members, "forever")).collect::<Result<_, _>>()?;
    thread::sleep(Duration::from_secs(15));
    let mut victim = children.remove(1);
    victim.kill()?;
    victim.wait()?;
    let start = Instant::now();
    for child in children {
        let output = child.wait_with_output()?;
        println!("  {}", String::from_utf8_lossy(&output.stdout).trim());
    }
    println!("  all others ended {:.2?} after the kill", start.elapsed());
    expect("a killed process ends the others' sums", start.elapsed() < Duration::from_secs(5))
}

/// One process of several.
fn member(arguments: &[String]) -> Outcome {
    let [rank, device, members, work] = arguments else { return Err("wrong arguments".into()) };
    let members: Vec<String> = members.split(',').map(str::to_owned).collect();
    let (rank, world_size): (u32, usize) = (rank.parse()?, members.len());
    let listener = Listener::bind(&members[rank as usize])?;
    let options = tcp::JoinOptions {
        job: "check".to_owned(),
        generation: 1,
        rank,
        members,
        token: Token([7; 32]),
        deadline: LIMIT,
        encrypted: false,
        compression: Compression::Off,
    };
    let abort = AbortHandle::new();
    let links = listener.join(&options, abort.clone())?;
    let device = Device::open(device.parse()?, &Libraries::of_the_system());
    let start = Instant::now();
    let mut member = nccl::join(links, device.as_ref(), &within(LIMIT), abort)?;
    let joined = start.elapsed();
    member.set_call_deadline(Some(LIMIT));
    let on_device = member.on_device().ok_or("no memory of the device")?;
    let (from, to) = (on_device.allocate(4 * ADAPTER)?, on_device.allocate(4 * ADAPTER)?);
    on_device.upload(&1.5f32.to_le_bytes().repeat(ADAPTER), &from)?;
    let mut best = Duration::MAX;
    let mut rounds = 0;
    while work == "forever" || rounds < 10 {
        let start = Instant::now();
        let on_device = member.on_device().ok_or("no memory of the device")?;
        on_device.queue_all_reduce_f32(&from, &to)?;
        member.all_reduce_u64(&mut [1; 5])?;
        best = best.min(start.elapsed());
        rounds += 1;
    }
    let mut sum = vec![0; 4 * ADAPTER];
    member.on_device().ok_or("no memory of the device")?.download(&to, &mut sum)?;
    let expected = (1.5 * world_size as f32).to_le_bytes();
    if !sum.chunks_exact(4).all(|number| number == expected) {
        return Err("the sum is wrong".into());
    }
    let bus =
        2.0 * (world_size - 1) as f64 / world_size as f64 * (4 * ADAPTER) as f64 / best.as_secs_f64() / 1e9;
    println!("rank {rank}: joined in {joined:.2?}, {ADAPTER} f32 and a check in {best:.2?}, {bus:.0} GB/s");
    Ok(())
}
