//! `shanty chaos`: faults on purpose, on a job that runs on this machine.

use std::{path::PathBuf, time::Duration};

use clap::ValueEnum;
use serde_json::json;
use shanty_chaos::{Blow, Chance, Launch, process};
use shanty_proto::v1::{JobState, JobStatus};
use shanty_worker::supervisor::shutdown_on_signals;
use tokio::time::{Instant, sleep_until};

use crate::{
    client::{Client, Target, block_on},
    error::Error,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// A process that is to be started again is waited for as long as this.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// How often a job is looked at between two faults.
const LOOK: Duration = Duration::from_millis(250);
/// Share of the time that a slowed worker runs.
const SLOW_SHARE: f64 = 0.2;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// kill -9 of a worker
    Kill,
    /// A worker stands still (SIGSTOP), and goes on later
    Stop,
    /// A worker's link is cut, and comes back later; for workers in a network namespace of their own
    Partition,
    /// A worker gets a fifth of its time for a while
    Slow,
    /// kill -9 of the coordinator
    Coordinator,
    /// The disk of a folder is full for a while
    DiskFull,
}

/// Strike a job that runs on this machine, to see that it survives
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty chaos kill pirate --rate 6 --for 300 --restart
  shanty chaos stop pirate --lasts 10
  shanty chaos coordinator pirate --coordinator http://127.0.0.1:7070 --restart

Processes of this machine alone are struck, and whoever owns them may. What starts a killed process again is your service
manager, or --restart.")]
pub(crate) struct Args {
    /// What to do to it
    #[arg(value_enum)]
    fault: Kind,
    /// The job, by id or name
    job: String,
    #[command(flatten)]
    target: Target,
    /// Faults a minute, at random times
    #[arg(long, default_value_t = 6.0, value_name = "N")]
    rate: f64,
    /// Seconds until it ends; one fault when absent
    #[arg(long = "for", value_name = "SECONDS")]
    lasts_in_all: Option<f64>,
    /// Seconds that a fault lasts which can be undone
    #[arg(long, default_value_t = 3.0, value_name = "SECONDS")]
    lasts: f64,
    /// Start a killed process again as it was started before
    #[arg(long)]
    restart: bool,
    /// The folder whose disk is filled
    #[arg(long, value_name = "DIR", required_if_eq("fault", "disk-full"))]
    folder: Option<PathBuf>,
    /// A disk with more bytes free than this is not filled
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    most_bytes: u64,
    /// Decides who is struck and when
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// What was struck.
struct Struck {
    worker: String,
    pid: u32,
    /// Still to be undone.
    blow: Option<Blow>,
    /// To be started again once this process has ended.
    again: Option<(u32, Launch)>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let positive = |flag: &'static str, value: f64| {
        let rule = "must be a number above 0".to_owned();
        let error = Error::Impossible { flag, value: value.to_string(), rule };
        if value.is_finite() && value > 0.0 { Ok(()) } else { Err(error) }
    };
    positive("--rate", args.rate)?;
    positive("--lasts", args.lasts)?;
    positive("--for", args.lasts_in_all.unwrap_or(1.0))?;
    block_on(strike_all(args, ui))
}

async fn strike_all(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let interrupted = shutdown_on_signals()?;
    let (connection, job) = args.target.connect_for(&args.job).await?;
    let client = connection.client;
    let mut chance = Chance::new(args.seed);
    let mut status = client.job_status(&job).await?;
    let end = Instant::now() + Duration::from_secs_f64(args.lasts_in_all.unwrap_or(0.0));
    let mean = Duration::from_secs_f64(60.0 / args.rate);
    let (mut faults, first_ms) = (0u64, now_unix_ms());
    loop {
        let struck = strike(&args, &client, &status, &mut chance)?;
        if let Some(struck) = struck {
            faults += 1;
            let name = args.fault.to_possible_value().map(|value| value.get_name().to_owned());
            ui.data(
                &json!({ "event": "fault", "fault": name, "worker": struck.worker, "pid": struck.pid, "step": status.step }),
                |_| format!("{}  {}  process {}", name.clone().unwrap_or_default(), struck.worker, struck.pid),
            )?;
            let lasts = sleep_until(Instant::now() + Duration::from_secs_f64(args.lasts));
            if struck.blow.is_some() {
                tokio::select! { () = lasts => {}, () = interrupted.cancelled() => {} }
            }
            undo(struck).await?;
        }
        let next = Instant::now() + chance.pause(mean);
        while Instant::now() < next.min(end) && !interrupted.is_cancelled() {
            tokio::time::sleep(LOOK).await;
        }
        // The coordinator may be away: then the job is as it was.
        if let Ok(now) = client.job_status(&job).await {
            status = now;
        }
        if Instant::now() >= end || interrupted.is_cancelled() || is_over(&status) {
            break;
        }
    }
    tell(ui, faults, &status, first_ms)?;
    Ok(if interrupted.is_cancelled() { Exit::Interrupted } else { Exit::Done })
}

fn is_over(status: &JobStatus) -> bool {
    matches!(status.state(), JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// Strikes once; nothing if there is nobody to strike right now.
fn strike(
    args: &Args,
    client: &Client,
    status: &JobStatus,
    chance: &mut Chance,
) -> CommandResult<Option<Struck>> {
    let lasting = |worker: String, pid, blow| Struck { worker, pid, blow: Some(blow), again: None };
    match args.fault {
        Kind::Coordinator => {
            let address = client.address();
            let port = address.rsplit(':').next().and_then(|port| port.trim_end_matches('/').parse().ok());
            let port = port.ok_or_else(|| Error::Address { address: address.to_owned() })?;
            let pid = process::listener(port)?;
            let again = if args.restart { Some((pid, Launch::of(pid)?)) } else { None };
            shanty_chaos::kill(pid)?;
            return Ok(Some(Struck { worker: "coordinator".to_owned(), pid, blow: None, again }));
        }
        Kind::DiskFull => {
            let folder = args.folder.clone().unwrap_or_default();
            let blow = shanty_chaos::fill(&folder, args.most_bytes)?;
            return Ok(Some(lasting(folder.display().to_string(), 0, blow)));
        }
        Kind::Kill | Kind::Stop | Kind::Partition | Kind::Slow => {}
    }
    let Some((worker, pid)) = victim(status, chance) else { return Ok(None) };
    let struck = match args.fault {
        Kind::Stop => lasting(worker, pid, shanty_chaos::stop(pid)?),
        Kind::Partition => lasting(worker, pid, shanty_chaos::partition(pid)?),
        Kind::Slow => lasting(worker, pid, shanty_chaos::slow(pid, SLOW_SHARE)?),
        Kind::Kill | Kind::Coordinator | Kind::DiskFull => {
            let again = if args.restart { launch_of_worker(pid)? } else { None };
            shanty_chaos::kill(pid)?;
            Struck { worker, pid, blow: None, again }
        }
    };
    Ok(Some(struck))
}

/// How the parent of a device's process was started, if that is a `shanty worker`: it ends with the device.
fn launch_of_worker(pid: u32) -> CommandResult<Option<(u32, Launch)>> {
    let parent = process::parent(pid).filter(|parent| process::command(*parent).as_deref() == Some("worker"));
    Ok(parent.map(|parent| Launch::of(parent).map(|launch| (parent, launch))).transpose()?)
}

/// A living worker of this machine; members of the generation first.
fn victim(status: &JobStatus, chance: &mut Chance) -> Option<(String, u32)> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let here = status.members.iter().filter(|member| member.host == host && process::is_alive(member.pid));
    let (members, others): (Vec<_>, Vec<_>) = here.partition(|member| member.rank.is_some());
    let from = if members.is_empty() { others } else { members };
    let one = from.get(chance.below(from.len()))?;
    Some((one.worker_id.clone(), one.pid))
}

/// Undoes what can be undone, and starts again what is to be.
async fn undo(struck: Struck) -> CommandResult<()> {
    if let Some(blow) = struck.blow {
        blow.heal()?;
    }
    if let Some((pid, launch)) = struck.again {
        let limit = Instant::now() + ENDS_WITHIN;
        while process::is_alive(pid) && Instant::now() < limit {
            tokio::time::sleep(LOOK / 10).await;
        }
        // It is nobody's child afterwards, as one that a service manager starts.
        drop(launch.start()?);
    }
    Ok(())
}

/// What the job's own events say of the time since the first fault.
fn tell(ui: &Ui, faults: u64, status: &JobStatus, since_unix_ms: u64) -> CommandResult<()> {
    let since = status.events.iter().filter(|event| event.unix_ms >= since_unix_ms);
    let lost = since.clone().filter(|event| event.kind == "member_lost").count();
    let longest = |of: &dyn Fn(&shanty_proto::v1::Event) -> Option<f64>| {
        since
            .clone()
            .filter_map(of)
            .fold(None, |most: Option<f64>, time| Some(most.map_or(time, |most| most.max(time))))
    };
    let detection = longest(&|event| event.detection_ms);
    let stall = longest(&|event| event.stall_ms);
    let state = status.state().as_str_name().trim_start_matches("JOB_STATE_").to_lowercase();
    let object = json!({
        "event": "finished", "faults": faults, "members_lost": lost, "longest_detection_ms": detection,
        "longest_stall_ms": stall, "state": state, "step": status.step, "steps": status.steps,
    });
    let shown = |time: Option<f64>| time.map_or_else(|| "none".to_owned(), |time| format!("{time:.0} ms"));
    ui.data(&object, |_| {
        format!(
            "{faults} faults, {lost} members lost; longest detection {}, longest stall {}; {state} at step {} of {}",
            shown(detection),
            shown(stall),
            status.step,
            status.steps
        )
    })?;
    Ok(())
}

fn now_unix_ms() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
