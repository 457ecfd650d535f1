//! Numbers and times as people read them.

use std::time::Duration;

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `3.4 GiB`, `120 MiB`, `512 B`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `4 s`, `2 min 05 s`, `3 h 10 min`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Seconds as they come over the wire.
pub fn seconds(seconds: f64) -> String {
    duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

/// `1.25 %` with as many digits as a small share needs.
pub fn percent(part: u64, whole: u64) -> String {
    let share = if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 };
    if share < 1.0 { format!("{share:.3} %") } else { format!("{share:.2} %") }
}

/// Module names with their layers drawn together: `model.layers.{0-6}.self_attn.q_proj`, in order of appearance.
pub fn modules(names: &[String]) -> Vec<String> {
    let mut groups: Vec<(String, String, Vec<u64>)> = Vec::new();
    for name in names {
        let parts: Vec<&str> = name.split('.').collect();
        let layer = parts.iter().position(|part| part.parse::<u64>().is_ok());
        let (before, number, after) = match layer {
            Some(at) => (parts[..at].join("."), parts[at].parse().ok(), parts[at + 1..].join(".")),
            None => (name.clone(), None, String::new()),
        };
        match groups.iter_mut().find(|(start, end, _)| (start, end) == (&before, &after)) {
            Some((_, _, layers)) => layers.extend(number),
            None => groups.push((before, after, number.into_iter().collect())),
        }
    }
    let shown = |(before, after, layers): (String, String, Vec<u64>)| match layers.as_slice() {
        [] => before,
        [only] => format!("{before}.{only}.{after}"),
        _ => format!("{before}.{{{}}}.{after}", ranges(&layers)),
    };
    groups.into_iter().map(shown).collect()
}

/// `0-3,7`: rising numbers, neighbours drawn together.
fn ranges(numbers: &[u64]) -> String {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 >= number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |(first, last): &(u64, u64)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

/// Rows of cells in columns as wide as their widest cell; the last column is left as it is.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for (cell, width) in cells.zip(&widths) {
            out.push_str(&format!("{cell:<width$}  "));
        }
        out.trim_end().to_owned()
    };
    let mut lines = vec![line(&mut header.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_of_many_layers_are_one_line() {
        let name = |layer: u64, end: &str| format!("model.layers.{layer}.{end}");
        let mut names: Vec<String> = [0, 1, 2, 5].map(|layer| name(layer, "self_attn.q_proj")).to_vec();
        names.push(name(3, "mlp.up_proj"));
        names.push("lm_head".to_owned());
        assert_eq!(
            modules(&names),
            ["model.layers.{0-2,5}.self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head"]
        );
    }

    #[test]
    fn counts_have_commas() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000), "1,000");
        assert_eq!(count(12_345_678), "12,345,678");
    }

    #[test]
    fn bytes_take_the_unit_that_fits() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(200 * 1024 * 1024), "200 MiB");
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
    }

    #[test]
    fn durations_say_no_more_than_matters() {
        assert_eq!(seconds(3.21), "3.2 s");
        assert_eq!(seconds(42.4), "42 s");
        assert_eq!(seconds(125.0), "2 min 05 s");
        assert_eq!(seconds(11_400.0), "3 h 10 min");
        assert_eq!(seconds(f64::NAN), "0.0 s");
    }

    #[test]
    fn small_shares_keep_their_digits() {
        assert_eq!(percent(1, 0), "0.000 %");
        assert_eq!(percent(1, 400), "0.250 %");
        assert_eq!(percent(1, 8), "12.50 %");
    }

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["a".to_owned(), "long".to_owned()], vec!["bcd".to_owned(), String::new()]];
        assert_eq!(table(&["x", "y"], &rows), "x    y\na    long\nbcd");
    }
}
