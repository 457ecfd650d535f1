//! What this process takes.

use std::fs;

/// Ticks a second in `/proc`: the kernel shows 100 to every program, whatever it counts with itself.
const TICKS: f64 = 100.0;

/// What this process takes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Memory that is really there.
    pub resident_bytes: u64,
    /// Time on any core since the start.
    pub cpu_seconds: f64,
    /// Files and connections that are open.
    pub open_files: u64,
    /// When it started, seconds since the Unix epoch.
    pub started_unix_seconds: f64,
}

/// What this process takes now; what the system does not say is 0.
pub fn usage() -> Usage {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let open_files = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
    read(&status, &stat, &boot, open_files)
}

fn read(status: &str, stat: &str, boot: &str, open_files: u64) -> Usage {
    let after = |text: &str, name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    // The name in parentheses may hold anything; what follows the last one does not. The state is field 3.
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0.0);
    let booted = after(boot, "btime ").unwrap_or_default() as f64;
    Usage {
        resident_bytes: after(status, "VmRSS:").unwrap_or_default() * 1024,
        cpu_seconds: (field(14) + field(15)) / TICKS,
        open_files,
        started_unix_seconds: booted + field(22) / TICKS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_whatever_the_name_of_the_program() {
        let stat = "17 (a) b) R 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 1 0 1000 0";
        let usage = read("Name:\tx\nVmRSS:\t   12 kB\n", stat, "cpu 1\nbtime 500\n", 7);
        let expected =
            Usage { resident_bytes: 12_288, cpu_seconds: 2.0, open_files: 7, started_unix_seconds: 510.0 };
        assert_eq!(usage, expected);
    }

    #[test]
    fn this_process_takes_something() {
        let before = usage();
        assert!(before.resident_bytes > 100_000 && before.open_files > 0, "{before:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let age = now.as_secs_f64() - before.started_unix_seconds;
        assert!((-2.0..86_400.0).contains(&age), "it started {age} s ago");
        let mut sum = 0u64;
        while usage().cpu_seconds <= before.cpu_seconds {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(1));
        }
    }
}
