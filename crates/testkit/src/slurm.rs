//! A Slurm of one's own: several nodes on this machine, by the real programs, with keys, ports and folders of their own.
//!
//! Where Slurm or munge is not installed, tests are skipped aloud; where `SHANTY_REQUIRE_SLURM` is set,
//! they fail.

use std::{
    env, fs,
    io::Read,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{process::PATIENCE, wait};

/// Programs that must be there, as Debian's `slurm-wlm` and `munge` bring them.
const PROGRAMS: [&str; 5] = ["munged", "slurmctld", "slurmd", "sbatch", "srun"];

/// A controller and its nodes. All are stopped when it is dropped.
#[derive(Debug)]
pub struct Slurm {
    folder: PathBuf,
    /// In the order in which they started.
    daemons: Vec<Child>,
}

impl Slurm {
    /// Starts `nodes` nodes (`n1`, `n2`, …) below `folder`; nothing where Slurm is not installed.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    pub fn start(folder: &Path, nodes: usize) -> anyhow::Result<Option<Self>> {
        let missing: Vec<&str> = PROGRAMS.into_iter().filter(|program| find(program).is_none()).collect();
        if !missing.is_empty() {
            anyhow::ensure!(
                env::var_os("SHANTY_REQUIRE_SLURM").is_none(),
                "SHANTY_REQUIRE_SLURM is set, and not installed: {missing:?}"
            );
            eprintln!("SKIPPED: not installed: {missing:?} (Debian's slurm-wlm and munge)");
            return Ok(None);
        }
        fs::create_dir_all(folder)?;
        let mut slurm = Self { folder: folder.to_owned(), daemons: Vec::new() };
        slurm.start_munge()?;
        fs::write(slurm.conf(), slurm.configuration(nodes)?)?;
        fs::create_dir_all(folder.join("state"))?;
        let conf = slurm.conf().display().to_string();
        slurm.daemon("slurmctld", &["-D", "-c", "-f", &conf])?;
        for node in 1..=nodes {
            fs::create_dir_all(folder.join(format!("spool-n{node}")))?;
            slurm.daemon("slurmd", &["-D", "-f", &conf, "-N", &format!("n{node}")])?;
        }
        let ready = wait::until("Slurm's nodes to be idle", PATIENCE, || {
            let states = slurm.ask("sinfo", &["--noheader", "--Node", "--format=%T"]).unwrap_or_default();
            Ok((states.lines().filter(|state| *state == "idle").count() == nodes).then_some(()))
        });
        ready.with_context(|| slurm.logs())?;
        Ok(Some(slurm))
    }

    /// Slurm's configuration file, for `SLURM_CONF`.
    pub fn conf(&self) -> PathBuf {
        self.folder.join("slurm.conf")
    }

    /// `PATH` with the programs on it.
    pub fn path() -> String {
        format!("{}:/usr/sbin:/usr/local/sbin", env::var("PATH").unwrap_or_default())
    }

    /// Runs one of Slurm's commands; gives what it prints.
    pub fn ask(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(find(program).context("it is installed")?)
            .args(arguments)
            .env("SLURM_CONF", self.conf())
            .env("PATH", Self::path())
            .output()?;
        if !output.status.success() {
            bail!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// One field of what `scontrol show job` says: `JobState`, `ExitCode`, `Restarts`, `NodeList`, …
    pub fn job(&self, id: &str, field: &str) -> anyhow::Result<String> {
        let text = self.ask("scontrol", &["show", "job", id])?;
        let value = text.split_whitespace().find_map(|word| word.strip_prefix(&format!("{field}=")));
        Ok(value.with_context(|| format!("no `{field}` in:\n{text}"))?.to_owned())
    }

    /// Waits for a field of a job to be as wanted.
    pub fn wait_for_job(
        &self,
        id: &str,
        field: &str,
        wanted: &[&str],
        limit: Duration,
    ) -> anyhow::Result<String> {
        wait::until(&format!("{field} of Slurm's job {id} to be one of {wanted:?}"), limit, || {
            Ok(self.job(id, field).ok().filter(|value| wanted.contains(&value.as_str())))
        })
        .with_context(|| self.ask("scontrol", &["show", "job", id]).unwrap_or_default())
    }

    /// The last lines of all daemons' logs.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(30)..].join("\n");
                all.push_str(&format!("--- {}\n{last}\n", entry.path().display()));
            }
        }
        all
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("munge.socket")
    }

    fn start_munge(&mut self) -> anyhow::Result<()> {
        let key = self.folder.join("munge.key");
        let mut secret = [0u8; 128];
        fs::File::open("/dev/urandom")?.read_exact(&mut secret)?;
        fs::write(&key, secret)?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        let flag = |name: &str, file: &str| format!("--{name}={}", self.folder.join(file).display());
        let flags = [
            flag("socket", "munge.socket"),
            flag("key-file", "munge.key"),
            flag("pid-file", "munge.pid"),
            flag("seed-file", "munge.seed"),
            flag("log-file", "munged.log"),
        ];
        let mut arguments = vec!["--foreground", "--force"];
        arguments.extend(flags.iter().map(String::as_str));
        self.daemon("munged", &arguments)?;
        wait::until("munge's socket", PATIENCE, || Ok(self.socket().exists().then_some(())))
    }

    fn configuration(&self, nodes: usize) -> anyhow::Result<String> {
        let host = fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned();
        let user = String::from_utf8(Command::new("id").arg("-un").output()?.stdout)?.trim().to_owned();
        let folder = self.folder.display();
        let ports = free_ports(nodes + 1)?;
        // Ids differ from cluster to cluster, as ports do that are made of them.
        let mut text = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\n\
             AuthType=auth/munge\nCryptoType=crypto/munge\nAuthInfo=socket={socket},cred_expire=5\n\
             SlurmctldPort={port}\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n\n\
             SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n\
             SchedulerType=sched/backfill\nSchedulerParameters=bf_interval=1,sched_interval=1\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSlurmdParameters=config_overrides\n\
             ReturnToService=2\nKillWait=5\nMinJobAge=600\nJobRequeue=1\nFirstJobId={port}\n",
            socket = self.socket().display(),
            port = ports[0],
        );
        for (node, port) in ports.iter().enumerate().skip(1) {
            text.push_str(&format!(
                "NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN\n"
            ));
        }
        text.push_str(&format!(
            "PartitionName=all Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP\n"
        ));
        Ok(text)
    }

    fn daemon(&mut self, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let log = fs::File::create(self.folder.join(format!("{program}-{}.log", self.daemons.len())))?;
        let child = Command::new(find(program).context("it is installed")?)
            .args(arguments)
            .env("SLURM_CONF", self.conf())
            .env("PATH", Self::path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("failed to start {program}"))?;
        self.daemons.push(child);
        Ok(())
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // Jobs first: their processes are children of steps, which would outlive the daemons.
        let _ = self.ask("scancel", &["--signal=KILL", "--full", "--state=RUNNING"]);
        let _ = self.ask("scancel", &["--partition=all"]);
        let _ = wait::until("Slurm's jobs to end", Duration::from_secs(20), || {
            let left = self.ask("squeue", &["--noheader"]).unwrap_or_default();
            Ok(left.trim().is_empty().then_some(()))
        });
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Where a program lies.
fn find(program: &str) -> Option<PathBuf> {
    Slurm::path().split(':').map(|folder| Path::new(folder).join(program)).find(|path| path.is_file())
}

/// Ports that nobody listens on.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    // All at once, so that none comes twice.
    let listeners: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}
