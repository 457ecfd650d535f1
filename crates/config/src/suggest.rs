//! "Did you mean": what a mistyped or borrowed word was meant to be.

use crate::shape::{Shape, join_key};

/// Names of other programs (PEFT, transformers, TRL, common habit) for keys of the job file.
const BORROWED: &[(&str, &str)] = &[
    ("alpha", "adapter.lora_alpha"),
    ("base_model", "base.model"),
    ("batch_size", "train.global_batch_size"),
    ("dropout", "adapter.lora_dropout"),
    ("eval_dataset", "data.eval"),
    ("eval_steps", "train.eval_every_steps"),
    ("gradient_checkpointing", "train.recompute"),
    ("adam_epsilon", "train.epsilon"),
    ("load_in_4bit", "base.quantization"),
    ("lr", "train.learning_rate"),
    ("lr_scheduler_type", "train.schedule"),
    ("max_seq_length", "data.max_length"),
    ("max_steps", "train.steps"),
    ("model_name_or_path", "base.model"),
    ("num_epochs", "train.epochs"),
    ("num_train_epochs", "train.epochs"),
    ("output_dir", "checkpoint.store"),
    ("peft_type", "adapter.method"),
    ("per_device_train_batch_size", "train.micro_batch_size"),
    ("rank", "adapter.r"),
    ("save_steps", "checkpoint.every_steps"),
    ("save_total_limit", "checkpoint.keep"),
    ("scheduler", "train.schedule"),
    ("train_dataset", "data.train"),
    ("train_on_inputs", "data.train_on"),
    ("datasets", "data.train"),
];

/// The known word that an unknown one most resembles, if it does.
pub(crate) fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).clamp(1, 3);
    let lower = word.to_lowercase().replace('-', "_");
    known
        .map(|candidate| (distance(&lower, &candidate.to_lowercase().replace('-', "_")), candidate))
        .filter(|(distance, candidate)| *distance <= allowed && *distance < candidate.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The dotted key that an unknown key of the table `parent` was meant to be.
pub(crate) fn closest_key(root: &Shape, parent: &str, key: &str) -> Option<String> {
    let here = if parent.is_empty() { Some(root) } else { root.find(parent) };
    let siblings = here.map(Shape::fields).unwrap_or_default();
    if let Some(close) = closest(key, siblings.iter().map(|field| field.key)) {
        return Some(join_key(parent, close));
    }
    let leaves = root.leaves();
    let same_name = leaves.iter().find(|(leaf, _)| leaf.rsplit('.').next() == Some(key));
    let tables = || root.fields().iter().map(|field| field.key);
    same_name
        .map(|(leaf, _)| leaf.clone())
        .or_else(|| {
            let (_, meant) = BORROWED.iter().find(|(borrowed, _)| *borrowed == key.to_lowercase())?;
            root.find(meant).map(|_| (*meant).to_owned())
        })
        .or_else(|| tables().find(|table| *table == key).map(str::to_owned))
        .or_else(|| {
            let begins = |sibling: &&str| sibling.len() >= 3 && key.starts_with(*sibling);
            siblings.iter().map(|field| field.key).find(begins).map(|sibling| join_key(parent, sibling))
        })
}

/// Letters to insert, delete, replace or swap with their neighbour until `a` is `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{job::JobSpec, shape::Describe};

    #[test]
    fn typos_are_close_and_other_words_are_not() {
        assert_eq!(distance("learning_rate", "learnign_rate"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(closest("lora_alhpa", ["r", "lora_alpha"].into_iter()), Some("lora_alpha"));
        assert_eq!(closest("Lora-Alpha", ["lora_alpha"].into_iter()), Some("lora_alpha"));
        assert_eq!(closest("q", ["r"].into_iter()), None);
        assert_eq!(closest("weather", ["weight_decay", "warmup_steps"].into_iter()), None);
    }

    #[test]
    fn every_borrowed_name_leads_to_a_key_that_exists() {
        let shape = JobSpec::shape();
        for (borrowed, meant) in BORROWED {
            assert!(shape.find(meant).is_some(), "{borrowed} leads to {meant}, which is no key");
            assert_eq!(closest_key(&shape, "", borrowed).as_deref(), Some(*meant));
        }
    }

    #[test]
    fn a_key_in_the_wrong_table_is_sent_to_the_right_one() {
        let shape = JobSpec::shape();
        assert_eq!(closest_key(&shape, "", "learning_rate").as_deref(), Some("train.learning_rate"));
        assert_eq!(closest_key(&shape, "train", "lora_alpha").as_deref(), Some("adapter.lora_alpha"));
        assert_eq!(closest_key(&shape, "train", "lr").as_deref(), Some("train.learning_rate"));
        assert_eq!(closest_key(&shape, "cluster.workers", "maximum").as_deref(), Some("cluster.workers.max"));
        assert_eq!(closest_key(&shape, "adapter", "zzzzz"), None);
    }
}
