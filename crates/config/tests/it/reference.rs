use std::collections::BTreeSet;

use shanty_config::{
    JobSpec,
    reference::{environment_page, job_page, services_page, smallest_job},
    shape::{Describe, Shape},
};

use crate::Bench;

/// Every key that serde writes for a job, dotted, lists and words as one.
fn serde_keys(value: &serde_json::Value, parent: &str, keys: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                let key = if parent.is_empty() { key.clone() } else { format!("{parent}.{key}") };
                serde_keys(value, &key, keys);
            }
        }
        _ => {
            keys.insert(parent.to_owned());
        }
    }
}

#[test]
fn the_described_keys_are_those_that_serde_reads_and_writes() {
    let job: JobSpec = toml::from_str(&smallest_job()).expect("the smallest job is a job");
    let mut written = BTreeSet::new();
    serde_keys(&serde_json::to_value(job).expect("JSON"), "", &mut written);
    let shape = JobSpec::shape();
    let described: BTreeSet<String> = shape.leaves().into_iter().map(|(key, _)| key).collect();
    assert_eq!(described, written);
}

#[test]
fn every_key_and_word_has_a_text_and_stands_in_the_page() {
    fn texts(shape: &Shape, page: &str) {
        for field in shape.fields() {
            assert!(!field.doc.trim().is_empty(), "{} has no text", field.key);
            assert!(page.contains(field.key), "{} is not in the page", field.key);
            for word in field.shape.words() {
                assert!(!word.doc.trim().is_empty(), "{} has no text", word.word);
                assert!(page.contains(&format!("`{}`", word.word)), "{} is not in the page", word.word);
            }
            texts(&field.shape, page);
        }
    }
    texts(&JobSpec::shape(), &job_page());
    texts(&shanty_config::CoordinatorFile::shape(), &services_page());
    texts(&shanty_config::WorkerFile::shape(), &services_page());
}

#[test]
fn the_smallest_job_has_no_key_to_spare() {
    let bench = Bench::new();
    let whole = smallest_job();
    assert!(bench.load(&whole).is_ok());
    for line in whole.lines().filter(|line| line.contains('=')) {
        let errors = bench.load(whole.replace(line, "")).expect_err(line);
        assert_eq!(errors.diagnostics()[0].code, "SH0105", "without {line}: {errors}");
    }
}

#[test]
fn every_word_of_every_key_is_one_that_serde_reads() {
    let bench = Bench::new();
    for (key, field) in JobSpec::shape().leaves() {
        for word in field.shape.words() {
            let flags = [(key.as_str(), word.word.as_str())];
            assert!(bench.load_with(smallest_job(), &[], &flags).is_ok(), "{key} = {}", word.word);
        }
    }
}

#[test]
fn the_environment_page_lists_what_the_program_reads() {
    let page = environment_page();
    for name in ["SHANTY_LOG", "SHANTY_COORDINATOR", "SHANTY_JOB__…", "NO_COLOR", "SHANTY_FAILPOINT"] {
        assert!(page.contains(&format!("| `{name}` |")), "{name}");
    }
}
