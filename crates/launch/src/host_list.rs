//! Slurm's short form of a list of hosts: `gpu[07-09,12],login`.
//!
//! The form is that of `scontrol show hostnames`: ranges keep the zeros that their first number begins with, and a name may
//! have several brackets, each of which multiplies it.

use crate::{Error, Result};

/// More hosts than this in one list are taken for a mistake.
const MOST: usize = 65_536;

/// The hosts of a list, in order.
///
/// # Errors
/// [`Error::HostList`] for brackets that do not close, ranges that run backwards or do not hold numbers, and lists of more than
/// 65,536 hosts.
pub fn hosts(list: &str) -> Result<Vec<String>> {
    let wrong = |reason: String| Error::HostList { list: list.to_owned(), reason };
    let mut hosts = Vec::new();
    for name in names(list).map_err(wrong)? {
        expand(name, &mut hosts).map_err(wrong)?;
    }
    Ok(hosts)
}

/// The parts between commas that are not in brackets.
fn names(list: &str) -> Result<Vec<&str>, String> {
    let (mut names, mut inside, mut start) = (Vec::new(), false, 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '[' if inside => return Err(format!("a second `[` at {}", at + 1)),
            '[' => inside = true,
            ']' if !inside => return Err(format!("a `]` without `[` at {}", at + 1)),
            ']' => inside = false,
            ',' if !inside => {
                names.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a `[` is never closed".to_owned());
    }
    names.push(&list[start..]);
    if names.iter().any(|name| name.trim().is_empty()) {
        return Err("a name is empty".to_owned());
    }
    Ok(names)
}

/// Adds what one name with brackets stands for.
fn expand(name: &str, hosts: &mut Vec<String>) -> Result<(), String> {
    let mut heads = vec![String::new()];
    let mut rest = name.trim();
    while let Some((before, after)) = rest.split_once('[') {
        let (inside, after) = after.split_once(']').ok_or("a `[` is never closed")?;
        let numbers = numbers(inside)?;
        if heads.len().saturating_mul(numbers.len()).saturating_add(hosts.len()) > MOST {
            return Err(format!("it stands for more than {MOST} hosts"));
        }
        heads = heads
            .iter()
            .flat_map(|head| numbers.iter().map(move |number| format!("{head}{before}{number}")))
            .collect();
        rest = after;
    }
    hosts.extend(heads.into_iter().map(|head| head + rest));
    Ok(())
}

/// The numbers of one bracket, with their leading zeros.
fn numbers(inside: &str) -> Result<Vec<String>, String> {
    let mut numbers = Vec::new();
    for part in inside.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let parse = |text: &str| {
            if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(format!("`{part}` is no range of numbers"));
            }
            text.parse::<u64>().map_err(|_| format!("`{text}` is too long a number"))
        };
        let (from, to) = (parse(first)?, parse(last)?);
        if to < from {
            return Err(format!("`{part}` runs backwards"));
        }
        if to - from >= MOST as u64 {
            return Err(format!("it stands for more than {MOST} hosts"));
        }
        numbers.extend((from..=to).map(|number| format!("{number:0width$}", width = first.len())));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As `scontrol show hostnames` of Slurm 22.05 prints each; it refuses the last, a name that goes on after its bracket.
    #[test]
    fn lists_expand_as_slurm_expands_them() {
        for (list, expected) in [
            ("login", vec!["login"]),
            ("a,b.example", vec!["a", "b.example"]),
            ("gpu[07-09]", vec!["gpu07", "gpu08", "gpu09"]),
            ("n[1-3,7],m2", vec!["n1", "n2", "n3", "n7", "m2"]),
            ("n[099-101]", vec!["n099", "n100", "n101"]),
            ("r[1-2]n[0-1]", vec!["r1n0", "r1n1", "r2n0", "r2n1"]),
            ("r[1-2]-ib", vec!["r1-ib", "r2-ib"]),
        ] {
            assert_eq!(hosts(list).unwrap(), expected, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_an_error_that_says_where() {
        for (list, reason) in [
            ("n[1-3", "never closed"),
            ("n1-3]", "without `[`"),
            ("n[[1]]", "second `[`"),
            ("n[3-1]", "backwards"),
            ("n[a-b]", "no range"),
            ("n[1-]", "no range"),
            ("", "empty"),
            ("a,,b", "empty"),
            ("n[0-99999999]", "more than"),
            ("n[1-999]m[1-999]", "more than"),
        ] {
            let error = hosts(list).unwrap_err().to_string();
            assert!(error.contains(reason), "{list}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(list in "[a-c0-9\\[\\],-]{0,24}") {
            let _ = hosts(&list);
        }

        #[test]
        fn a_range_has_as_many_hosts_as_numbers(from in 0u64..5_000, more in 0u64..500) {
            let all = hosts(&format!("n[{from}-{}]", from + more)).unwrap();
            prop_assert_eq!(all.len() as u64, more + 1);
            prop_assert_eq!(all.last().unwrap(), &format!("n{}", from + more));
        }
    }
}
