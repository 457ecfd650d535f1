//! `shanty doctor`: what this machine has to offer, and what stands in the way.

use std::{
    path::{Path, PathBuf},
    thread::available_parallelism,
};

use serde::Serialize;
use shanty_access::Credentials;
use shanty_diagnostic::Diagnose;
use shanty_peft_core::backend::cuda;

use crate::{
    client::{Client, Identity, block_on, read_address},
    failure::{CommandResult, Exit},
    format,
    ui::{Paint, Ui, paint},
};

/// Less free disk than this deserves a word.
const LITTLE_DISK: u64 = 2 << 30;
/// Less memory than this deserves a word.
const LITTLE_MEMORY: u64 = 2 << 30;

/// Show what this machine has to offer: processor, memory, GPU driver, disk, coordinator
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty doctor
  shanty doctor --coordinator http://head:7461 --output json

Exit code 0 if everything needed to train on this machine is there, 1 otherwise.")]
pub(crate) struct Args {
    /// Also ask this coordinator whether it answers
    #[arg(long, env = "SHANTY_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,
    #[command(flatten)]
    identity: Identity,
    /// The folder whose disk is looked at
    #[arg(long, default_value = ".", value_name = "DIR")]
    folder: PathBuf,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    checks: Vec<Check>,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    /// Works, with a remark.
    Note,
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    text: String,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, text: impl Into<String>) -> Self {
        Self { name, verdict, text: text.into() }
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let mut checks = vec![processor(), vectors(), memory(), gpu(), disk(&args.folder)];
    checks.extend(card());
    checks.extend(coordinator(args.coordinator, &args.identity)?);
    let bad = checks.iter().any(|check| check.verdict == Verdict::Bad);
    let report = Report { version: env!("CARGO_PKG_VERSION"), checks };
    ui.data(&report, |report| render(report, ui.color_on_stdout()))?;
    Ok(if bad { Exit::Failed } else { Exit::Done })
}

fn render(report: &Report, color: bool) -> String {
    let mut lines = vec![format!("shanty {}", report.version)];
    for check in &report.checks {
        let (mark, tint) = match check.verdict {
            Verdict::Good => ("ok  ", Paint::Green),
            Verdict::Note => ("note", Paint::Yellow),
            Verdict::Bad => ("BAD ", Paint::Red),
        };
        lines.push(format!("{} {:<12} {}", paint(color, tint, mark), check.name, check.text));
    }
    lines.join("\n")
}

fn processor() -> Check {
    let cores = available_parallelism().map_or(1, std::num::NonZero::get);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model.trim());
    Check::new("processor", Verdict::Good, format!("{model}, {cores} cores usable"))
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> Check {
    let has = [
        ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("FMA", std::arch::is_x86_feature_detected!("fma")),
    ];
    let names: Vec<&str> = has.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    if has[1].1 && has[2].1 {
        Check::new("vectors", Verdict::Good, names.join(", "))
    } else {
        Check::new("vectors", Verdict::Note, "no AVX2 with FMA: training works, several times slower")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> Check {
    Check::new("vectors", Verdict::Good, format!("those of {}", std::env::consts::ARCH))
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let read = |key: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    let (Some(total), Some(free)) = (read("MemTotal:"), read("MemAvailable:")) else {
        return Check::new("memory", Verdict::Note, "this system does not say");
    };
    let text = format!("{} available of {}", format::bytes(free), format::bytes(total));
    Check::new("memory", if free < LITTLE_MEMORY { Verdict::Note } else { Verdict::Good }, text)
}

/// Looks for the driver without loading it: loading runs its code, and a broken one may take the process along.
fn gpu() -> Check {
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|text| {
        text.lines().next().map(|line| line.trim_start_matches("NVRM version:").trim().to_owned())
    });
    match (driver, cuda_library()) {
        (Some(driver), Some(library)) => {
            Check::new("gpu", Verdict::Good, format!("{driver}; {}", library.display()))
        }
        (Some(driver), None) => {
            Check::new("gpu", Verdict::Note, format!("{driver}, but no libcuda.so.1: the CPU is used"))
        }
        (None, Some(library)) => Check::new(
            "gpu",
            Verdict::Note,
            format!("{}, but the kernel has no NVIDIA driver loaded: the CPU is used", library.display()),
        ),
        (None, None) => Check::new("gpu", Verdict::Good, "no NVIDIA driver: the CPU is used"),
    }
}

/// The first card, looked at and measured.
fn card() -> Option<Check> {
    cuda_library()?;
    Some(match cuda::survey(0) {
        Ok(found) => {
            let libraries: Vec<String> = found
                .libraries
                .iter()
                .map(|(name, version, file)| format!("{name} {version} ({file})"))
                .collect();
            let (total, free) = found.memory_bytes;
            let text = format!(
                "{} ({}), {} of {} free; driver for CUDA {}; {}; copies {:.0} GB/s, bf16 products {:.0} TFLOP/s",
                found.card,
                found.architecture,
                format::bytes(free),
                format::bytes(total),
                found.driver,
                libraries.join(", "),
                found.copy_bytes_per_second / 1e9,
                found.product_flops / 1e12
            );
            Check::new("card", Verdict::Good, text)
        }
        Err(error) => {
            let diagnostic = error.diagnostic();
            let hint = diagnostic.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            Check::new("card", Verdict::Note, format!("{error} ({}){hint}", diagnostic.code))
        }
    })
}

fn cuda_library() -> Option<PathBuf> {
    let from_environment = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = from_environment.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
    ];
    folders
        .chain(usual.map(PathBuf::from))
        .map(|folder| folder.join("libcuda.so.1"))
        .find(|library| library.exists())
}

fn disk(folder: &Path) -> Check {
    match rustix::fs::statvfs(folder) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            let text = format!("{} free for `{}`", format::bytes(free), folder.display());
            Check::new("disk", if free < LITTLE_DISK { Verdict::Note } else { Verdict::Good }, text)
        }
        Err(error) => Check::new("disk", Verdict::Bad, format!("`{}`: {error}", folder.display())),
    }
}

/// Asks the coordinator that is named, or tells of those that local runs left behind.
fn coordinator(named: Option<String>, identity: &Identity) -> CommandResult<Vec<Check>> {
    let named = named.into_iter().map(|address| (address, Verdict::Bad, identity.credentials()));
    let local = crate::client::Target::default().stores();
    let local = local
        .iter()
        .filter_map(|store| read_address(store))
        .map(|address| (address, Verdict::Note, Credentials::default()));
    let addresses: Vec<(String, Verdict, Credentials)> = named.chain(local).collect();
    block_on(async {
        let mut checks = Vec::new();
        for (address, verdict, credentials) in addresses {
            checks.push(match ask(&address, &credentials).await {
                Ok(jobs) => {
                    Check::new("coordinator", Verdict::Good, format!("{address} answers; {jobs} jobs"))
                }
                Err(reason) => Check::new("coordinator", verdict, reason),
            });
        }
        Ok(checks)
    })
}

async fn ask(address: &str, credentials: &Credentials) -> Result<usize, String> {
    let answer = async { Client::connect(address, credentials).await?.list().await }.await;
    let first = |failure: crate::failure::Failure| {
        failure.diagnostics().first().map_or_else(String::new, |first| first.message.clone())
    };
    answer.map(|jobs| jobs.len()).map_err(first)
}
