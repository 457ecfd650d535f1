//! What the environment says of this process's place, by the conventions of the engines that launch crews.

use crate::{Error, Result, hosts};

/// A program that launches many processes and tells each its place by environment variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// `torchrun`: `RANK`, `LOCAL_RANK`, `GROUP_RANK`, `MASTER_ADDR`.
    Torchrun,
    /// Slurm: `SLURM_*` of an allocation, and of a step where `srun` started the process.
    Slurm,
    /// A TrainJob of Kubeflow: `PET_*`.
    TrainJob,
    /// SkyPilot: `SKYPILOT_*`.
    SkyPilot,
    /// dstack: `DSTACK_*`.
    Dstack,
    /// An Indexed Job of Kubernetes, alone or in a JobSet: `JOB_COMPLETION_INDEX`.
    IndexedJob,
}

impl Engine {
    /// All, in the order in which they are looked for. What wraps another comes before it: `torchrun` may run within Slurm, a
    /// TrainJob's pods are those of an Indexed Job.
    pub const ALL: [Self; 6] =
        [Self::Torchrun, Self::Slurm, Self::TrainJob, Self::SkyPilot, Self::Dstack, Self::IndexedJob];

    /// Its name, for people and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Torchrun => "torchrun",
            Self::Slurm => "slurm",
            Self::TrainJob => "trainjob",
            Self::SkyPilot => "skypilot",
            Self::Dstack => "dstack",
            Self::IndexedJob => "kubernetes",
        }
    }

    /// The variable without which the convention does not hold.
    fn mark(self) -> &'static str {
        match self {
            Self::Torchrun => "TORCHELASTIC_RUN_ID",
            Self::Slurm => "SLURM_JOB_ID",
            Self::TrainJob => "PET_NNODES",
            Self::SkyPilot => "SKYPILOT_NODE_RANK",
            Self::Dstack => "DSTACK_NODE_RANK",
            Self::IndexedJob => "JOB_COMPLETION_INDEX",
        }
    }
}

/// Which of a host's devices are this process's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// All that it can see: it is alone on its host.
    All,
    /// One, by its number among those that it can see: the engine started a process for each.
    One(u32),
}

/// What the environment says of this process's place. All of it is absent where no engine launched it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Surroundings {
    /// Whose convention holds.
    pub engine: Option<Engine>,
    /// The engine's name of this launch: a job or run id.
    pub launch: Option<String>,
    /// This host's number among those of the launch, from 0.
    pub node: Option<u32>,
    /// How many hosts the launch has.
    pub nodes: Option<u32>,
    /// This process's number among those of the launch, from 0.
    pub process: Option<u32>,
    /// How many processes the launch has.
    pub processes: Option<u32>,
    /// This process's number among those of its host, from 0.
    pub local_process: Option<u32>,
    /// How many processes the engine started on this host.
    pub local_processes: Option<u32>,
    /// How often the engine has started the launch again.
    pub restarts: Option<u32>,
    /// The host where the coordinator is by the engine's custom: the first one.
    pub coordinator_host: Option<String>,
    /// How many devices the engine lets this process see, where it says so.
    pub visible_devices: Option<u32>,
    /// How many processors the engine gave this process, where it says so.
    pub processors: Option<u32>,
    /// The name that the engine gives this process's place, the same after a restart: a pod's.
    pub place: Option<String>,
}

impl Surroundings {
    /// Reads the convention that holds from `variable`, which gives the value of an environment variable. An empty value is
    /// none.
    ///
    /// # Errors
    /// A number that is none, or a list of hosts that cannot be expanded.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let environment = Environment { variable: &variable };
        let Some(engine) = Engine::ALL.into_iter().find(|engine| environment.text(engine.mark()).is_some())
        else {
            return Ok(Self::default());
        };
        let found = match engine {
            Engine::Torchrun => environment.torchrun(),
            Engine::Slurm => environment.slurm(),
            Engine::TrainJob => environment.train_job(),
            Engine::SkyPilot => environment.sky_pilot(),
            Engine::Dstack => environment.dstack(),
            Engine::IndexedJob => environment.indexed_job(),
        }?;
        Ok(Self { engine: Some(engine), visible_devices: environment.visible_devices(), ..found })
    }

    /// Reads the environment of this process.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn of_process() -> Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    /// Which devices of the host are this process's.
    pub fn devices(&self) -> Devices {
        match (self.local_process, self.local_processes) {
            // Where each process was given one device alone, that is number 0 to it.
            (Some(_), Some(processes)) if processes > 1 && self.visible_devices == Some(1) => Devices::One(0),
            (Some(process), Some(processes)) if processes > 1 => Devices::One(process),
            _ => Devices::All,
        }
    }

    /// The coordinator's URL by the engine's custom, at `port` of its host.
    ///
    /// The engine's own port (`MASTER_PORT`) is not taken: it belongs to torch's store.
    pub fn coordinator(&self, scheme: &str, port: u16) -> Option<String> {
        let host = self.coordinator_host.as_deref()?;
        // An IPv6 address stands in brackets in a URL.
        Some(match host.contains(':') {
            true => format!("{scheme}://[{host}]:{port}"),
            false => format!("{scheme}://{host}:{port}"),
        })
    }

    /// What this process is called, the same whenever the engine starts it again at its place: the pod's name, or the
    /// launch and the number within it. None where no engine launched it.
    ///
    /// Letters that a name may not have become `-`.
    pub fn name(&self) -> Option<String> {
        let engine = self.engine?;
        let own = self.place.clone().unwrap_or_else(|| {
            let launch = self.launch.as_deref().filter(|_| matches!(engine, Engine::Slurm | Engine::Dstack));
            let number = self.process.or(self.node);
            let parts =
                [Some(engine.name().to_owned()), launch.map(str::to_owned), number.map(|n| n.to_string())];
            parts.into_iter().flatten().collect::<Vec<_>>().join("-")
        });
        Some(plain(&own))
    }

    /// How many threads this process computes with, of `available` that the system lets it have.
    pub fn threads(&self, available: usize) -> usize {
        let share = match (self.processors, self.local_processes) {
            (Some(processors), _) => processors as usize,
            // torchrun binds nobody to processors: its processes share the host's.
            (None, Some(processes)) if self.engine == Some(Engine::Torchrun) => {
                available / processes.max(1) as usize
            }
            _ => available,
        };
        share.clamp(1, available.max(1))
    }

    /// Whether this process is the first of its launch: the one that starts what there must be one of.
    pub fn is_first(&self) -> bool {
        self.process.or(self.node).unwrap_or(0) == 0 && self.local_process.unwrap_or(0) == 0
    }
}

/// Environment variables, and what each convention makes of them.
struct Environment<'a, F> {
    variable: &'a F,
}

impl<F: Fn(&str) -> Option<String>> Environment<'_, F> {
    fn text(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.trim().is_empty())
    }

    fn number(&self, engine: Engine, name: &'static str) -> Result<Option<u32>> {
        let parse = |value: String| {
            value.trim().parse().map_err(|_| Error::Number { name, value, engine: engine.name() })
        };
        self.text(name).map(parse).transpose()
    }

    fn torchrun(&self) -> Result<Surroundings> {
        let number = |name| self.number(Engine::Torchrun, name);
        Ok(Surroundings {
            launch: self.text("TORCHELASTIC_RUN_ID"),
            node: number("GROUP_RANK")?,
            nodes: number("GROUP_WORLD_SIZE")?,
            process: number("RANK")?,
            processes: number("WORLD_SIZE")?,
            local_process: number("LOCAL_RANK")?,
            local_processes: number("LOCAL_WORLD_SIZE")?,
            restarts: number("TORCHELASTIC_RESTART_COUNT")?,
            coordinator_host: self.text("MASTER_ADDR"),
            ..Surroundings::default()
        })
    }

    fn slurm(&self) -> Result<Surroundings> {
        let number = |name| self.number(Engine::Slurm, name);
        let list = self.text("SLURM_JOB_NODELIST").or_else(|| self.text("SLURM_NODELIST"));
        let first = list.map(|list| hosts(&list)).transpose()?.and_then(|hosts| hosts.into_iter().next());
        // Without `srun` (in a batch script) there is a process a host at most, whatever tasks the allocation is for.
        let step = self.text("SLURM_STEP_ID").is_some() || self.text("SLURM_LOCALID").is_some();
        let nodes = match number("SLURM_JOB_NUM_NODES")? {
            Some(nodes) => Some(nodes),
            None => number("SLURM_NNODES")?,
        };
        let mut found = Surroundings {
            launch: self.text("SLURM_ARRAY_JOB_ID").or_else(|| self.text("SLURM_JOB_ID")),
            node: number("SLURM_NODEID")?,
            nodes,
            restarts: number("SLURM_RESTART_COUNT")?,
            processors: number("SLURM_CPUS_PER_TASK")?,
            coordinator_host: first,
            ..Surroundings::default()
        };
        if let (Some(task), Some(launch)) = (self.text("SLURM_ARRAY_TASK_ID"), &mut found.launch) {
            launch.push('_');
            launch.push_str(&task);
        }
        if step {
            found.process = number("SLURM_PROCID")?;
            found.processes = number("SLURM_NTASKS")?;
            found.local_process = number("SLURM_LOCALID")?;
            let tasks = self.text("SLURM_STEP_TASKS_PER_NODE").or_else(|| self.text("SLURM_TASKS_PER_NODE"));
            found.local_processes = tasks.and_then(|tasks| tasks_on(&tasks, found.node.unwrap_or(0)));
        }
        Ok(found)
    }

    fn train_job(&self) -> Result<Surroundings> {
        let number = |name| self.number(Engine::TrainJob, name);
        Ok(Surroundings {
            node: number("PET_NODE_RANK")?,
            nodes: number("PET_NNODES")?,
            coordinator_host: self.text("PET_MASTER_ADDR"),
            place: self.text("HOSTNAME"),
            ..Surroundings::default()
        })
    }

    fn sky_pilot(&self) -> Result<Surroundings> {
        let number = |name| self.number(Engine::SkyPilot, name);
        let addresses = self.text("SKYPILOT_NODE_IPS");
        Ok(Surroundings {
            launch: self.text("SKYPILOT_TASK_ID"),
            node: number("SKYPILOT_NODE_RANK")?,
            nodes: number("SKYPILOT_NUM_NODES")?,
            coordinator_host: addresses.and_then(|all| all.split_whitespace().next().map(str::to_owned)),
            ..Surroundings::default()
        })
    }

    fn dstack(&self) -> Result<Surroundings> {
        let number = |name| self.number(Engine::Dstack, name);
        Ok(Surroundings {
            launch: self.text("DSTACK_RUN_NAME"),
            node: number("DSTACK_NODE_RANK")?,
            nodes: number("DSTACK_NODES_NUM")?,
            coordinator_host: self.text("DSTACK_MASTER_NODE_IP"),
            ..Surroundings::default()
        })
    }

    /// Nothing here names the coordinator: the manifest has to. A pod's host name is its own; that of an Indexed Job ends in
    /// the index, and a pod that replaces another has it again.
    fn indexed_job(&self) -> Result<Surroundings> {
        Ok(Surroundings {
            node: self.number(Engine::IndexedJob, "JOB_COMPLETION_INDEX")?,
            place: self.text("HOSTNAME"),
            ..Surroundings::default()
        })
    }

    /// How many devices `CUDA_VISIBLE_DEVICES` names.
    fn visible_devices(&self) -> Option<u32> {
        let devices = self.text("CUDA_VISIBLE_DEVICES")?;
        u32::try_from(devices.split(',').filter(|device| !device.trim().is_empty()).count()).ok()
    }
}

/// A text as a worker may be called: letters, digits, `-`, `_` and `.`, at most 64, none but a letter or digit first.
fn plain(text: &str) -> String {
    let fits =
        |letter: char| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '-' };
    let fitting: String = text.chars().map(fits).collect();
    fitting.trim_start_matches(['-', '_', '.']).chars().take(64).collect()
}

/// Tasks on one node by Slurm's short form, `2(x3),1`: two on each of three nodes, then one.
fn tasks_on(tasks: &str, node: u32) -> Option<u32> {
    let mut before = 0u32;
    for part in tasks.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse::<u32>().ok()?),
            None => (part, 1),
        };
        before = before.checked_add(times)?;
        if node < before {
            return count.trim().parse().ok();
        }
    }
    None
}
