//! The built program as a process: its JSON lines as they come, its exit, and `kill -9`.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::wait;

/// How long anything on the tiny model may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The built program, and where and how it is started.
#[derive(Debug, Clone)]
pub struct Shanty {
    program: PathBuf,
    folder: PathBuf,
    environment: Vec<(String, String)>,
}

impl Shanty {
    /// `program` is `env!("CARGO_BIN_EXE_shanty")`; it runs in `folder`.
    pub fn new(program: impl Into<PathBuf>, folder: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), folder: folder.into(), environment: Vec::new() }
    }

    /// Sets a variable for the process and its children.
    #[must_use]
    pub fn environment(mut self, key: &str, value: &str) -> Self {
        self.environment.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Another program in the same folder with the same variables.
    #[must_use]
    pub fn of(&self, program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), ..self.clone() }
    }

    /// Where the program runs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Starts the program.
    pub fn start(&self, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Running> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .current_dir(&self.folder)
            .env_remove("SHANTY_COORDINATOR")
            .env_remove("SHANTY_FAILPOINT")
            // Keys that coordinators leave for their user lie here, not in the home of whoever runs the tests.
            .env("XDG_STATE_HOME", std::env::temp_dir().join("shanty-tests"))
            .env("NO_COLOR", "1")
            .env("COLUMNS", "100")
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start `{}`", self.program.display()))?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().context("stdout is piped")?;
        let stderr = child.stderr.take().context("stderr is piped")?;
        let stdin = child.stdin.take();
        let sink = lines.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            // What can be read before the pipe breaks is what there is.
            let _ = BufReader::new(stderr).read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Running { child, stdin, lines, reader: Some(reader), errors: Some(errors) })
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Finished> {
        self.start(arguments)?.finish()
    }
}

/// A running process. Killed with all its children when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    errors: Option<JoinHandle<String>>,
}

/// A process that ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Process ids of its children, theirs, and so on.
    pub fn descendants(&self) -> Vec<u32> {
        descendants(self.pid())
    }

    /// The lines that it printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The JSON objects that it printed so far.
    pub fn events(&self) -> Vec<Value> {
        parse(&self.lines().join("\n"))
    }

    /// Waits for a printed JSON object.
    ///
    /// # Errors
    /// If it ended before, or nothing came in time.
    pub fn wait_for(&mut self, what: &str, accept: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let found = wait::until(what, PATIENCE, || {
            let over = self.child.try_wait()?.is_some();
            if over && let Some(reader) = self.reader.take() {
                // All is read once the reader is done.
                let _ = reader.join();
            }
            if let Some(event) = self.events().into_iter().find(|event| accept(event)) {
                return Ok(Some(event));
            }
            if over {
                bail!("the process ended while {what} was waited for");
            }
            Ok(None)
        });
        found.with_context(|| format!("printed so far:\n{}", self.lines().join("\n")))
    }

    /// Waits for the event of a step that is at least `step`.
    pub fn wait_for_step(&mut self, step: u64) -> anyhow::Result<Value> {
        self.wait_for(&format!("step {step}"), |event| {
            event["event"] == "step" && event["step"].as_u64() >= Some(step)
        })
    }

    /// Interrupts it, as Ctrl-C does.
    pub fn interrupt(&self) {
        signal(self.pid(), Signal::INT);
    }

    /// SIGTERM, as an orchestrator sends it before it takes a host away.
    pub fn terminate(&self) {
        signal(self.pid(), Signal::TERM);
    }

    /// `kill -9` of it and everything that it started.
    pub fn kill_all(mut self) -> anyhow::Result<Finished> {
        self.kill_tree();
        self.finish()
    }

    /// `kill -9` of it alone.
    pub fn kill(mut self) -> anyhow::Result<Finished> {
        self.child.kill()?;
        self.finish()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn finish(mut self) -> anyhow::Result<Finished> {
        let status = wait::until("the process to end", PATIENCE, || Ok(self.child.try_wait()?))
            .with_context(|| format!("printed so far:\n{}", self.lines().join("\n")))?;
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has read what it could.
            let _ = reader.join();
        }
        let stderr = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        Ok(Finished { status, stdout: self.lines().join("\n"), stderr })
    }

    fn kill_tree(&mut self) {
        // The parent first, so that it does not see its children die one by one.
        let descendants = self.descendants();
        let _ = self.child.kill();
        descendants.into_iter().for_each(kill_9);
        self.stdin = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill_tree();
            let _ = self.child.wait();
        }
    }
}

impl Finished {
    /// Its exit code; none if it was killed.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The JSON objects that it printed.
    pub fn events(&self) -> Vec<Value> {
        parse(&self.stdout)
    }

    /// The JSON objects of one kind of event.
    pub fn events_of(&self, kind: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["event"] == kind).collect()
    }

    /// Losses by step; of a step that came twice, the last.
    pub fn losses(&self) -> std::collections::BTreeMap<u64, f64> {
        let steps = self.events_of("step");
        steps.iter().filter_map(|event| Some((event["step"].as_u64()?, event["loss"].as_f64()?))).collect()
    }

    /// The one JSON object that a command printed.
    pub fn object(&self) -> anyhow::Result<Value> {
        serde_json::from_str(self.stdout.trim()).with_context(|| self.describe())
    }

    /// The error as scripts see it: one JSON object on stderr.
    pub fn error(&self) -> anyhow::Result<Value> {
        let last = self.stderr.trim().lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| self.describe())
    }

    /// Checks the exit code.
    ///
    /// # Errors
    /// With all that was said, if it is another.
    pub fn expect_code(self, code: i32) -> anyhow::Result<Self> {
        if self.code() == Some(code) {
            Ok(self)
        } else {
            bail!("expected exit code {code}: {}", self.describe())
        }
    }

    fn describe(&self) -> String {
        format!("{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// `kill -9`. A process that is gone already is no error.
pub fn kill_9(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Whether a process runs (and is no zombie).
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// Process ids of the children of `pid`, theirs, and so on.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut parents: Vec<(u32, u32)> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        parents.extend(stat(child).map(|(_, parent)| (child, parent)));
    }
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(child, _)| *child));
        next += 1;
    }
    found.split_off(1)
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows the last one does not.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // Gone already: then there is nothing to stop.
        let _ = kill_process(pid, signal);
    }
}

fn parse(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_as_they_come_and_the_whole_tree_is_killed() {
        let shell = Shanty::new("/bin/sh", "/");
        let script = r#"echo '{"event":"step","step":3,"loss":1.5}'; sleep 600 & wait"#;
        let mut running = shell.start(&["-c", script]).unwrap();
        running.wait_for_step(2).unwrap();
        let child =
            wait::until("the child", PATIENCE, || Ok(running.descendants().first().copied())).unwrap();
        assert!(is_alive(child));
        let finished = running.kill_all().unwrap();
        assert_eq!(finished.code(), None);
        assert_eq!(finished.losses().get(&3), Some(&1.5));
        wait::until("the child's death", PATIENCE, || Ok((!is_alive(child)).then_some(()))).unwrap();
    }

    #[test]
    fn a_process_that_ends_early_is_not_waited_for() {
        let mut running = Shanty::new("/bin/sh", "/").start(&["-c", "exit 3"]).unwrap();
        assert!(running.wait_for_step(1).is_err());
        assert_eq!(running.finish().unwrap().code(), Some(3));
    }
}
