//! What differs between a job as it was submitted and its file as it is now.

use std::fmt;

use serde_json::Value;

/// Keys that have no part in what is trained, and differ from one place of submission to another.
const NO_MATTER: [&str; 3] = ["cluster.owner", "checkpoint.store", "checkpoint.run_folder"];

/// A key of the job file that a resumed job does not obey. Values are JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// The key, dotted.
    pub key: String,
    /// Its value when the job was submitted.
    pub submitted: String,
    /// Its value now.
    pub now: String,
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} (submitted with {})", self.key, self.now, self.submitted)
    }
}

/// A word that stands for whatever was decided when the job was submitted.
const DECIDED: (&str, &str) = ("base.shard", "auto");

/// The keys that differ, in the order of the alphabet.
pub(super) fn ignored(submitted: &str, now: Option<&Value>) -> Vec<Ignored> {
    let (Some(now), Ok(submitted)) = (now, serde_json::from_str::<Value>(submitted)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    compare("", &submitted, now, &mut found);
    found.sort_by(|one: &Ignored, other| one.key.cmp(&other.key));
    found
}

fn compare(key: &str, submitted: &Value, now: &Value, found: &mut Vec<Ignored>) {
    if submitted == now || NO_MATTER.contains(&key) || (key, now.as_str()) == (DECIDED.0, Some(DECIDED.1)) {
        return;
    }
    let (Value::Object(before), Value::Object(after)) = (submitted, now) else {
        let (submitted, now) = (submitted.to_string(), now.to_string());
        return found.push(Ignored { key: key.to_owned(), submitted, now });
    };
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for inner in keys {
        let name = if key.is_empty() { inner.clone() } else { format!("{key}.{inner}") };
        let value = |object: &serde_json::Map<String, Value>| object.get(inner).cloned().unwrap_or_default();
        compare(&name, &value(before), &value(after), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_named_key_by_key() {
        let submitted = r#"{"name": "a", "train": {"steps": 5, "seed": 1}, "cluster": {"owner": "ada"}}"#;
        let now = serde_json::json!({
            "name": "a", "train": {"steps": 9, "seed": 1, "epochs": 2}, "cluster": {"owner": "bob"},
        });
        let found: Vec<String> = ignored(submitted, Some(&now)).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["train.epochs = 2 (submitted with null)", "train.steps = 9 (submitted with 5)"]);
        assert!(ignored(submitted, None).is_empty());
        let decided = r#"{"base": {"shard": "replicate"}}"#;
        let says =
            |word: &str| ignored(decided, Some(&serde_json::json!({ "base": { "shard": word } }))).len();
        assert_eq!((says("auto"), says("replicate"), says("2")), (0, 0, 1));
        assert!(ignored(submitted, serde_json::from_str(submitted).ok().as_ref()).is_empty());
    }
}
