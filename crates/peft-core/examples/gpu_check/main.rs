//! Checks and measures the GPU engine on a machine with an NVIDIA card: `gpu_check [REPOSITORY] [RESULT.json]`.
//!
//! Every operation beside the CPU's on fresh random numbers, outputs poisoned first; whole models' logits and gradients
//! beside the CPU's; training steps on the tiny base beside the CPU's curve; then times. `cargo xtask gpu-check` packs it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a tool that stops at the first thing that cannot be"
)]

mod dump;
mod frozen;
mod loading;
mod methods;
mod models;
mod operations;
mod speed;
mod virtual_tokens;

use std::path::PathBuf;

use serde_json::json;

/// One comparison.
struct Line {
    name: String,
    error: f64,
    allowed: f64,
}

/// All comparisons so far.
#[derive(Default)]
struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Notes `||got - expected|| / ||expected||`.
    fn compare(&mut self, name: impl Into<String>, got: &[f32], expected: &[f32], allowed: f64) {
        assert_eq!(got.len(), expected.len(), "lengths differ");
        let (mut difference, mut size) = (0.0, 0.0);
        for (got, expected) in got.iter().zip(expected) {
            difference += f64::from(got - expected).powi(2);
            size += f64::from(*expected).powi(2);
        }
        let error = if size == 0.0 { difference.sqrt() } else { (difference / size).sqrt() };
        self.note(name, error, allowed);
    }

    fn note(&mut self, name: impl Into<String>, error: f64, allowed: f64) {
        let line = Line { name: name.into(), error, allowed };
        let verdict = if line.holds() { "ok  " } else { "FAIL" };
        println!("{verdict} {:<64} {:.2e} of {:.0e}", line.name, line.error, line.allowed);
        self.lines.push(line);
    }
}

impl Line {
    /// NaN never holds.
    fn holds(&self) -> bool {
        self.error <= self.allowed
    }
}

fn main() {
    let all: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("dump", rest)) = all.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return dump::run(rest);
    }
    let mut arguments = all.into_iter();
    let repository = PathBuf::from(arguments.next().unwrap_or_else(|| ".".to_owned()));
    let result = arguments.next();
    let what = arguments.next().unwrap_or_else(|| "all".to_owned());
    let mut report = Report::default();
    let card = operations::card();
    println!("{card}");
    if what == "all" || what == "check" {
        loading::check(&mut report, &repository);
        let sides = operations::check(&mut report);
        methods::check(&mut report, &sides, &repository);
        drop(sides);
        models::check(&mut report, &repository);
        models::memory(&mut report, &repository);
        models::train(&mut report, &repository);
    }
    if what == "loading" {
        loading::check(&mut report, &repository);
    }
    if what == "all" || what == "check" || what == "virtual" {
        virtual_tokens::check(&mut report, &repository);
    }
    let mut times = match what.as_str() {
        "all" | "time" => speed::measure(),
        "steps" => speed::measure_steps(),
        _ => Vec::new(),
    };
    if what == "all" || what == "longest" {
        times.extend(speed::longest());
    }
    let failed: Vec<&Line> = report.lines.iter().filter(|line| !line.holds()).collect();
    println!("\n{card}: {} comparisons, {} failed", report.lines.len(), failed.len());
    for line in &failed {
        println!("FAIL {:<64} {:.2e} of {:.0e}", line.name, line.error, line.allowed);
    }
    for time in &times {
        println!("{time}");
    }
    if let Some(result) = result {
        let checks: Vec<_> = report
            .lines
            .iter()
            .map(|line| json!({"name": line.name, "error": line.error, "allowed": line.allowed}))
            .collect();
        let text = json!({"card": card, "checks": checks, "times": times}).to_string();
        std::fs::write(&result, text).unwrap();
    }
    if !failed.is_empty() {
        std::process::exit(1);
    }
}
