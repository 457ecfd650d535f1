//! What the workers themselves say that they trained: `logs/rows-*.jsonl` below a run folder.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, ensure};
use serde::Deserialize;

/// A line of a worker's row log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Note {
    /// `entering` (the reduction) or `applied`.
    pub event: String,
    /// The job's attempt.
    pub attempt: u32,
    /// The generation.
    pub generation: u64,
    /// The step.
    pub step: u64,
    /// The rank that the worker had.
    pub rank: u32,
    /// Rows in the sum that it enters with; none for `applied`.
    #[serde(default)]
    pub rows: Vec<u64>,
}

/// Reads all row logs below a run folder. A last line that a kill cut off is passed over.
pub fn read(store: &Path) -> anyhow::Result<Vec<Note>> {
    let folder = store.join("logs");
    let mut notes = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("failed to read `{}`", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !(name.starts_with("rows-") && name.ends_with(".jsonl")) {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            notes.push(
                serde_json::from_str(line).with_context(|| format!("in `{}`: {line}", path.display()))?,
            );
        }
    }
    ensure!(!notes.is_empty(), "no row log below `{}`", folder.display());
    Ok(notes)
}

/// The rows of each step that the final adapter was trained on, sorted: for each step those that all ranks of the
/// last generation that applied it entered with.
pub fn trained(notes: &[Note]) -> BTreeMap<u64, Vec<u64>> {
    let mut lineage: BTreeMap<u64, (u32, u64)> = BTreeMap::new();
    for note in notes.iter().filter(|note| note.event == "applied") {
        let last = lineage.entry(note.step).or_default();
        *last = (*last).max((note.attempt, note.generation));
    }
    let mut rows: BTreeMap<u64, Vec<u64>> = lineage.keys().map(|step| (*step, Vec::new())).collect();
    for note in notes.iter().filter(|note| note.event == "entering") {
        if lineage.get(&note.step) == Some(&(note.attempt, note.generation)) {
            rows.entry(note.step).or_default().extend(&note.rows);
        }
    }
    rows.values_mut().for_each(|rows| rows.sort_unstable());
    rows
}

/// Checks that each of `steps` steps was trained on exactly the rows that belong to it, each once.
pub fn check_exactly_once(store: &Path, steps: u64, belongs: impl Fn(u64) -> Vec<u64>) -> anyhow::Result<()> {
    let trained = trained(&read(store)?);
    for step in 1..=steps {
        let mut expected = belongs(step);
        expected.sort_unstable();
        let got = trained.get(&step).with_context(|| format!("step {step} was applied by nobody"))?;
        ensure!(*got == expected, "step {step} was trained on rows {got:?}, {expected:?} belong to it");
    }
    ensure!(trained.len() as u64 == steps, "{} steps were applied, not {steps}", trained.len());
    Ok(())
}

/// How far the rows that were trained differ from those that belong to the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Steps that were looked for.
    pub steps: u64,
    /// Steps that nobody applied, and steps beyond the last.
    pub steps_lost: u64,
    /// Rows more often in a step than they belong to it.
    pub duplicates: u64,
    /// Rows that belong to a step and are missing in it.
    pub omissions: u64,
}

impl Counts {
    /// Adds another job's.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.steps_lost += other.steps_lost;
        self.duplicates += other.duplicates;
        self.omissions += other.omissions;
    }
}

/// Counts what differs from exactly once, where [`check_exactly_once`] stops at the first difference.
pub fn count(store: &Path, steps: u64, belongs: impl Fn(u64) -> Vec<u64>) -> anyhow::Result<Counts> {
    let trained = trained(&read(store)?);
    let beyond = trained.keys().filter(|step| **step > steps).count() as u64;
    let mut counts = Counts { steps, steps_lost: beyond, ..Counts::default() };
    for step in 1..=steps {
        let Some(got) = trained.get(&step) else {
            counts.steps_lost += 1;
            continue;
        };
        let mut balance: BTreeMap<u64, i64> = BTreeMap::new();
        got.iter().for_each(|row| *balance.entry(*row).or_default() += 1);
        belongs(step).iter().for_each(|row| *balance.entry(*row).or_default() -= 1);
        counts.duplicates += balance.values().filter(|by| **by > 0).sum::<i64>() as u64;
        counts.omissions += balance.values().filter(|by| **by < 0).map(|by| -by).sum::<i64>() as u64;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(event: &str, generation: u64, step: u64, rank: u32, rows: &[u64]) -> Note {
        Note { event: event.to_owned(), attempt: 1, generation, step, rank, rows: rows.to_vec() }
    }

    #[test]
    fn the_last_generation_that_applied_a_step_counts() {
        let notes = [
            note("entering", 1, 1, 0, &[3, 1]),
            note("entering", 1, 1, 1, &[2]),
            // Rank 1 alone applied it and was lost; the step was reduced again without it.
            note("applied", 1, 1, 1, &[]),
            note("entering", 2, 1, 0, &[3, 1, 2]),
            note("applied", 2, 1, 0, &[]),
            // Entered and never applied.
            note("entering", 2, 2, 0, &[4]),
        ];
        assert_eq!(trained(&notes), BTreeMap::from([(1, vec![1, 2, 3])]));
    }

    #[test]
    fn a_row_twice_a_row_missing_and_a_step_missing_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let logs = folder.path().join("logs");
        fs::create_dir(&logs).unwrap();
        let write = |rows: &str| {
            let text = format!(
                "{{\"event\":\"entering\",\"attempt\":1,\"generation\":1,\"step\":1,\"rank\":0,\"rows\":{rows}}}\n\
                 {{\"event\":\"applied\",\"attempt\":1,\"generation\":1,\"step\":1,\"rank\":0}}\n{{\"event\":\"ent"
            );
            fs::write(logs.join("rows-a.jsonl"), text).unwrap();
        };
        let check = |steps| check_exactly_once(folder.path(), steps, |_| vec![1, 2]);
        write("[2,1]");
        check(1).unwrap();
        assert!(check(2).is_err());
        write("[2,1,2]");
        assert!(check(1).is_err());
        write("[2]");
        assert!(check(1).is_err());
        let counted = |steps| count(folder.path(), steps, |_| vec![1, 2]).unwrap();
        assert_eq!(counted(2), Counts { steps: 2, steps_lost: 1, duplicates: 0, omissions: 1 });
        write("[2,1,2,7]");
        assert_eq!(counted(1), Counts { steps: 1, steps_lost: 0, duplicates: 2, omissions: 0 });
    }
}
