//! From a record to samples: tokens, and which of them are targets. Targets go by position, never by id, so that
//! an end token that is also the padding token is trained like any other.

use std::ops::Range;

use serde_json::Value;

use crate::{Encoded, Error, Tokenizer, form::Content};

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
    TruncatedAway,
}

/// What became of a record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) samples: Vec<Sample>,
    pub(crate) dropped: Option<DropReason>,
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
pub(crate) fn make(content: &Content, tokenizer: &Tokenizer, max_length: usize) -> Result<Outcome, Error> {
    match content {
        Content::Text(text) => document(text, tokenizer, max_length),
        Content::Pair { prompt, completion } => pair(prompt, completion, tokenizer, max_length),
        Content::Messages { messages, tools } => {
            conversation(messages, tools.as_ref(), tokenizer, max_length)
        }
    }
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
    Ok(Outcome { samples, ..Outcome::default() })
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
fn pair(prompt: &str, completion: &str, tokenizer: &Tokenizer, max_length: usize) -> Result<Outcome, Error> {
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
    let end = encoded.ids.len() as u32;
    let targets = vec![start as u32..end];
    Ok(Outcome { merged_boundary, ..whole(encoded.ids, targets, max_length, DropReason::Empty) })
}

/// A conversation by the chat template: what the assistant wrote, end tokens included, are targets.
fn conversation(
    messages: &[Value],
    tools: Option<&Value>,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Outcome, Error> {
    let rendered = tokenizer.render_answers(messages, tools)?;
    let encoded = tokenizer.encode_with_offsets(&rendered.text, false)?;
    let targets = targets(&encoded, &rendered.answers);
    let last_answer_token = targets.last().map(|range| encoded.ids[range.end as usize - 1]);
    Ok(Outcome { last_answer_token, ..whole(encoded.ids, targets, max_length, DropReason::NoAnswer) })
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
    if targets.is_empty() {
        return Outcome::drop(without);
    }
    let length = ids.len();
    ids.truncate(max_length);
    let trained = clip(&targets, 1, ids.len() as u32);
    let mut outcome = Outcome {
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
