//! `cluster.toml`: plain hosts that are reached by ssh, and what is started on each.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{Error, Result, render::quote};

/// The hosts of a crew and how they are reached.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// URL of the coordinator, as the hosts reach it.
    pub coordinator: String,
    /// The authority that it is known by: a file on this machine, whose content is sent along.
    pub ca: Option<PathBuf>,
    /// The file of the workers' token on this machine; it is sent over the encrypted connection, and stands in no argument.
    pub token_file: Option<PathBuf>,
    /// How hosts are reached.
    #[serde(default)]
    pub ssh: Ssh,
    /// What is started on each host, where it says nothing else.
    #[serde(default)]
    pub worker: Worker,
    /// The hosts.
    #[serde(rename = "host")]
    pub hosts: Vec<Host>,
}

/// `[ssh]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ssh {
    /// The user there; ssh's own choice when absent.
    pub user: Option<String>,
    /// The port; ssh's own choice when absent.
    pub port: Option<u16>,
    /// The key to show; ssh's own choice when absent.
    pub identity_file: Option<PathBuf>,
    /// More options, as behind `ssh -o`: `ProxyJump=login`.
    pub options: Vec<String>,
}

/// `[worker]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Worker {
    /// The program on the hosts.
    pub program: String,
    /// The folder on the hosts where it runs: logs and what is being received lie below it.
    pub folder: String,
    /// More flags of `shanty worker`: `["--device", "cuda"]`.
    pub flags: Vec<String>,
}

impl Default for Worker {
    fn default() -> Self {
        Self { program: "shanty".to_owned(), folder: ".shanty".to_owned(), flags: Vec::new() }
    }
}

/// `[[host]]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Name or address, as ssh takes it.
    pub address: String,
    /// What its worker is called; the address when absent.
    pub name: Option<String>,
    /// The user there, if another than in `[ssh]`.
    pub user: Option<String>,
    /// The port, if another than in `[ssh]`.
    pub port: Option<u16>,
    /// The program there, if another than in `[worker]`.
    pub program: Option<String>,
    /// The folder there, if another than in `[worker]`.
    pub folder: Option<String>,
    /// Flags of `shanty worker`, beside those of `[worker]`.
    #[serde(default)]
    pub flags: Vec<String>,
}

impl Host {
    /// What its worker is called.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.address)
    }
}

impl ClusterFile {
    /// Reads a file. Paths in it count from its folder.
    ///
    /// # Errors
    /// [`Error::ClusterFile`], with the line.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::ClusterFile { file: path.display().to_string(), reason };
        let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let mut file: Self =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for named in [&mut file.ca, &mut file.token_file, &mut file.ssh.identity_file].into_iter().flatten() {
            *named = folder.join(&*named);
        }
        file.check().map_err(wrong)?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        if self.hosts.is_empty() {
            return Err("it names no host: write `[[host]]` and an `address` for each".to_owned());
        }
        let mut names = BTreeSet::new();
        for host in &self.hosts {
            if host.address.is_empty() || host.address.starts_with('-') {
                return Err(format!("`{}` is no address of a host", host.address));
            }
            if !names.insert(host.name()) {
                return Err(format!("two hosts are called `{}`: give each a `name`", host.name()));
            }
            if self.user_of(host).is_some_and(|user| user.starts_with('-')) {
                return Err("a user's name begins with `-`".to_owned());
            }
        }
        Ok(())
    }

    fn user_of<'a>(&'a self, host: &'a Host) -> Option<&'a str> {
        host.user.as_deref().or(self.ssh.user.as_deref())
    }

    /// The arguments of `ssh` that start a host's worker.
    ///
    /// What it reads from its standard input is the token, if there is one, on a line of its own; then nothing, until the
    /// connection closes: the worker ends with it. `ca` is the text of the authority's certificate.
    pub fn ssh_arguments(&self, host: &Host, ca: Option<&str>) -> Vec<String> {
        let mut arguments: Vec<String> = vec!["-T".to_owned()];
        let ours = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"];
        // The first value of an option counts: the user's come first.
        for option in self.ssh.options.iter().map(String::as_str).chain(ours) {
            arguments.extend(["-o".to_owned(), option.to_owned()]);
        }
        if let Some(port) = host.port.or(self.ssh.port) {
            arguments.extend(["-p".to_owned(), port.to_string()]);
        }
        if let Some(key) = &self.ssh.identity_file {
            arguments.extend(["-i".to_owned(), key.display().to_string()]);
        }
        if let Some(user) = self.user_of(host) {
            arguments.extend(["-l".to_owned(), user.to_owned()]);
        }
        arguments.extend(["--".to_owned(), host.address.clone(), self.remote_command(host, ca)]);
        arguments
    }

    /// What a host's shell is told to do.
    fn remote_command(&self, host: &Host, ca: Option<&str>) -> String {
        let folder = quote(host.folder.as_deref().unwrap_or(&self.worker.folder));
        let mut command = format!("mkdir -p {folder} && cd {folder} && ");
        let mut variables = String::new();
        if let Some(ca) = ca {
            command.push_str(&format!("printf %s {} > ca.pem && ", quote(ca)));
            variables.push_str("SHANTY_CA=$PWD/ca.pem ");
        }
        if self.token_file.is_some() {
            command.push_str("IFS= read -r SHANTY_TOKEN && export SHANTY_TOKEN && ");
        }
        let program = host.program.as_deref().unwrap_or(&self.worker.program);
        let flags = [
            "worker",
            "--end-with-stdin",
            "--output",
            "json",
            "--coordinator",
            &self.coordinator,
            "--name",
            host.name(),
        ];
        let more = self.worker.flags.iter().chain(&host.flags).map(String::as_str);
        let words: Vec<String> = [program].into_iter().chain(flags).chain(more).map(quote).collect();
        // `env` so that a login shell of any kind understands it.
        command.push_str(&format!("exec env {variables}{}", words.join(" ")));
        format!("sh -c {}", quote(&command))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ClusterFile> {
        let folder =
            std::env::temp_dir().join(format!("shanty-cluster-{}-{}", std::process::id(), text.len()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("cluster.toml"), text).unwrap();
        let read = ClusterFile::read(&folder.join("cluster.toml"));
        fs::remove_dir_all(&folder).unwrap();
        read
    }

    const TWO: &str = r#"
        coordinator = "https://head:7461"
        token_file = "worker.token"
        [ssh]
        user = "ann"
        options = ["ProxyJump=login"]
        [worker]
        program = "/opt/my programs/shanty"
        flags = ["--device", "cuda"]
        [[host]]
        address = "10.0.0.11"
        [[host]]
        address = "10.0.0.12"
        name = "big"
        port = 2222
        flags = ["--threads", "8"]
    "#;

    #[test]
    fn a_host_is_told_in_words_that_its_shell_understands() {
        let file = read(TWO).unwrap();
        let arguments = file.ssh_arguments(&file.hosts[1], Some("PEM\nit's"));
        let before: Vec<&str> =
            arguments.iter().map(String::as_str).take_while(|word| *word != "--").collect();
        assert_eq!(before[..3], ["-T", "-o", "ProxyJump=login"]);
        assert!(before.ends_with(&["-p", "2222", "-l", "ann"]), "{before:?}");
        // Two shells take it apart: the login shell, and the one that it is told to start.
        let script = arguments.last().unwrap().replace("exec env", "echo");
        let printed = |script: &str, folder: &Path| {
            let shell =
                std::process::Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
            assert!(shell.status.success(), "{}", String::from_utf8_lossy(&shell.stderr));
            String::from_utf8(shell.stdout).unwrap()
        };
        let folder = std::env::temp_dir().join(format!("shanty-remote-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let text = printed(&format!("echo secret | {script}"), &folder);
        assert_eq!(fs::read_to_string(folder.join(".shanty/ca.pem")).unwrap(), "PEM\nit's");
        fs::remove_dir_all(&folder).unwrap();
        assert!(text.contains("/opt/my programs/shanty worker --end-with-stdin"), "{text}");
        assert!(text.trim_end().ends_with("--name big --device cuda --threads 8"), "{text}");
        assert!(!arguments.concat().contains("secret"));
    }

    #[test]
    fn wrong_files_are_answered_with_what_is_wrong() {
        for (text, said) in [
            ("coordinator = \"http://h:1\"\nhost = []\n", "no host"),
            ("coordinator = \"http://h:1\"\n[[host]]\nadress = \"a\"\n", "adress"),
            ("coordinator = \"http://h:1\"\n[[host]]\naddress = \"-oProxyCommand=x\"\n", "no address"),
            (
                "coordinator = \"http://h:1\"\n[[host]]\naddress = \"a\"\n[[host]]\naddress = \"a\"\n",
                "two hosts",
            ),
            ("[[host]]\naddress = \"a\"\n", "coordinator"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.code(), "SH0964");
            assert!(error.to_string().contains(said), "{text}: {error}");
        }
        assert!(read(TWO).unwrap().token_file.unwrap().is_absolute());
    }
}
