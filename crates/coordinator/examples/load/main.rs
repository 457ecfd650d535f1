//! The coordinator under load: simulated workers over real gRPC on loopback, against a coordinator in a process of
//! its own. `cargo xtask load` runs it at several sizes and prints the table of docs/reliability.md.
//!
//! ```text
//! load crew --workers 1024 [--steps 20] [--step-ms 1000] [--warm-up 5]     one JSON object on standard output
//! load coordinator FOLDER                                                  what `crew` starts
//! ```
//!
//! Each simulated worker has a connection of its own, beats as often as it is told to, leases the rows of each step
//! ahead of it and looks at them, and reports all steps on one common boundary, as the members of a collective do.

#![expect(clippy::print_stdout, reason = "the figures, and the address of the coordinator")]

mod crew;
mod figures;
mod stage;

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use shanty_access::{Credentials, NewToken, Role, Secret};
use shanty_coordinator::Coordinator;
use tokio_util::sync::CancellationToken;

use crew::Plan;
use figures::Usage;
use stage::Stage;

/// Where the coordinator's process finds the token that the workers show.
const TOKEN: &str = "SHANTY_TOKEN";

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["coordinator", folder] => coordinator(Path::new(folder)),
        ["crew", flags @ ..] => crew(&plan(flags)?),
        other => Err(format!("usage: load crew --workers N | load coordinator FOLDER, not {other:?}").into()),
    }
}

fn plan(flags: &[&str]) -> Result<Plan> {
    let mut plan = Plan { workers: 8, steps: 20, warm_up: 5, step: Duration::from_secs(1) };
    for flag in flags.chunks(2) {
        let [name, value] = flag else { return Err(format!("{flag:?} has no value").into()) };
        let number: u64 = value.parse()?;
        match *name {
            "--workers" => plan.workers = usize::try_from(number)?.max(1),
            "--steps" => plan.steps = number.max(1),
            "--warm-up" => plan.warm_up = number,
            "--step-ms" => plan.step = Duration::from_millis(number.max(1)),
            other => return Err(format!("unknown flag {other}").into()),
        }
    }
    Ok(plan)
}

/// The coordinator as `shanty coordinator` runs it: the same services, options and runtime. Ends with its standard input.
fn coordinator(folder: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut coordinator = Coordinator::bind(stage::options(folder)).await?;
        let token = Secret::new(&std::env::var(TOKEN)?);
        coordinator.add_key(&token, "load", Role::Admin);
        println!("{}", coordinator.handle().url());
        let shutdown = CancellationToken::new();
        let lifeline = shutdown.clone();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            lifeline.cancel();
        });
        Ok(Box::pin(coordinator.serve(shutdown)).await?)
    })
}

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn crew(plan: &Plan) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let stage = Stage::set(folder.path(), plan.workers)?;
    let token = NewToken::draw()?.secret;
    let credentials = Credentials { token: Some(token.clone()), ..Credentials::default() };
    let mut process = Process(
        Command::new(std::env::current_exe()?)
            .arg("coordinator")
            .arg(folder.path())
            .env(TOKEN, token.expose())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let mut url = String::new();
    BufReader::new(process.0.stdout.take().ok_or("its standard output is piped")?).read_line(&mut url)?;
    let pid = process.0.id();

    // One thread: the coordinator has the other core to itself.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let work = async || -> Result<_> {
        let crew = crew::board(url.trim(), &credentials, &stage, plan).await?;
        let begin = crew.begin();
        let usage = async || -> Result<(Usage, Usage)> {
            tokio::time::sleep_until(begin + plan.step * u32::try_from(plan.warm_up)?).await;
            let before = Usage::of(pid)?;
            tokio::time::sleep_until(begin + plan.step * u32::try_from(plan.warm_up + plan.steps)?).await;
            Ok((before, Usage::of(pid)?))
        };
        let (log, usage) = tokio::join!(crew.work(), usage());
        let (before, after) = usage?;
        Ok((log?, before, after))
    };
    let (log, before, after) = runtime.block_on(work())?;
    println!("{}", figures::object(plan, &log, &before, &after));
    Ok(())
}
