//! A program in a pseudo-terminal: its screen as a person sees it, keys, sizes, and the state it leaves the terminal in.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    num::NonZeroU16,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use rustix::{
    process::Signal,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};

use crate::{process, wait};

/// How long a screen may take to show something.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A program that has a terminal of its own. Killed when dropped.
pub struct Terminal {
    child: Child,
    master: File,
    /// Kept open: the terminal's state can be read after the program's end.
    slave: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    /// Starts `program` in a terminal of `columns` by `rows`.
    ///
    /// # Errors
    /// If there is no pseudo-terminal, or no `setsid` of util-linux.
    pub fn start(
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
        (columns, rows): (u16, u16),
    ) -> anyhow::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("no pseudo-terminal")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes())).to_owned();
        let slave = OpenOptions::new().read(true).write(true).open(&path)?;
        tcsetwinsize(&slave, size(columns, rows))?;
        // A session of its own whose terminal this is, so that a change of size is signalled.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(program)
            .args(arguments)
            .env("TERM", "xterm-256color")
            .env("LC_ALL", "C.UTF-8")
            .env_remove("NO_COLOR")
            .env("XDG_STATE_HOME", std::env::temp_dir().join("shanty-tests"))
            .envs(environment.iter().copied())
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave.try_clone()?))
            .spawn()
            .context("failed to start `setsid`")?;
        let master = File::from(master);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(at_least_one(rows), at_least_one(columns), 0)));
        let (mut reader, sink) = (master.try_clone()?, Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read) = reader.read(&mut bytes) {
                if read == 0 {
                    return;
                }
                sink.lock().unwrap_or_else(PoisonError::into_inner).process(&bytes[..read]);
            }
        });
        Ok(Self { child, master, slave, screen })
    }

    fn parser(&self) -> MutexGuard<'_, vt100::Parser> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on the screen.
    pub fn text(&self) -> String {
        self.parser().screen().contents()
    }

    /// Whether any letter on the screen has a colour.
    pub fn has_color(&self) -> bool {
        let parser = self.parser();
        let screen = parser.screen();
        let (rows, columns) = screen.size();
        let (rows, columns) = (rows.get(), columns.get());
        (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).any(|(row, column)| {
            screen.cell(row, column).is_some_and(|cell| cell.fgcolor() != vt100::Color::Default)
        })
    }

    /// Whether the program draws on a screen of its own.
    pub fn is_on_other_screen(&self) -> bool {
        self.parser().screen().alternate_screen()
    }

    /// Whether the cursor is to be seen.
    pub fn shows_cursor(&self) -> bool {
        !self.parser().screen().hide_cursor()
    }

    /// Waits until the terminal collects lines and echoes, as a shell expects it to, on the screen that it began with.
    ///
    /// # Errors
    /// With the screen as it was last, if it does not come to that.
    pub fn wait_until_as_it_was(&mut self) -> anyhow::Result<()> {
        let found = wait::until("the terminal as it was", PATIENCE, || {
            let modes = tcgetattr(&self.slave)?.local_modes;
            let reads_lines = modes.contains(LocalModes::ICANON | LocalModes::ECHO);
            Ok((reads_lines && !self.is_on_other_screen() && self.shows_cursor()).then_some(()))
        });
        found.with_context(|| format!("the screen was:\n{}", self.text()))
    }

    /// Waits until the screen is as wanted; gives it.
    ///
    /// # Errors
    /// With the screen as it was last, if it does not come to that.
    pub fn wait_for(&mut self, what: &str, accept: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let found = wait::until(what, PATIENCE, || Ok(Some(self.text()).filter(|text| accept(text))));
        found.with_context(|| format!("the screen was:\n{}", self.text()))
    }

    /// Presses keys.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub fn press(&mut self, keys: &str) -> anyhow::Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Makes the terminal another size.
    ///
    /// # Errors
    /// If the terminal is gone.
    pub fn resize(&mut self, columns: u16, rows: u16) -> anyhow::Result<()> {
        self.parser().screen_mut().set_size(at_least_one(rows), at_least_one(columns));
        Ok(tcsetwinsize(&self.master, size(columns, rows))?)
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        // `setsid` became the program, or waits for it as its parent.
        let program = process::descendants(self.child.id()).first().copied().unwrap_or(self.child.id());
        process::signal(program, signal);
    }

    /// Waits for the program's end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait_for_end(&mut self) -> anyhow::Result<ExitStatus> {
        wait::until("the end of the program", PATIENCE, || Ok(self.child.try_wait()?))
            .with_context(|| format!("the screen was:\n{}", self.text()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::descendants(self.child.id()).into_iter().for_each(process::kill_9);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn at_least_one(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).unwrap_or(NonZeroU16::MIN)
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
