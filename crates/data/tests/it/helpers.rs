//! Folders and options that the tests share.

use std::{
    fs,
    path::{Path, PathBuf},
};

use shanty_data::{Format, PrepareOptions, Prepared, Row, Split, Summary, prepare};
use tempfile::TempDir;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The reference cases.
pub fn reference() -> PathBuf {
    root().join("crates/testkit/fixtures/reference")
}

/// The small real model; only its tokenizer is read here.
pub fn tiny_llama() -> PathBuf {
    root().join("examples/tiny-llama-14m")
}

/// A folder for one test, with a model folder, data files and a prepared folder in it.
pub struct Bench {
    folder: TempDir,
    pub options: PrepareOptions,
}

impl Bench {
    /// With the tokenizer of the small real model.
    pub fn new() -> Self {
        Self::with_model(&tiny_llama())
    }

    /// With a model folder of its own, in which the tokenizer of a reference case lies.
    pub fn with_fixture(case: &str) -> Self {
        let mut bench = Self::with_model(Path::new("unset"));
        let model = bench.path("model");
        fs::create_dir(&model).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(reference().join(case).join(file), model.join(file)).unwrap();
        }
        bench.options.model_dir = model;
        bench
    }

    fn with_model(model: &Path) -> Self {
        let folder = TempDir::new().unwrap();
        let options = PrepareOptions {
            model_dir: model.to_owned(),
            train: folder.path().join("train.jsonl").to_str().unwrap().to_owned(),
            eval: None,
            format: Format::Auto,
            max_length: 256,
            packing: true,
            virtual_tokens: 0,
            template_time: None,
            out: folder.path().join("prepared"),
            threads: 2,
        };
        Self { folder, options }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into the folder.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Writes `train.jsonl`.
    pub fn train(self, text: impl AsRef<[u8]>) -> Self {
        self.write("train.jsonl", text);
        self
    }

    /// Changes keys of the model's `tokenizer_config.json`.
    pub fn tokenizer_config(self, changes: serde_json::Value) -> Self {
        let path = self.options.model_dir.join("tokenizer_config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        fs::write(&path, config.to_string()).unwrap();
        self
    }

    pub fn prepare(&self) -> Result<Summary, shanty_data::Error> {
        prepare(&self.options, &mut |_| {})
    }

    /// Prepares, opens, and gives all rows of the training split.
    pub fn rows(&self) -> (Summary, Vec<Row>) {
        let summary = self.prepare().unwrap();
        let prepared = Prepared::open(&self.options.out).unwrap();
        assert_eq!(*prepared.summary(), summary);
        (summary, rows_of(&prepared, Split::Train))
    }
}

/// All rows of a split.
pub fn rows_of(prepared: &Prepared, split: Split) -> Vec<Row> {
    (0..prepared.rows(split)).map(|id| prepared.row(split, id).unwrap()).collect()
}

/// The positions of a row that are targets.
pub fn positions(row: &Row) -> Vec<usize> {
    row.trained.iter().cloned().flatten().map(|position| position as usize).collect()
}

/// Checks what holds for any prepared split, and gives (tokens, trained tokens).
pub fn check_split(prepared: &Prepared, split: Split) -> (u64, u64) {
    let summary = prepared.summary().split(split).unwrap();
    let max_length = prepared.summary().max_length as usize;
    let (mut tokens, mut trained) = (0, 0);
    let mut samples = vec![false; summary.samples as usize];
    for (id, row) in rows_of(prepared, split).iter().enumerate() {
        assert_eq!(row.id, id as u64);
        assert!((2..=max_length).contains(&row.token_ids.len()));
        assert_eq!(prepared.trained_tokens(split, row.id).unwrap(), row.trained_tokens());
        let sources = prepared.samples_of_row(split, row.id).unwrap();
        assert_eq!(sources.len(), row.segments.len());
        let mut start = 0;
        for (segment, source) in row.segments.iter().zip(&sources) {
            assert_eq!(segment.sample_id, source.sample_id);
            let twice = std::mem::replace(&mut samples[segment.sample_id as usize], true);
            assert!(!twice, "sample {} is in two rows", segment.sample_id);
            let end = start + segment.length;
            let here = positions(row).into_iter().filter(|at| (start..end).contains(&(*at as u32)));
            assert!(here.clone().count() > 0, "a segment without target");
            assert!(here.clone().all(|at| at as u32 != start), "a segment's first token is a target");
            start = end;
        }
        assert_eq!(start as usize, row.token_ids.len());
        assert!(row.trained.iter().is_sorted_by(|a, b| a.end < b.start));
        tokens += row.token_ids.len() as u64;
        trained += u64::from(row.trained_tokens());
    }
    assert!(samples.iter().all(|seen| *seen), "a sample is in no row");
    assert_eq!((tokens, trained), (summary.tokens, summary.trained_tokens));
    (tokens, trained)
}
