//! From a record to samples: tokens, and which of them are targets. Targets go by position, never by id, so that
//! an end token that is also the padding token is trained like any other.

use std::ops::Range;

use crate::{
    Encoded, Error, Tokenizer, TrainOn,
    form::{Content, Conversation},
};

/// A sample: at least 2 tokens, at least one of them a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) ids: Vec<u32>,
    /// Ascending, disjoint, not touching; never holds 0.
    pub(crate) trained: Vec<Range<u32>>,
}

/// Why a record became no sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DropReason {
    Empty,
    NoAnswer,
    Unweighted,
    TruncatedAway,
}

impl DropReason {
    /// As figures and reports have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::NoAnswer => "no_answer",
            Self::Unweighted => "unweighted",
            Self::TruncatedAway => "truncated_away",
        }
    }
}

/// What became of a record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) samples: Vec<Sample>,
    pub(crate) dropped: Option<DropReason>,
    /// Tokens of the record before anything was cut or dropped.
    pub(crate) tokens: u64,
    /// The tokens of a record that became no sample.
    pub(crate) left_out: Vec<u32>,
    /// Whether a token that ends generation is a target of one of the samples.
    pub(crate) trains_end: bool,
    pub(crate) truncated_tokens: u64,
    pub(crate) truncated_trained_tokens: u64,
    pub(crate) merged_boundary: bool,
    /// The last target of a conversation, where it is the end of an answer.
    pub(crate) last_answer_token: Option<u32>,
}

impl Outcome {
    fn drop(reason: DropReason) -> Self {
        Self { dropped: Some(reason), ..Self::default() }
    }
}

/// Makes samples of at most `max_length` tokens (2 or more) of a record.
pub(crate) fn make(
    content: &Content,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
    max_length: usize,
) -> Result<Outcome, Error> {
    let mut outcome = match content {
        Content::Text(text) => document(text, tokenizer, max_length),
        Content::Pair { prompt, completion } => pair(prompt, completion, tokenizer, train_on, max_length),
        Content::Conversation(said) => conversation(said, tokenizer, train_on, max_length),
    }?;
    outcome.trains_end = outcome.samples.iter().any(|sample| trains_end(sample, tokenizer));
    Ok(outcome)
}

fn trains_end(sample: &Sample, tokenizer: &Tokenizer) -> bool {
    let ends = tokenizer.stop_ids();
    let targets =
        sample.trained.iter().flat_map(|range| &sample.ids[range.start as usize..range.end as usize]);
    targets.into_iter().any(|id| ends.contains(id))
}

/// A text: every token but the first is a target. Longer ones are cut into consecutive samples.
fn document(text: &str, tokenizer: &Tokenizer, max_length: usize) -> Result<Outcome, Error> {
    if text.is_empty() {
        return Ok(Outcome::drop(DropReason::Empty));
    }
    let mut ids = tokenizer.encode(text, true)?;
    append_end(&mut ids, tokenizer);
    if ids.len() < 2 {
        return Ok(Outcome::drop(DropReason::Empty));
    }
    let samples = cuts(ids.len(), max_length)
        .map(|cut| Sample { trained: vec![1..cut.len() as u32], ids: ids[cut].to_vec() })
        .collect();
    Ok(Outcome { samples, tokens: ids.len() as u64, ..Outcome::default() })
}

/// Cuts `length` tokens into pieces of `max_length`; the last may be shorter, but none has a single token.
fn cuts(length: usize, max_length: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = length - start;
        if left == 0 {
            return None;
        }
        // A single token left over could not be a target: it takes one along (pieces of 2 cannot spare it).
        let spare = usize::from(left == max_length + 1 && max_length > 2);
        let piece = start..start + left.min(max_length - spare);
        start = piece.end;
        Some(piece)
    })
    .filter(|piece| piece.len() > 1)
}

/// Prompt and completion, tokenised as one text, as TRL does: the completion and the end token are targets.
///
/// Where a token holds the end of the prompt and the start of the completion, it is a target.
fn pair(
    prompt: &str,
    completion: &str,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
    max_length: usize,
) -> Result<Outcome, Error> {
    let text = [prompt, completion].concat();
    let mut encoded = tokenizer.encode_with_offsets(&text, true)?;
    let answer = prompt.len()..text.len();
    let tokens = overlapping(&encoded, &answer);
    let start = tokens.as_ref().map_or(encoded.ids.len(), |tokens| tokens.start);
    let merged_boundary = tokens.is_some_and(|tokens| encoded.offsets[tokens.start].start < answer.start);
    append_end(&mut encoded.ids, tokenizer);
    if encoded.ids.len() < 2 || start == encoded.ids.len() {
        return Ok(Outcome::drop(DropReason::Empty));
    }
    let start = if train_on == TrainOn::All { 0 } else { start as u32 };
    let targets = vec![start..encoded.ids.len() as u32];
    Ok(Outcome { merged_boundary, ..whole(encoded.ids, targets, max_length, DropReason::Empty) })
}

/// A conversation by the chat template: what the assistant wrote, end tokens included, are targets.
fn conversation(
    said: &Conversation,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
    max_length: usize,
) -> Result<Outcome, Error> {
    let rendered = tokenizer.render_trained(&said.messages, said.tools.as_ref(), &said.trained)?;
    let encoded = tokenizer.encode_with_offsets(&rendered.text, false)?;
    let targets = match train_on {
        TrainOn::Answers => targets(&encoded, &rendered.answers),
        TrainOn::All => all_but_left_out(said, tokenizer, &encoded, &rendered.answers)?,
    };
    let last_answer_token = targets.last().map(|range| encoded.ids[range.end as usize - 1]);
    let answers =
        said.messages.iter().zip(&said.trained).filter(|(message, _)| message["role"] == "assistant");
    let is_left_out = answers.clone().count() > 0 && answers.clone().all(|(_, trained)| !trained);
    let without = if is_left_out { DropReason::Unweighted } else { DropReason::NoAnswer };
    Ok(Outcome { last_answer_token, ..whole(encoded.ids, targets, max_length, without) })
}

/// Every token of a conversation but those of answers whose weight is 0.
fn all_but_left_out(
    said: &Conversation,
    tokenizer: &Tokenizer,
    encoded: &Encoded,
    kept: &[Range<usize>],
) -> Result<Vec<Range<u32>>, Error> {
    let others = said
        .messages
        .iter()
        .zip(&said.trained)
        .position(|(message, trained)| !trained && message["role"] != "assistant");
    if let Some(index) = others {
        let reason = format!(
            "`all` trains what everybody says, and message {} has weight 0: only the assistant's can be left out",
            index + 1
        );
        return Err(Error::Impossible { option: "train_on", reason });
    }
    let length = encoded.ids.len() as u32;
    if said.trained.iter().all(|trained| *trained) {
        return Ok(vec![0..length]);
    }
    let everything = tokenizer.render_answers(&said.messages, said.tools.as_ref())?;
    let left_out: Vec<Range<usize>> =
        everything.answers.into_iter().filter(|answer| !kept.contains(answer)).collect();
    let mut trained = Vec::new();
    let mut start = 0;
    for gap in targets(encoded, &left_out) {
        trained.push(start..gap.start);
        start = gap.end;
    }
    trained.push(start..length);
    trained.retain(|range| !range.is_empty());
    Ok(trained)
}

/// The tokens that overlap some ranges of the text.
pub(crate) fn targets(encoded: &Encoded, answers: &[Range<usize>]) -> Vec<Range<u32>> {
    let mut targets: Vec<Range<u32>> = Vec::new();
    for tokens in answers.iter().filter_map(|answer| overlapping(encoded, answer)) {
        let (start, end) = (tokens.start as u32, tokens.end as u32);
        match targets.last_mut() {
            // Neighbouring answers may share a token.
            Some(last) if start <= last.end => last.end = end,
            _ => targets.push(start..end),
        }
    }
    targets
}

/// From the first to the last token that overlaps a range of the text.
fn overlapping(encoded: &Encoded, range: &Range<usize>) -> Option<Range<usize>> {
    let overlaps = |offsets: &Range<usize>| offsets.start < range.end && offsets.end > range.start;
    let first = encoded.offsets.iter().position(overlaps)?;
    let last = encoded.offsets.iter().rposition(overlaps)?;
    Some(first..last + 1)
}

/// Ends a text with the end token, unless it does already.
fn append_end(ids: &mut Vec<u32>, tokenizer: &Tokenizer) {
    if let Some(eos) = tokenizer.eos()
        && ids.last() != Some(&eos)
    {
        ids.push(eos);
    }
}

/// One sample of all tokens, without its end if it is too long.
fn whole(mut ids: Vec<u32>, targets: Vec<Range<u32>>, max_length: usize, without: DropReason) -> Outcome {
    // The first token has nothing to be predicted from.
    let targets = clip(&targets, 1, u32::MAX);
    let length = ids.len();
    if targets.is_empty() {
        return Outcome { tokens: length as u64, left_out: ids, ..Outcome::drop(without) };
    }
    ids.truncate(max_length);
    let trained = clip(&targets, 1, ids.len() as u32);
    let mut outcome = Outcome {
        tokens: length as u64,
        truncated_tokens: (length - ids.len()) as u64,
        truncated_trained_tokens: count(&targets) - count(&trained),
        ..Outcome::default()
    };
    if trained.is_empty() {
        outcome.dropped = Some(DropReason::TruncatedAway);
    } else {
        outcome.samples.push(Sample { ids, trained });
    }
    outcome
}

fn clip(ranges: &[Range<u32>], start: u32, end: u32) -> Vec<Range<u32>> {
    let clipped = ranges.iter().map(|range| range.start.max(start)..range.end.min(end));
    clipped.filter(|range| !range.is_empty()).collect()
}

fn count(ranges: &[Range<u32>]) -> u64 {
    ranges.iter().map(|range| u64::from(range.end - range.start)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cuts_lose_no_token(length in 2usize..400, max_length in 3usize..60) {
            let pieces: Vec<_> = cuts(length, max_length).collect();
            prop_assert!(pieces.iter().all(|piece| (2..=max_length).contains(&piece.len())));
            let tokens: Vec<usize> = pieces.into_iter().flatten().collect();
            prop_assert_eq!(tokens, (0..length).collect::<Vec<_>>());
        }
    }

    #[test]
    fn over_long_samples_lose_their_end_and_say_so() {
        let ids: Vec<u32> = (0..10).collect();
        let outcome = whole(ids.clone(), vec![2..4, 6..10], 7, DropReason::NoAnswer);
        assert_eq!(outcome.samples, [Sample { ids: (0..7).collect(), trained: vec![2..4, 6..7] }]);
        assert_eq!((outcome.truncated_tokens, outcome.truncated_trained_tokens), (3, 3));
        let outcome = whole(ids.clone(), vec![6..10, 10..11], 6, DropReason::NoAnswer);
        assert_eq!(outcome.dropped, Some(DropReason::TruncatedAway));
        let outcome = whole(ids, vec![0..1], 6, DropReason::NoAnswer);
        assert_eq!(outcome.dropped, Some(DropReason::NoAnswer));
    }
}
