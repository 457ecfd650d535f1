//! How a worker's file and the engine that launched the process together say what is run here.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use shanty_config::{Loaded, WorkerFile, job::Device, service::AUTO};
use shanty_launch::{Devices, Engine, Error, Surroundings};
use shanty_peft_core::backend::cuda;

/// The port that a coordinator has where nothing else is said.
const COORDINATOR_PORT: u16 = 7461;
/// Pause between two looks for a coordinator whose name nobody knows yet.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What a worker's process on this host does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launched {
    /// URL of the coordinator.
    pub(crate) coordinator: String,
    /// What the worker is called; its processes are then told apart by a suffix.
    pub(crate) name: Option<String>,
    /// Threads a process.
    pub(crate) threads: usize,
    /// Which of the host's devices are its own.
    pub(crate) devices: Devices,
}

impl Launched {
    /// Takes what the file, below variables, below flags says; what none of them says, from the engine.
    ///
    /// # Errors
    /// [`Error::NoCoordinator`] if an engine launched this and neither it nor a layer says where the coordinator is.
    pub(crate) fn of(
        file: &Loaded<WorkerFile>,
        found: &Surroundings,
        processors: usize,
    ) -> Result<Self, Error> {
        let worker = &file.value;
        let scheme = if worker.ca.is_some() || worker.cert.is_some() { "https" } else { "http" };
        let coordinator = match (file.names("coordinator"), found.coordinator(scheme, COORDINATOR_PORT)) {
            (false, Some(coordinator)) => coordinator,
            (false, None) if found.engine.is_some() => {
                return Err(Error::NoCoordinator { engine: found.engine.map_or("an engine", Engine::name) });
            }
            _ => worker.coordinator.clone(),
        };
        Ok(Self {
            coordinator,
            name: worker.name.clone().or_else(|| found.name()),
            threads: worker.threads.unwrap_or_else(|| found.threads(processors)),
            devices: found.devices(),
        })
    }

    /// The devices of this machine that the process works on, as a command line names them, each with the name of its worker.
    pub(crate) fn devices(&self, device: Device) -> Vec<(String, Option<String>)> {
        let own = match (self.devices, devices(device)) {
            (Devices::One(number), all) if all.len() > 1 => vec![format!("cuda:{number}")],
            (_, all) => all,
        };
        let several = own.len() > 1;
        let named = |(number, device)| {
            let name = self.name.as_ref().map(|name| match several {
                true => format!("{name}-{number}"),
                false => name.clone(),
            });
            (device, name)
        };
        own.into_iter().enumerate().map(named).collect()
    }
}

/// The devices of this machine that a worker works on, as a command line names them: its cards where the engine can use
/// them, else the CPU. A job for cards without a card gets one that the engine says is not there.
pub(crate) fn devices(device: Device) -> Vec<String> {
    let cards = || (0..cuda::cards().max(1)).map(|index| format!("cuda:{index}")).collect();
    match device {
        Device::Auto if cuda::is_available() => cards(),
        Device::Auto | Device::Cpu => vec!["cpu".to_owned()],
        Device::Cuda => cards(),
    }
}

/// The address to reach other workers by: as it is named, or else the one from which this machine reaches the coordinator.
/// None as long as nobody knows the coordinator's name.
pub(crate) fn bind_address(bind: &str, coordinator: &str) -> Option<String> {
    if bind != AUTO {
        return Some(bind.to_owned());
    }
    let url = url::Url::parse(coordinator).ok()?;
    let addresses = url.socket_addrs(|| None).ok()?;
    // Nothing is sent: the system only says which of its addresses it would send from.
    let from = |to: SocketAddr| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    addresses.into_iter().find_map(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &[(&str, &str)]) -> Surroundings {
        let value = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Surroundings::read(value).unwrap()
    }

    fn file(flags: &[(&str, &str)]) -> Loaded<WorkerFile> {
        let flags: Vec<_> =
            flags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        shanty_config::load_worker(None, &flags).unwrap()
    }

    const SLURM: [(&str, &str); 6] = [
        ("SLURM_JOB_ID", "17"),
        ("SLURM_JOB_NODELIST", "n[3-4]"),
        ("SLURM_PROCID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_CPUS_PER_TASK", "2"),
    ];

    #[test]
    fn what_is_said_wins_over_what_the_engine_does() {
        type Expected = (&'static str, Option<&'static str>, usize);
        type Variables = &'static [(&'static str, &'static str)];
        let cases: [(&str, Variables, Variables, Expected); 6] = [
            ("nothing is said", &[], &[], ("http://127.0.0.1:7461", None, 8)),
            ("an engine", &[], &SLURM, ("http://n3:7461", Some("slurm-17-1"), 2)),
            ("an authority", &[("ca", "ca.pem")], &SLURM, ("https://n3:7461", Some("slurm-17-1"), 2)),
            (
                "flags",
                &[("coordinator", "https://head:1"), ("name", "big"), ("threads", "5")],
                &SLURM,
                ("https://head:1", Some("big"), 5),
            ),
            (
                "a pod",
                &[("coordinator", "http://c:7461")],
                &[("JOB_COMPLETION_INDEX", "4"), ("HOSTNAME", "pirate-worker-0-4")],
                ("http://c:7461", Some("pirate-worker-0-4"), 8),
            ),
            (
                "the default, said aloud",
                &[("coordinator", "http://127.0.0.1:7461")],
                &SLURM,
                ("http://127.0.0.1:7461", Some("slurm-17-1"), 2),
            ),
        ];
        for (case, flags, variables, (coordinator, name, threads)) in cases {
            let launched = Launched::of(&file(flags), &found(variables), 8).unwrap();
            assert_eq!(launched.coordinator, coordinator, "{case}");
            assert_eq!((launched.name.as_deref(), launched.threads), (name, threads), "{case}");
        }
    }

    #[test]
    fn an_engine_that_does_not_say_where_the_coordinator_is_is_not_guessed_for() {
        let pod = found(&[("JOB_COMPLETION_INDEX", "4")]);
        assert_eq!(Launched::of(&file(&[]), &pod, 8).unwrap_err().code(), "SH0962");
    }

    #[test]
    fn others_reach_a_worker_where_it_reaches_the_coordinator() {
        assert_eq!(bind_address("auto", "http://127.0.0.1:7461").as_deref(), Some("127.0.0.1"));
        assert_eq!(bind_address("auto", "https://[::1]:7461").as_deref(), Some("::1"));
        assert_eq!(bind_address("10.0.0.1", "http://127.0.0.1:7461").as_deref(), Some("10.0.0.1"));
        assert_eq!(bind_address("auto", "http://no-such-host.invalid:7461"), None);
    }
}
