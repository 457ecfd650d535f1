//! The example data, all of it.

use shanty_data::{Prepared, Split};

use crate::helpers::{Bench, check_split, root};

struct Task {
    file: &'static str,
    form: &'static str,
    records: u64,
    samples: u64,
    tokens: u64,
    trained_tokens: u64,
}

/// Records by `wc -l`; tokens by `count_task_tokens.py`, with the Python package tokenizers.
const TASKS: [Task; 8] = [
    Task {
        file: "chat.test.jsonl",
        form: "messages",
        records: 51,
        samples: 51,
        tokens: 1589,
        trained_tokens: 563,
    },
    Task {
        file: "chat.train.jsonl",
        form: "messages",
        records: 595,
        samples: 595,
        tokens: 18123,
        trained_tokens: 6239,
    },
    Task {
        file: "define.test.jsonl",
        form: "prompt-completion",
        records: 500,
        samples: 500,
        tokens: 14309,
        trained_tokens: 8949,
    },
    Task {
        file: "define.train.jsonl",
        form: "prompt-completion",
        records: 4000,
        samples: 4000,
        tokens: 112408,
        trained_tokens: 69308,
    },
    Task {
        file: "sentiment.test.jsonl",
        form: "prompt-completion",
        records: 500,
        samples: 500,
        tokens: 21058,
        trained_tokens: 1000,
    },
    Task {
        file: "sentiment.train.jsonl",
        form: "prompt-completion",
        records: 4000,
        samples: 4000,
        tokens: 169391,
        trained_tokens: 8000,
    },
    Task {
        file: "shakespeare.eval.jsonl",
        form: "text",
        records: 120,
        samples: 227,
        tokens: 38950,
        trained_tokens: 38723,
    },
    Task {
        file: "shakespeare.train.jsonl",
        form: "text",
        records: 1600,
        samples: 2986,
        tokens: 549198,
        trained_tokens: 546212,
    },
];

#[test]
fn all_example_data_is_prepared() {
    for task in &TASKS {
        let mut bench = Bench::new();
        bench.options.train = root().join("examples/tasks").join(task.file).to_str().unwrap().into();
        let summary = bench.prepare().unwrap();
        let prepared = Prepared::open(&bench.options.out).unwrap();
        let (tokens, trained_tokens) = check_split(&prepared, Split::Train);
        let train = &summary.train;
        println!("{}: {} rows, padding {:.4}", task.file, train.rows, train.padding_fraction);
        assert_eq!((train.form.as_str(), train.records), (task.form, task.records), "{}", task.file);
        assert_eq!(
            (train.samples, tokens, trained_tokens),
            (task.samples, task.tokens, task.trained_tokens),
            "{}",
            task.file
        );
        assert_eq!((train.truncated, train.dropped.total()), (0, 0), "{}", task.file);
        assert!(
            train.padding_fraction < 0.05 || train.rows < 60,
            "{}: {}",
            task.file,
            train.padding_fraction
        );
    }
}
