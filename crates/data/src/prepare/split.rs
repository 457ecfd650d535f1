//! One split: records in, rows out.

use std::{fmt::Write, path::PathBuf};

use rayon::{ThreadPool, prelude::*};

use super::{Looked, PrepareOptions, Progress, Report, Stage, TrainSource};
use crate::{
    Error, Format, Place, Row, SourceSummary, Split, SplitSummary, Tokenizer,
    artefact::{FileEntry, SplitWriter},
    form::{Form, Reading},
    mix,
    pack::Packer,
    sample::{self, DropReason, Outcome},
    source::{self, Batch, Raw, Source},
};

/// A source and the files that it leads to.
#[derive(Debug, Clone)]
pub(super) struct SourceFiles {
    path: String,
    format: Format,
    weight: Option<f64>,
    pub(super) files: Vec<PathBuf>,
}

impl SourceFiles {
    /// Finds the files of a training source.
    pub(super) fn find(options: &PrepareOptions, source: &TrainSource) -> Result<Self, Error> {
        let files = source::expand(&source.path)?;
        let format = source.format.unwrap_or(options.format);
        Ok(Self { path: source.path.clone(), format, weight: source.weight, files })
    }

    /// Finds the files of held-out data.
    pub(super) fn find_eval(options: &PrepareOptions, path: &str) -> Result<Self, Error> {
        Ok(Self { path: path.to_owned(), format: options.format, weight: None, files: source::expand(path)? })
    }
}

/// What became of a split.
pub(super) struct Built {
    pub(super) summary: SplitSummary,
    pub(super) files: Vec<FileEntry>,
    pub(super) warnings: Vec<String>,
}

/// Makes the rows of a split.
pub(super) struct SplitBuilder<'a> {
    options: &'a PrepareOptions,
    tokenizer: &'a Tokenizer,
    split: Split,
    /// Absent where rows are only looked at.
    writer: Option<SplitWriter>,
    packer: Packer,
    summary: SplitSummary,
    answers: Answers,
    /// Forms of the sources so far, each once.
    forms: Vec<Form>,
    files_before: u32,
}

/// How conversations end, for the warning about models that never learn to stop.
#[derive(Debug, Default)]
struct Answers {
    conversations: u64,
    without_end: u64,
}

impl<'a> SplitBuilder<'a> {
    pub(super) fn new(
        options: &'a PrepareOptions,
        tokenizer: &'a Tokenizer,
        split: Split,
        writer: Option<SplitWriter>,
    ) -> Self {
        Self {
            options,
            tokenizer,
            split,
            writer,
            packer: Packer::new(options.max_length, options.packing)
                .with_virtual_tokens(options.virtual_tokens),
            summary: SplitSummary::default(),
            answers: Answers::default(),
            forms: Vec::new(),
            files_before: 0,
        }
    }

    /// Longest sample, tokens: what a row has room for besides an adapter's virtual tokens.
    fn longest(&self) -> u32 {
        self.options.max_length - self.options.virtual_tokens
    }

    /// Reads all sources, at most so many records of each; says whether it saw all of them.
    pub(super) fn run(
        &mut self,
        threads: &ThreadPool,
        sources: &[SourceFiles],
        most_records: u64,
        progress: Report<'_>,
    ) -> Result<bool, Error> {
        let files = || sources.iter().flat_map(|source| &source.files);
        let mut report = Progress {
            stage: Stage::Tokenising(self.split),
            bytes_done: 0,
            bytes_total: files().map(|path| source::size(path)).sum::<Result<u64, Error>>()?,
            samples: 0,
        };
        let mut saw_all = true;
        for source in sources {
            let (rows, tokens, trained) =
                (self.packer.rows(), self.summary.tokens, self.summary.trained_tokens);
            let (form, saw) = self.source(threads, source, most_records, &mut report, progress)?;
            saw_all &= saw;
            let rows = self.packer.rows() - rows;
            if sources.len() > 1 {
                if rows == 0 && saw {
                    let reason =
                        format!("`{}` gives no row: {}", source.path, drops(&self.summary, self.longest()));
                    return Err(Error::NothingToTrain { split: self.split, reason });
                }
                self.summary.sources.push(SourceSummary {
                    path: source.path.clone(),
                    form: form.name().to_owned(),
                    weight: source.weight,
                    rows,
                    rows_per_epoch: rows,
                    tokens: self.summary.tokens - tokens,
                    trained_tokens: self.summary.trained_tokens - trained,
                });
            }
        }
        Ok(saw_all)
    }

    /// Reads a source, tokenises in parallel, packs and writes in input order. Rows are of one source alone.
    fn source(
        &mut self,
        threads: &ThreadPool,
        source: &SourceFiles,
        most_records: u64,
        report: &mut Progress,
        progress: Report<'_>,
    ) -> Result<(Form, bool), Error> {
        let reading = self.reading(source)?;
        let mut input = Source::new(source.files.clone(), reading.form.read_columns());
        let (bytes_before, records_before) = (report.bytes_done, self.summary.records);
        let mut saw_all = true;
        while let Some(mut batch) = input.next_batch()? {
            let left = most_records.saturating_sub(self.summary.records - records_before);
            if (batch.records.len() as u64) > left {
                batch.records.truncate(left as usize);
                saw_all = false;
            }
            let file = batch.file;
            for (line, outcome) in threads.install(|| self.tokenise(batch, reading, &source.files)) {
                let place = Place { file: source.files[file as usize].clone(), line };
                self.take(self.files_before + file, &place, outcome?)?;
            }
            report.bytes_done = bytes_before + input.bytes_done();
            report.samples = self.summary.samples;
            progress(report);
            if !saw_all {
                break;
            }
        }
        while let Some(row) = self.packer.finish() {
            self.write(&row)?;
        }
        report.bytes_done = bytes_before + input.bytes_done();
        self.files_before += source.files.len() as u32;
        Ok((reading.form, saw_all))
    }

    /// Looks at the first record to see what form the rows of a source have.
    fn reading(&mut self, source: &SourceFiles) -> Result<Reading, Error> {
        let no_file = || Error::NoInput { pattern: source.path.clone(), reason: "no file".to_owned() };
        let (place, columns) = source::first_columns(source.files.first().ok_or_else(no_file)?)?;
        let form = Form::detect(source.format, &columns, place)?;
        let reading = form.reading(self.options.chat_template, self.tokenizer.has_chat_template())?;
        if reading.is_rendered {
            self.tokenizer.check_template()?;
        }
        self.summary.files += source.files.len() as u64;
        let is_new = |column: &&String| {
            !form.read_columns().contains(&column.as_str()) && !self.summary.ignored_columns.contains(column)
        };
        let ignored: Vec<String> = columns.iter().filter(is_new).cloned().collect();
        self.summary.ignored_columns.extend(ignored);
        if !self.forms.contains(&form) {
            self.forms.push(form);
        }
        Ok(reading)
    }

    /// Ends the split: files, figures, warnings.
    pub(super) fn finish(self) -> Result<Built, Error> {
        match self.refusal() {
            Some(refusal) => Err(refusal),
            None => self.build(),
        }
    }

    /// The same of data that is only looked at: what would be refused is told beside the figures.
    pub(super) fn survey(self) -> Result<(Built, Option<Error>), Error> {
        let refusal = self.refusal();
        Ok((self.build()?, refusal))
    }

    fn build(mut self) -> Result<Built, Error> {
        self.summary.form = self.forms.iter().map(|form| form.name()).collect::<Vec<_>>().join(" + ");
        self.summary.set_padding(self.options.max_length, self.options.virtual_tokens);
        let weights: Vec<(u64, f64)> =
            self.summary.sources.iter().filter_map(|source| Some((source.rows, source.weight?))).collect();
        for (source, part) in self.summary.sources.iter_mut().zip(mix::deal(&weights)) {
            source.rows_per_epoch = part.rows_per_epoch;
        }
        let warnings = self.warnings();
        let files = match self.writer {
            Some(writer) => writer.finish()?.into(),
            None => Vec::new(),
        };
        Ok(Built { files, warnings, summary: self.summary })
    }

    /// Refuses data from which nothing is learnt, and data from which a model never learns to stop.
    fn refusal(&self) -> Option<Error> {
        let (split, summary) = (self.split, &self.summary);
        if summary.rows == 0 {
            let reason = drops(summary, self.longest());
            let dropped = &summary.dropped;
            return Some(match dropped.no_answer + dropped.unweighted {
                masked if masked > 0 && dropped.truncated_away == 0 => Error::AllMasked { split, reason },
                _ => Error::NothingToTrain { split, reason },
            });
        }
        let holds_answers = self.forms.iter().any(|form| *form != Form::Text);
        if split == Split::Train
            && self.options.require_end_token
            && holds_answers
            && summary.samples_with_end == 0
        {
            return Some(Error::EndNeverTrained { samples: summary.samples, reason: self.why_no_end() });
        }
        None
    }

    /// Why no end token is trained.
    fn why_no_end(&self) -> String {
        let name =
            |id: u32| self.tokenizer.token(id).map_or_else(|| id.to_string(), |token| format!("`{token}`"));
        let ends: Vec<String> = self.tokenizer.stop_ids().iter().map(|id| name(*id)).collect();
        if ends.is_empty() {
            return "neither tokenizer nor model names an end token".to_owned();
        }
        let pads = self.tokenizer.pad().filter(|pad| self.tokenizer.stop_ids().contains(pad));
        let pads = pads.map(|pad| format!(" ({} is the padding token too)", name(pad))).unwrap_or_default();
        let ends = ends.join(", ");
        if self.summary.truncated > 0 && self.answers.without_end < self.answers.conversations.max(1) {
            let (cut, length) = (self.summary.truncated, self.longest());
            return format!("{cut} records lost their end ({ends}) beyond {length} tokens{pads}");
        }
        format!("the chat template ends answers with none of {ends}{pads}")
    }

    /// What becomes of each record of a batch, in order.
    fn tokenise(
        &self,
        batch: Batch,
        reading: Reading,
        files: &[PathBuf],
    ) -> Vec<(u64, Result<Outcome, Error>)> {
        let file = &files[batch.file as usize];
        batch
            .records
            .into_par_iter()
            .map(|(line, raw)| (line, self.record(raw, reading, || Place { file: file.clone(), line })))
            .collect()
    }

    fn record(&self, raw: Raw, reading: Reading, place: impl Fn() -> Place) -> Result<Outcome, Error> {
        self.record_of_length(raw, reading, self.longest() as usize, place)
    }

    fn record_of_length(
        &self,
        raw: Raw,
        reading: Reading,
        max_length: usize,
        place: impl Fn() -> Place,
    ) -> Result<Outcome, Error> {
        let record = source::object(raw, &place)?;
        let content = reading.content(record, &place)?;
        sample::make(&content, self.tokenizer, self.options.train_on, max_length)
            .map_err(|error| error.at(&place))
    }

    /// Looks at some records, by their numbers from 0 over all sources, ascending.
    pub(super) fn look(&mut self, sources: &[SourceFiles], wanted: &[u64]) -> Result<Vec<Looked>, Error> {
        let mut wanted = wanted.iter().copied().peekable();
        let mut found = Vec::new();
        let mut number = 0;
        for source in sources {
            let reading = self.reading(source)?;
            let mut input = Source::new(source.files.clone(), reading.form.read_columns());
            while wanted.peek().is_some() {
                let Some(batch) = input.next_batch()? else { break };
                for (line, raw) in batch.records {
                    if wanted.next_if_eq(&number).is_some() {
                        let place = Place { file: source.files[batch.file as usize].clone(), line };
                        found.push(self.look_at(raw, reading, place)?);
                    }
                    number += 1;
                }
            }
        }
        Ok(found)
    }

    /// A record as a whole, and what would become of it.
    fn look_at(&self, raw: Raw, reading: Reading, place: Place) -> Result<Looked, Error> {
        /// Longer than any record, and far from where sums overflow.
        const WHOLE: usize = u32::MAX as usize;
        let outcome = self.record_of_length(raw, reading, WHOLE, || place.clone())?;
        let max_length = self.longest();
        let Some(sample) = outcome.samples.into_iter().next() else {
            let what = outcome.dropped.map_or("empty", DropReason::name).to_owned();
            return Ok(Looked { place, what, token_ids: outcome.left_out, trained: Vec::new() });
        };
        let is_long = sample.ids.len() > max_length as usize;
        let is_lost = sample.trained.iter().all(|range| range.start >= max_length);
        let what = match (is_long, reading.form) {
            (false, _) => "kept",
            (true, Form::Text) => "cut",
            (true, _) if is_lost => DropReason::TruncatedAway.name(),
            (true, _) => "truncated",
        };
        Ok(Looked { place, what: what.to_owned(), token_ids: sample.ids, trained: sample.trained })
    }

    fn take(&mut self, file: u32, place: &Place, outcome: Outcome) -> Result<(), Error> {
        let summary = &mut self.summary;
        summary.records += 1;
        summary.count_length(outcome.tokens);
        summary.truncated += u64::from(outcome.truncated_tokens > 0);
        summary.truncated_tokens += outcome.truncated_tokens;
        summary.truncated_trained_tokens += outcome.truncated_trained_tokens;
        summary.merged_boundaries += u64::from(outcome.merged_boundary);
        summary.cut += u64::from(outcome.samples.len() > 1);
        summary.samples_with_end += u64::from(outcome.trains_end);
        match outcome.dropped {
            Some(DropReason::Empty) => summary.dropped.empty += 1,
            Some(DropReason::NoAnswer) => summary.dropped.no_answer += 1,
            Some(DropReason::Unweighted) => summary.dropped.unweighted += 1,
            Some(DropReason::TruncatedAway) => summary.dropped.truncated_away += 1,
            None => {}
        }
        let cut_off = (outcome.truncated_tokens > 0).then_some("truncated");
        let what = outcome.dropped.map(DropReason::name).or(cut_off);
        if let Some(what) = what {
            summary.keep_example(what, &place.file, place.line, outcome.tokens);
        }
        if let Some(last) = outcome.last_answer_token {
            self.answers.conversations += 1;
            self.answers.without_end += u64::from(!self.tokenizer.is_special(last));
        }
        for (part, sample) in outcome.samples.into_iter().enumerate() {
            self.summary.samples += 1;
            if let Some(writer) = &mut self.writer {
                writer.sample(file, part as u32, place.line)?;
            }
            if let Some(row) = self.packer.push(sample) {
                self.write(&row)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, row: &Row) -> Result<(), Error> {
        self.summary.rows += 1;
        self.summary.tokens += row.token_ids.len() as u64;
        self.summary.trained_tokens += u64::from(row.trained_tokens());
        match &mut self.writer {
            Some(writer) => writer.row(row),
            None => Ok(()),
        }
    }

    /// What a user should know before training on this.
    fn warnings(&self) -> Vec<String> {
        let (split, summary) = (self.split, &self.summary);
        let mut warnings = Vec::new();
        if summary.dropped.total() > 0 {
            warnings.push(format!("{split}: {}", drops(summary, self.longest())));
        }
        if summary.truncated_trained_tokens > 0 {
            warnings.push(format!(
                "{split}: {} of {} records are longer than {} tokens and lost their end, with {} tokens to be trained",
                summary.truncated, summary.records, self.longest(), summary.truncated_trained_tokens
            ));
        }
        if self.answers.without_end > 0 {
            warnings.push(format!(
                "{split}: {} of {} conversations do not end in an end token: the model does not learn there to stop",
                self.answers.without_end, self.answers.conversations
            ));
        }
        if self.forms == [Form::Text] && self.tokenizer.eos().is_none() {
            warnings
                .push(format!("{split}: the tokenizer names no end token: the model does not learn to stop"));
        } else if self.answers.without_end == 0 && summary.samples_with_end == 0 && split == Split::Train {
            warnings.push(format!("{split}: no end token is trained: the model does not learn to stop"));
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
        (dropped.unweighted, "hold only answers of weight 0".to_owned()),
        (dropped.truncated_away, format!("hold nothing to be trained within {max_length} tokens")),
    ];
    for (index, (count, reason)) in reasons.iter().filter(|(count, _)| *count > 0).enumerate() {
        let separator = if index == 0 { ": " } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{count} {reason}");
    }
    text
}
