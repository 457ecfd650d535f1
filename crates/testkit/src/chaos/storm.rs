//! The faults, one after another.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use serde_json::Value;
use shanty_chaos::{Blow, Chance, Fault};

use super::{Options, Report, crew::Crew, history::History, sea::Sea};
use crate::{Shanty, rows};

/// How often processes are looked after.
const LOOK: Duration = Duration::from_millis(15);
/// How long a job may make no step while nothing strikes any more, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// A disk with more free than this is not filled.
const LARGEST_DISK: u64 = 256 << 20;

/// A fault that struck.
#[derive(Debug, Clone)]
pub(super) struct Strike {
    pub(super) unix_ms: u64,
    pub(super) fault: Fault,
    /// The job that ran, and the worker that was struck, if it was known.
    pub(super) job: String,
    pub(super) worker: Option<String>,
}

struct Storm<'a> {
    options: &'a Options,
    folder: &'a Path,
    crew: Crew,
    chance: Chance,
    blows: Vec<(Instant, Blow)>,
    strikes: Vec<Strike>,
    not_made: BTreeMap<&'static str, String>,
    disk: PathBuf,
}

/// Plays `options` in `folder`. `belongs` gives the rows of a step: rows of the data, step.
///
/// # Errors
/// If a job fails, stands still once nothing strikes any more, or anything cannot be started.
pub fn run(
    options: &Options,
    folder: &Path,
    belongs: &dyn Fn(u64, u64) -> Vec<u64>,
    say: &dyn Fn(&str),
) -> anyhow::Result<Report> {
    let began = Instant::now();
    options.job.write(folder)?;
    let plan = Shanty::new(&options.shanty, folder).run(&["plan", "job.toml", "--output", "json"])?;
    let train_rows = plan.expect_code(0)?.object()?["rows"].as_u64().context("the plan tells the rows")?;
    let undisturbed = undisturbed(options, folder)?;
    say(&format!("undisturbed: {} steps, final loss {undisturbed:.4}", options.job.steps));

    let disk = folder.join("sea");
    fs::create_dir_all(&disk)?;
    let sea = match options.sea.then(|| Sea::new(options.workers, &disk)).transpose() {
        Ok(sea) => sea,
        Err(error) => {
            say(&format!("no network namespaces and no small disk here: {error:#}"));
            None
        }
    };
    let crew = Crew::start(&options.shanty, folder, &disk.join("state"), options.workers, sea)?;
    let mut storm = Storm {
        options,
        folder,
        crew,
        chance: Chance::new(options.seed),
        blows: Vec::new(),
        strikes: Vec::new(),
        not_made: BTreeMap::new(),
        disk: disk.clone(),
    };
    let mut jobs = Vec::new();
    let mut loss_difference: f64 = 0.0;
    let mut counts = rows::Counts::default();
    while jobs.is_empty() || (storm.strikes.len() as u64) < options.faults {
        let job = format!("chaos-{}", jobs.len() + 1);
        if let Err(error) = storm.play(&job, say) {
            let status = storm.status(&job);
            let words = storm.crew.last_words.join("\n");
            // The small disk goes with the namespaces: what lies on it is kept for whoever looks into it.
            drop(std::mem::take(&mut storm.blows));
            crate::fixtures::copy_folder(&disk, &folder.join("kept"))?;
            return Err(error.context(format!("status: {status:?}\n{words}")));
        }
        jobs.push(job.clone());
        let of_job = rows::count(&disk.join(&job), options.job.steps, |step| belongs(train_rows, step))?;
        say(&format!("{job}: {of_job:?}, {} faults so far", storm.strikes.len()));
        counts.add(&of_job);
    }
    for words in &storm.crew.last_words {
        say(words);
    }
    let (unexplained_exits, strikes) = (storm.crew.unexplained_exits, std::mem::take(&mut storm.strikes));
    let not_made: Vec<&'static str> = storm.not_made.keys().copied().collect();
    for (kind, reason) in &storm.not_made {
        say(&format!("{kind} was not made: {reason}"));
    }
    drop(std::mem::take(&mut storm.blows));
    let sea = storm.crew.end()?;
    let history = History::read(&disk.join("state"), &jobs)?;
    for job in &jobs {
        let last =
            history.final_loss(job, options.job.steps).with_context(|| format!("{job} has no last step"))?;
        loss_difference = loss_difference.max((last - undisturbed).abs());
    }
    drop(sea);
    let mut report = history.report(&strikes);
    report.loss_difference = loss_difference;
    (report.steps_lost, report.duplicates, report.omissions) =
        (counts.steps_lost, counts.duplicates, counts.omissions);
    report.jobs = jobs.len() as u64;
    report.steps = report.jobs * options.job.steps;
    report.unexplained_exits = unexplained_exits;
    report.not_made = not_made;
    report.seconds = began.elapsed().as_secs_f64();
    report.seed = options.seed;
    Ok(report)
}

/// The final loss of the same job that nothing strikes.
fn undisturbed(options: &Options, folder: &Path) -> anyhow::Result<f64> {
    let workers = options.job.workers.1.to_string();
    let arguments = ["run", "job.toml", "--workers", &workers, "--threads", "1", "--output", "json"];
    let mut running = Shanty::new(&options.shanty, folder).start(&arguments)?;
    let mut last = (0, Instant::now());
    while !running.has_ended() {
        let step = running.events().iter().filter_map(|event| event["step"].as_u64()).max().unwrap_or(0);
        if step > last.0 {
            last = (step, Instant::now());
        } else if last.1.elapsed() > PATIENCE {
            bail!("the undisturbed run stands still after step {step}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let finished = running.finish()?.expect_code(0)?;
    finished.losses().last_entry().map(|entry| *entry.get()).context("no step was printed")
}

impl Storm<'_> {
    /// One job from submission to its end, struck until there were enough faults.
    fn play(&mut self, job: &str, say: &dyn Fn(&str)) -> anyhow::Result<()> {
        let name = format!("name = \"{}\"", self.options.job.name);
        let store = format!("[checkpoint]\nstore = \"sea/{job}\"");
        let text = self.options.job.toml().replace(&name, &format!("name = \"{job}\""));
        let file = self.folder.join(format!("{job}.toml"));
        fs::write(&file, text.replace("[checkpoint]", &store))?;
        let path = file.to_str().context("the job's path is text")?.to_owned();
        self.until("the job to be taken", |storm| storm.crew.ask(&["submit", &path]))?;
        self.until("the first step", |storm| {
            storm.status(job).filter(|status| status["step"].as_u64() > Some(0))
        })?;
        let mut next = Instant::now() + self.chance.pause(self.options.pause);
        let mut looked = Instant::now();
        let mut progress = (0, Instant::now());
        loop {
            self.look()?;
            let enough = self.strikes.len() as u64 >= self.options.faults;
            if !enough && Instant::now() >= next {
                let status = self.status(job);
                if ended(&status)? {
                    return Ok(());
                }
                self.strike(job, status.as_ref());
                next = Instant::now() + self.chance.pause(self.options.pause);
                let count = self.strikes.len();
                if count.is_multiple_of(50) {
                    let step = status.map(|status| status["step"].clone());
                    say(&format!("{count} faults; {job} at step {step:?}"));
                }
            }
            if looked.elapsed() > Duration::from_secs(1) {
                looked = Instant::now();
                let status = self.status(job);
                if ended(&status)? {
                    return Ok(());
                }
                let step = status.as_ref().and_then(|status| status["step"].as_u64()).unwrap_or(0);
                if step > progress.0 || !(enough && self.blows.is_empty()) {
                    progress = (step.max(progress.0), Instant::now());
                } else if progress.1.elapsed() > PATIENCE {
                    bail!("{job} stands still though nothing strikes any more: {status:?}");
                }
            }
        }
    }

    fn status(&self, job: &str) -> Option<Value> {
        self.crew.ask(&["status", job])
    }

    /// Looks after processes, and undoes what has lasted long enough.
    fn look(&mut self) -> anyhow::Result<()> {
        std::thread::sleep(LOOK);
        let now = Instant::now();
        let (due, lasting) =
            std::mem::take(&mut self.blows).into_iter().partition(|(until, _)| *until <= now);
        self.blows = lasting;
        let due: Vec<(Instant, Blow)> = due;
        for (_, blow) in due {
            blow.heal()?;
        }
        self.crew.tend()
    }

    fn until<T>(&mut self, what: &str, look: impl Fn(&Self) -> Option<T>) -> anyhow::Result<T> {
        let start = Instant::now();
        loop {
            self.look()?;
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if start.elapsed() > PATIENCE {
                bail!("waited {PATIENCE:?} in vain for {what}; {}", self.crew.last_words.join("; "));
            }
        }
    }

    fn strike(&mut self, job: &str, status: Option<&Value>) {
        let fault = self.choose();
        let pick = self.victim(status);
        let unix_ms = now_unix_ms();
        let outcome = match (fault, pick) {
            (Fault::Coordinator, _) => self.strike_coordinator(),
            (Fault::DiskFull, _) => self.last(1.5, |storm| shanty_chaos::fill(&storm.disk, LARGEST_DISK)),
            (_, None) => return,
            (Fault::Kill, Some((pid, _))) => {
                self.crew.struck.insert(pid);
                shanty_chaos::kill(pid)
            }
            (Fault::Stop, Some((pid, _))) => self.last(6.0, |_| shanty_chaos::stop(pid)),
            (Fault::Slow, Some((pid, _))) => self.last(4.0, |_| shanty_chaos::slow(pid, 0.2)),
            (Fault::Partition, Some((pid, _))) => self.last(6.0, |_| shanty_chaos::partition(pid)),
        };
        let worker = pick.and_then(|(pid, _)| worker_of(status?, pid)).filter(|_| fault.strikes_a_worker());
        let line = format!("{unix_ms} {} {worker:?} {outcome:?}\n", fault.as_str());
        // A log for people; the report does not depend on it.
        let file = fs::File::options().create(true).append(true).open(self.folder.join("strikes.log"));
        let _ = file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
        match outcome {
            Ok(()) => self.strikes.push(Strike { unix_ms, fault, job: job.to_owned(), worker }),
            Err(error) => drop(self.not_made.insert(fault.as_str(), error.to_string())),
        }
    }

    /// A fault that lasts for a random time up to some seconds.
    fn last(
        &mut self,
        seconds: f64,
        make: impl FnOnce(&Self) -> shanty_chaos::Result<Blow>,
    ) -> shanty_chaos::Result<()> {
        let time = self.chance.between(0.1, seconds);
        let blow = make(self)?;
        self.blows.push((Instant::now() + time, blow));
        Ok(())
    }

    fn strike_coordinator(&mut self) -> shanty_chaos::Result<()> {
        if let Some(pid) = self.crew.coordinator() {
            self.crew.struck.insert(pid);
            shanty_chaos::kill(pid)?;
        }
        Ok(())
    }

    fn choose(&mut self) -> Fault {
        let total: u32 = self.options.kinds.iter().map(|(_, weight)| weight).sum();
        let mut at = self.chance.below(total as usize) as u32;
        for (fault, weight) in &self.options.kinds {
            if at < *weight {
                return *fault;
            }
            at -= weight;
        }
        Fault::Kill
    }

    /// A device process to strike, preferably a member's; never the only one that lives.
    fn victim(&mut self, status: Option<&Value>) -> Option<(u32, bool)> {
        let devices = self.crew.devices();
        if devices.len() < 2 {
            return None;
        }
        let is_member = |pid: &u32| {
            let members = status.and_then(|status| status["members"].as_array());
            members.is_some_and(|members| {
                members.iter().any(|member| member["pid"] == *pid && member["rank"].is_u64())
            })
        };
        let members: Vec<u32> = devices.iter().copied().filter(is_member).collect();
        // What is promised holds while one member lives.
        let strangers: Vec<u32> = devices.iter().copied().filter(|pid| !members.contains(pid)).collect();
        let from = match members.len() {
            0 => &devices,
            1 => &strangers,
            _ => &members,
        };
        if from.is_empty() {
            return None;
        }
        let pid = from[self.chance.below(from.len())];
        Some((pid, !members.is_empty()))
    }
}

fn worker_of(status: &Value, pid: u32) -> Option<String> {
    let members = status["members"].as_array()?;
    let member = members.iter().find(|member| member["pid"] == pid)?;
    let id = member.get("worker").or_else(|| member.get("worker_id"))?;
    Some(id.as_str()?.to_owned())
}

/// Whether a job ended well.
fn ended(status: &Option<Value>) -> anyhow::Result<bool> {
    let Some(status) = status else { return Ok(false) };
    match status["state"].as_str() {
        Some("succeeded") => Ok(true),
        Some("failed" | "cancelled") => bail!("the job ended: {status}"),
        _ => Ok(false),
    }
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
