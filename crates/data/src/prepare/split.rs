//! One split: records in, rows out.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use rayon::{ThreadPool, prelude::*};

use super::{PrepareOptions, Progress, Report, Stage};
use crate::{
    Error, Place, Row, Split, SplitSummary, Tokenizer,
    artefact::{FileEntry, SplitWriter},
    form::Form,
    pack::Packer,
    sample::{self, DropReason, Outcome},
    source::{self, Batch, Raw, Source},
};

/// What became of a split.
pub(super) struct Built {
    pub(super) summary: SplitSummary,
    pub(super) files: [FileEntry; 3],
    pub(super) warnings: Vec<String>,
}

/// Makes the rows of a split.
pub(super) struct SplitBuilder<'a> {
    tokenizer: &'a Tokenizer,
    split: Split,
    paths: &'a [PathBuf],
    form: Form,
    packer: Packer,
    summary: SplitSummary,
    /// Longest sample, tokens.
    max_length: u32,
    /// What each sample takes up besides.
    virtual_tokens: u32,
    answers: Answers,
}

/// How conversations end, for the warning about models that never learn to stop.
#[derive(Debug, Default)]
struct Answers {
    conversations: u64,
    without_end: u64,
}

impl<'a> SplitBuilder<'a> {
    /// Looks at the first record to see what form the rows have.
    pub(super) fn new(
        options: &PrepareOptions,
        tokenizer: &'a Tokenizer,
        split: Split,
        paths: &'a [PathBuf],
    ) -> Result<Self, Error> {
        let no_file = || Error::NoInput { pattern: split.to_string(), reason: "no file".to_owned() };
        let (place, columns) = source::first_columns(paths.first().ok_or_else(no_file)?)?;
        let form = Form::detect(options.format, &columns, place)?;
        if form == Form::Messages {
            tokenizer.check_template()?;
        }
        let is_read = |column: &String| form.read_columns().contains(&column.as_str());
        let summary = SplitSummary {
            form: form.name().to_owned(),
            files: paths.len() as u64,
            ignored_columns: columns.iter().filter(|column| !is_read(column)).cloned().collect(),
            ..SplitSummary::default()
        };
        Ok(Self {
            tokenizer,
            split,
            paths,
            form,
            packer: Packer::new(options.max_length, options.packing)
                .with_virtual_tokens(options.virtual_tokens),
            summary,
            max_length: options.max_length - options.virtual_tokens,
            virtual_tokens: options.virtual_tokens,
            answers: Answers::default(),
        })
    }

    /// Reads, tokenises in parallel, packs and writes in input order.
    pub(super) fn run(
        mut self,
        threads: &ThreadPool,
        folder: &Path,
        progress: Report<'_>,
    ) -> Result<Built, Error> {
        let bytes_total = self.paths.iter().map(|path| source::size(path)).sum::<Result<u64, Error>>()?;
        let mut source = Source::new(self.paths.to_vec(), self.form.read_columns());
        let mut writer = SplitWriter::create(folder, self.split)?;
        while let Some(batch) = source.next_batch()? {
            let file = batch.file;
            for (line, outcome) in threads.install(|| self.tokenise(batch)) {
                self.take(file, line, outcome?, &mut writer)?;
            }
            progress(&Progress {
                stage: Stage::Tokenising(self.split),
                bytes_done: source.bytes_done(),
                bytes_total,
                samples: self.summary.samples,
            });
        }
        while let Some(row) = self.packer.finish() {
            self.write(&row, &mut writer)?;
        }
        if self.summary.rows == 0 {
            let reason = drops(&self.summary, self.max_length);
            return Err(Error::NothingToTrain { split: self.split, reason });
        }
        self.summary.set_padding(self.max_length + self.virtual_tokens, self.virtual_tokens);
        Ok(Built { files: writer.finish()?, warnings: self.warnings(), summary: self.summary })
    }

    /// What becomes of each record of a batch, in order.
    fn tokenise(&self, batch: Batch) -> Vec<(u64, Result<Outcome, Error>)> {
        let file = &self.paths[batch.file as usize];
        batch
            .records
            .into_par_iter()
            .map(|(line, raw)| (line, self.record(raw, || Place { file: file.clone(), line })))
            .collect()
    }

    fn record(&self, raw: Raw, place: impl Fn() -> Place) -> Result<Outcome, Error> {
        let record = source::object(raw, &place)?;
        let content = self.form.content(record, &place)?;
        sample::make(&content, self.tokenizer, self.max_length as usize).map_err(|error| error.at(&place))
    }

    fn take(
        &mut self,
        file: u32,
        line: u64,
        outcome: Outcome,
        writer: &mut SplitWriter,
    ) -> Result<(), Error> {
        let summary = &mut self.summary;
        summary.records += 1;
        summary.truncated += u64::from(outcome.truncated_tokens > 0);
        summary.truncated_tokens += outcome.truncated_tokens;
        summary.truncated_trained_tokens += outcome.truncated_trained_tokens;
        summary.merged_boundaries += u64::from(outcome.merged_boundary);
        summary.cut += u64::from(outcome.samples.len() > 1);
        match outcome.dropped {
            Some(DropReason::Empty) => summary.dropped.empty += 1,
            Some(DropReason::NoAnswer) => summary.dropped.no_answer += 1,
            Some(DropReason::TruncatedAway) => summary.dropped.truncated_away += 1,
            None => {}
        }
        if let Some(last) = outcome.last_answer_token {
            self.answers.conversations += 1;
            self.answers.without_end += u64::from(!self.tokenizer.is_special(last));
        }
        for (part, sample) in outcome.samples.into_iter().enumerate() {
            self.summary.samples += 1;
            writer.sample(file, part as u32, line)?;
            if let Some(row) = self.packer.push(sample) {
                self.write(&row, writer)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, row: &Row, writer: &mut SplitWriter) -> Result<(), Error> {
        self.summary.rows += 1;
        self.summary.tokens += row.token_ids.len() as u64;
        self.summary.trained_tokens += u64::from(row.trained_tokens());
        writer.row(row)
    }

    /// What a user should know before training on this.
    fn warnings(&self) -> Vec<String> {
        let (split, summary) = (self.split, &self.summary);
        let mut warnings = Vec::new();
        if summary.dropped.total() > 0 {
            warnings.push(format!("{split}: {}", drops(summary, self.max_length)));
        }
        if summary.truncated_trained_tokens > 0 {
            warnings.push(format!(
                "{split}: {} of {} records are longer than {} tokens and lost their end, with {} tokens to be trained",
                summary.truncated, summary.records, self.max_length, summary.truncated_trained_tokens
            ));
        }
        if self.answers.without_end > 0 {
            warnings.push(format!(
                "{split}: {} of {} conversations do not end in an end token: the model does not learn there to stop",
                self.answers.without_end, self.answers.conversations
            ));
        }
        if self.form != Form::Messages && self.tokenizer.eos().is_none() {
            warnings
                .push(format!("{split}: the tokenizer names no end token: the model does not learn to stop"));
        }
        warnings
    }
}

/// Which records became no sample, in words.
fn drops(summary: &SplitSummary, max_length: u32) -> String {
    let dropped = &summary.dropped;
    let mut text = format!("{} of {} records are left out", dropped.total(), summary.records);
    let reasons = [
        (dropped.empty, "have no text".to_owned()),
        (dropped.no_answer, "hold no answer of the assistant".to_owned()),
        (dropped.truncated_away, format!("hold nothing to be trained within {max_length} tokens")),
    ];
    for (index, (count, reason)) in reasons.iter().filter(|(count, _)| *count > 0).enumerate() {
        let separator = if index == 0 { ": " } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{count} {reason}");
    }
    text
}
