//! Manifests for Kubernetes: a coordinator that lasts, and a JobSet of the job and its workers.

use serde::Serialize;
use serde_json::json;

use super::{File, Job, template};
use crate::{Error, Result};

/// What the user says of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kubernetes {
    /// The container image.
    pub image: String,
    /// The namespace; the current one when absent.
    pub namespace: Option<String>,
    /// How many worker pods.
    pub workers: u32,
    /// GPUs of each.
    pub gpus: Option<u32>,
    /// Processors of each, as Kubernetes writes them.
    pub cpus: String,
    /// Memory of each, as Kubernetes writes it.
    pub memory: String,
    /// Shared memory of each, as Kubernetes writes it.
    pub shared_memory: String,
    /// A queue of Kueue.
    pub queue: Option<String>,
    /// Volumes that coordinator and workers share: base models, data, checkpoints.
    pub mounts: Vec<Mount>,
}

/// A claim, and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// The PersistentVolumeClaim.
    pub claim: String,
    /// The folder, absolute.
    pub path: String,
}

impl std::str::FromStr for Mount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some((claim, path)) if is_label(claim) && path.starts_with('/') => {
                Ok(Self { claim: claim.to_owned(), path: path.to_owned() })
            }
            _ => Err("must be CLAIM:/FOLDER".to_owned()),
        }
    }
}

/// Whether Kubernetes takes `text` for a name (RFC 1123).
fn is_label(text: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.chars().all(|letter| plain(letter) || letter == '-')
        && text.starts_with(plain)
        && text.ends_with(plain)
}

/// A quantity of Kubernetes: `500m`, `8`, `64Gi`.
fn is_quantity(text: &str) -> bool {
    let digits = text.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
    digits.len() < text.len() && ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"].contains(&digits)
}

impl Kubernetes {
    /// The manifests, in one file.
    ///
    /// # Errors
    /// [`Error::Unfit`] for names, numbers and quantities that Kubernetes would not take.
    pub fn render(&self, job: &Job) -> Result<File> {
        let name = self.check(job)?;
        let service = format!("{name}-coordinator");
        let host = match &self.namespace {
            Some(namespace) => format!("{service}-0.{service}.{namespace}.svc"),
            None => format!("{service}-0.{service}"),
        };
        let text = template::fill(
            "kubernetes",
            include_str!("../../templates/kubernetes.yaml"),
            json!({
                "name": name,
                "coordinator": format!("https://{host}:7461"),
                "host": host,
                "in_namespace": self.namespace.as_ref().map_or_else(String::new, |name| format!(" --namespace {name}")),
                "image": self.image,
                "workers": self.workers,
                "gpus": self.gpus,
                "cpus": self.cpus,
                "memory": self.memory,
                "shm": self.shared_memory,
                "queue": self.queue,
                "mounts": self.mounts,
                "sets": job.overrides,
                "job_block": template::block(&job.text, 4),
            }),
        )?;
        let text = match &self.namespace {
            Some(namespace) => in_namespace(&text, namespace),
            None => text,
        };
        Ok(File::text(format!("{name}.yaml"), text))
    }

    /// The job's name as Kubernetes takes it.
    fn check(&self, job: &Job) -> Result<String> {
        let unfit = |what, value: &str, rule: &str| {
            Err(Error::Unfit { what, value: format!("`{value}`"), rule: rule.to_owned() })
        };
        let name = job.name.to_lowercase().replace(['_', '.'], "-");
        // The longest name that is made of it: a pod's, `NAME-worker-0-12345-abcde`.
        if !is_label(&name) || name.len() > 40 {
            return unfit("name", &job.name, "must be at most 40 letters, digits and `-` for Kubernetes");
        }
        for (what, label) in [("--namespace", &self.namespace), ("--queue", &self.queue)] {
            if let Some(label) = label.as_ref().filter(|label| !is_label(label)) {
                return unfit(what, label, "must be lower-case letters, digits and `-`");
            }
        }
        let quantities =
            [("--cpus", &self.cpus), ("--memory", &self.memory), ("--shared-memory", &self.shared_memory)];
        for (what, quantity) in quantities {
            if !is_quantity(quantity) {
                return unfit(what, quantity, "must be as Kubernetes writes it, such as `8` or `64Gi`");
            }
        }
        if self.workers == 0 {
            return unfit("--nodes", "0", "must be at least 1");
        }
        Ok(name)
    }
}

/// Writes the namespace into the metadata of every object.
fn in_namespace(text: &str, namespace: &str) -> String {
    let line = |line: &str| match line {
        "metadata:" => format!("metadata:\n  namespace: {namespace}\n"),
        other => format!("{other}\n"),
    };
    text.lines().map(line).collect()
}
