//! The flags that describe a cluster, and the files that `render` and `submit --engine` make of them.

use std::path::{Path, PathBuf, absolute};

use clap::ValueEnum;
use shanty_config::{JobSpec, Loaded, job::Device};
use shanty_launch::{
    Error,
    render::{Compose, File, Job, Kubernetes, Mount, Outside, Slurm, Systemd},
};

use crate::{
    client::Target,
    error::Error as CliError,
    failure::CommandResult,
    job_file::{JobFile, store_of},
};

/// The image that files name where no other is.
const IMAGE: &str = concat!("ghcr.io/shanty-train/shanty:", env!("CARGO_PKG_VERSION"));

/// What launches a crew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// A batch script for sbatch
    Slurm,
    /// A coordinator, and a JobSet of the job and its workers
    Kubernetes,
    /// A compose file for containers on one host
    Compose,
    /// Units of a coordinator and of a worker, with their files
    Systemd,
}

/// What files need to know of the cluster.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterFlags {
    /// Nodes (Slurm; also from some to others, as 1-4), worker pods or containers
    #[arg(long, value_name = "N", default_value = "1")]
    nodes: String,
    /// GPUs of each
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,
    /// Processors of each
    #[arg(long, value_name = "N")]
    cpus: Option<String>,
    /// Memory of each, as the engine writes it: 64G, 64Gi
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Slurm: the time limit, as 04:00:00
    #[arg(long, value_name = "TIME")]
    time: Option<String>,
    /// Slurm: tasks of an array, as 0-7%2; {task} in --set stands for the number, and each has a store of its own
    #[arg(long, value_name = "TASKS")]
    array: Option<String>,
    /// Slurm: one more option of sbatch, as --partition=gpu; may be given many times
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// Slurm: how long before the time limit workers are asked to end, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    grace: u32,
    /// Slurm: end after that, instead of going on in a new allocation
    #[arg(long)]
    no_requeue: bool,
    /// Slurm: run in a container: a file of Apptainer (….sif), or an image for Pyxis
    #[arg(long, value_name = "IMAGE")]
    container: Option<String>,
    /// The program on the nodes; this one when absent
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Kubernetes, compose: the container image
    #[arg(long, value_name = "IMAGE", default_value = IMAGE)]
    image: String,
    /// Kubernetes: the namespace
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Kubernetes: the queue of Kueue that lets the job in
    #[arg(long, value_name = "NAME")]
    queue: Option<String>,
    /// Kubernetes: a volume that all pods share, for base, data and checkpoints; may be given many times
    #[arg(long = "volume", value_name = "CLAIM:/FOLDER")]
    volumes: Vec<Mount>,
}

impl ClusterFlags {
    /// The files of one engine.
    pub(crate) fn render(
        &self,
        engine: Engine,
        job: Option<&Described>,
        target: &Target,
    ) -> CommandResult<Vec<File>> {
        if engine == Engine::Systemd {
            let program = self.program.clone().unwrap_or_else(|| "/usr/local/bin/shanty".into());
            let systemd =
                Systemd { program: program.display().to_string(), coordinator: target.coordinator.clone() };
            return Ok(systemd.render());
        }
        let job = job.ok_or_else(|| CliError::Usage {
            message: "no job file is given".to_owned(),
            hint: "say `shanty render --engine … JOB.toml`; --engine systemd alone needs none".to_owned(),
        })?;
        Ok(vec![match engine {
            Engine::Slurm => self.slurm(job, target)?.render(&job.job)?,
            Engine::Kubernetes => self.kubernetes(job)?.render(&job.job)?,
            Engine::Compose | Engine::Systemd => self.compose(job)?.render(&job.job)?,
        }])
    }

    /// The folder of a job's state on Slurm; in an array that of its first task.
    pub(crate) fn folder_of_task(&self, folder: &Path) -> PathBuf {
        let first = |array: &String| array.split([',', '-', ':', '%']).next().unwrap_or_default().to_owned();
        self.array.as_ref().map_or_else(|| folder.to_owned(), |array| folder.join(first(array)))
    }

    fn slurm(&self, job: &Described, target: &Target) -> CommandResult<Slurm> {
        let program = match (&self.program, &self.container) {
            (Some(program), _) => program.clone(),
            (None, Some(image)) if image.ends_with(".sif") => "shanty".into(),
            (None, _) => {
                std::env::current_exe().map_err(|source| CliError::Start { what: "a worker", source })?
            }
        };
        let cpus = self.cpus.as_deref().map(|text| number("--cpus", text)).transpose()?;
        let device = match job.device {
            Device::Cpu => Some("cpu"),
            Device::Cuda => Some("cuda"),
            Device::Auto => self.gpus.is_some().then_some("cuda"),
        };
        let worker = device.map(|device| vec!["--device".to_owned(), device.to_owned()]).unwrap_or_default();
        let full = |path: &Option<PathBuf>| path.as_deref().map(full_path);
        let identity = &target.identity;
        let outside = target.coordinator.as_ref().map(|coordinator| Outside {
            coordinator: coordinator.clone(),
            ca: full(&identity.ca),
            token_file: full(&identity.token_file),
            certificate: full(&identity.cert).zip(full(&identity.key)),
        });
        Ok(Slurm {
            program,
            nodes: self.nodes.clone(),
            gpus: self.gpus,
            cpus,
            memory: self.memory.clone(),
            time: self.time.clone(),
            array: self.array.clone(),
            lines: self.sbatch.clone(),
            requeue: !self.no_requeue,
            grace: self.grace,
            container: self.container.clone(),
            worker,
            outside,
        })
    }

    fn kubernetes(&self, job: &Described) -> CommandResult<Kubernetes> {
        for (key, path) in &job.paths {
            if !self.volumes.iter().any(|mount| Path::new(path).starts_with(&mount.path)) {
                return Err(Error::Unfit {
                    what: key,
                    value: format!("`{path}`"),
                    rule: "must be a URL, a name of the hub, or below a volume of the pods: `--volume CLAIM:/FOLDER`"
                        .to_owned(),
                }
                .into());
            }
        }
        let gpus = self.gpus;
        let or = |given: &Option<String>, with: &str, without: &str| {
            given.clone().unwrap_or_else(|| if gpus.is_some() { with } else { without }.to_owned())
        };
        Ok(Kubernetes {
            image: self.image.clone(),
            namespace: self.namespace.clone(),
            workers: number("--nodes", &self.nodes)?,
            gpus,
            cpus: or(&self.cpus, "8", "2"),
            memory: or(&self.memory, "64Gi", "4Gi"),
            shared_memory: if gpus.is_some() { "16Gi" } else { "1Gi" }.to_owned(),
            queue: self.queue.clone(),
            mounts: self.volumes.clone(),
        })
    }

    fn compose(&self, job: &Described) -> CommandResult<Compose> {
        let mut folders: Vec<String> = Vec::new();
        let own = job.job.file.parent().map(|folder| folder.display().to_string());
        let others = job.paths.iter().map(|(key, path)| match *key {
            // A folder that is not there yet is made within the one above it.
            "checkpoint.store" | "data.train" | "data.eval" => {
                Path::new(path).parent().unwrap_or(Path::new("/")).display().to_string()
            }
            _ => path.clone(),
        });
        for folder in own.into_iter().chain(others) {
            if !folders.iter().any(|known| Path::new(&folder).starts_with(known)) {
                folders.retain(|known| !Path::new(known).starts_with(&folder));
                folders.push(folder);
            }
        }
        Ok(Compose {
            image: self.image.clone(),
            workers: number("--nodes", &self.nodes)?,
            gpus: self.gpus,
            user: owner_of(&job.job.file),
            folders,
        })
    }
}

/// User and group that own a file, as numbers.
fn owner_of(file: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).map_or_else(
        |_| "10001:10001".to_owned(),
        |metadata| format!("{}:{}", metadata.uid(), metadata.gid()),
    )
}

fn number(what: &'static str, text: &str) -> Result<u32, Error> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| Error::Unfit {
        what,
        value: format!("`{text}`"),
        rule: "must be a number, at least 1".to_owned(),
    })
}

fn full_path(path: &Path) -> PathBuf {
    absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A job as the files need it.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) job: Job,
    device: Device,
    /// The folders and files that it names on the machines, with their keys.
    paths: Vec<(&'static str, String)>,
}

impl Described {
    /// Of a job that was read.
    pub(crate) fn of(file: &JobFile, spec: &Loaded<JobSpec>) -> CommandResult<Self> {
        let text = std::fs::read_to_string(&file.job).map_err(|source| CliError::File {
            action: "read",
            path: file.job.clone(),
            source,
        })?;
        let value = &spec.value;
        let store = value.checkpoint.location(&value.name);
        let mut paths = Vec::new();
        let is_path = |text: &str| !text.contains("://");
        if shanty_remote::hub::ModelId::parse(&value.base.model).is_none() {
            paths.push(("base.model", full_path(&value.base.model).display().to_string()));
        }
        paths.extend(value.data.train.sources().into_iter().map(|source| ("data.train", source.path)));
        paths.extend(value.data.eval.iter().map(|eval| ("data.eval", eval.clone())));
        let store_path =
            if is_path(&store) { full_path(Path::new(&store)).display().to_string() } else { store };
        paths.push(("checkpoint.store", store_path.clone()));
        paths.retain(|(_, path)| is_path(path));
        Ok(Self {
            job: Job {
                name: value.name.clone(),
                file: full_path(&file.job),
                text,
                overrides: file.set.clone(),
                store: store_path,
                folder: full_path(&store_of(value)),
            },
            device: value.cluster.device,
            paths,
        })
    }
}
