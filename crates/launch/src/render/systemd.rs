//! Units for hosts that run a coordinator or a worker as a service.

use super::File;

const COORDINATOR_UNIT: &str = include_str!("../../../../deploy/systemd/shanty-coordinator.service");
const WORKER_UNIT: &str = include_str!("../../../../deploy/systemd/shanty-worker.service");
const COORDINATOR_FILE: &str = include_str!("../../../../deploy/systemd/coordinator.toml");
const WORKER_FILE: &str = include_str!("../../../../deploy/systemd/worker.toml");

/// What the user says of the hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Systemd {
    /// The program on the hosts.
    pub program: String,
    /// The coordinator's URL, where workers are on other hosts.
    pub coordinator: Option<String>,
}

impl Systemd {
    /// Both units and both files.
    pub fn render(&self) -> Vec<File> {
        let unit = |text: &str| text.replace("/usr/local/bin/shanty", &self.program);
        let worker = match &self.coordinator {
            Some(url) => WORKER_FILE
                .replace("coordinator = \"http://127.0.0.1:7461\"", &format!("coordinator = {url:?}")),
            None => WORKER_FILE.to_owned(),
        };
        vec![
            File::text("shanty-coordinator.service", unit(COORDINATOR_UNIT)),
            File::text("shanty-worker.service", unit(WORKER_UNIT)),
            File::text("coordinator.toml", COORDINATOR_FILE.to_owned()),
            File::text("worker.toml", worker),
        ]
    }
}
