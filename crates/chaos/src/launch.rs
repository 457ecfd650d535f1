//! How a process was started, to start another one like it.

use std::{
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use crate::error::{Error, Result};

/// Program, arguments, environment and folder of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    folder: PathBuf,
}

impl Launch {
    /// How a process that runs was started.
    ///
    /// # Errors
    /// [`Error::Process`]
    pub fn of(pid: u32) -> Result<Self> {
        let fail = |source| Error::Process { action: "look at", pid, source };
        let words = |file: &str| -> Result<Vec<OsString>> {
            let bytes = fs::read(format!("/proc/{pid}/{file}")).map_err(fail)?;
            let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
            Ok(words.map(|word| OsString::from_vec(word.to_vec())).collect())
        };
        let pair = |word: OsString| {
            let bytes = word.into_vec();
            let at = bytes.iter().position(|byte| *byte == b'=')?;
            Some((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec())))
        };
        Ok(Self {
            program: fs::read_link(format!("/proc/{pid}/exe")).map_err(fail)?,
            arguments: words("cmdline")?.into_iter().skip(1).collect(),
            environment: words("environ")?.into_iter().filter_map(pair).collect(),
            folder: fs::read_link(format!("/proc/{pid}/cwd")).map_err(fail)?,
        })
    }

    /// Starts another one, in a process group of its own and with nobody to talk to.
    ///
    /// # Errors
    /// [`Error::Command`]
    pub fn start(&self) -> Result<Child> {
        Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(&self.folder)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| Error::Command {
                command: self.program.display().to_string(),
                reason: error.to_string(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_started_again_as_it_was() {
        let mut child =
            Command::new("sleep").arg("600").env("SHANTY_MARK", "a=b").current_dir("/").spawn().unwrap();
        // Between fork and exec it still looks like its parent.
        let launch = (0..500)
            .map(|_| Launch::of(child.id()).unwrap())
            .find(|launch| launch.arguments == ["600"])
            .expect("the sleeper");
        child.kill().unwrap();
        child.wait().unwrap();
        let mut again = launch.start().unwrap();
        let same = (0..500).any(|_| Launch::of(again.id()).is_ok_and(|again| again == launch));
        assert!(same);
        assert!(launch.environment.contains(&("SHANTY_MARK".into(), "a=b".into())));
        again.kill().unwrap();
        again.wait().unwrap();
    }
}
