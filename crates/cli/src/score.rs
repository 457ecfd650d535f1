//! How often a model is right: by its choice among answers, and by what it says of itself.
//!
//! *Accuracy.* Each of a row's `choices` stands where the completion would (after the white space that the completion begins
//! with); its score is the log likelihood of its tokens, given the prompt and the tokens before, summed, not divided by
//! their number, without an end token. The row is right where the completion scores highest. A token that holds the end of
//! the prompt and the start of the choice counts as the choice's, as it does in training.
//!
//! *Exact match.* The prompt is continued, the likeliest token every time, until an end token; the row is right where the text
//! is the completion, white space around both aside.

use shanty_data::{Question, Tokenizer};
use shanty_peft_core::{
    batch::{Row, Segment},
    generate::{Request, SamplingOptions},
};

use crate::{
    bar::Bar,
    error::Error,
    failure::CommandResult,
    model::{Choice, Model, prompt_ids},
};

/// How many of how many rows are right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share {
    pub(crate) right: u64,
    pub(crate) rows: u64,
    /// What guessing would give; 0 where there is nothing to choose from.
    pub(crate) chance: f64,
}

impl Share {
    pub(crate) fn value(&self) -> f64 {
        self.right as f64 / self.rows.max(1) as f64
    }
}

/// A question, its choices as rows of tokens.
pub(crate) struct Scored {
    rows: Vec<Row>,
    right: usize,
}

/// Prepares the questions that have choices.
pub(crate) fn prepare(
    questions: &[Question],
    tokenizer: &Tokenizer,
    max_length: usize,
) -> CommandResult<Vec<Scored>> {
    let with_choices = questions.iter().filter(|question| !question.choices.is_empty());
    with_choices.map(|question| scored(question, tokenizer, max_length)).collect()
}

fn scored(question: &Question, tokenizer: &Tokenizer, max_length: usize) -> CommandResult<Scored> {
    let wrong = |reason: &str| Error::Choices {
        data: question.place.file.display().to_string(),
        row: question.place.line,
        reason: reason.to_owned(),
    };
    let Question { prompt, completion, choices, .. } = question;
    if choices.len() < 2 {
        return Err(wrong("there is nothing to choose from").into());
    }
    let answer = completion.trim();
    let Some(right) = choices.iter().position(|choice| choice.trim() == answer) else {
        return Err(wrong("its completion is none of its choices").into());
    };
    let space = &completion[..completion.len() - completion.trim_start().len()];
    let rows = choices.iter().enumerate().map(|(id, choice)| {
        let text = [prompt, space, choice.trim()].concat();
        let encoded = tokenizer.encode_with_offsets(&text, true)?;
        let overlaps =
            |offsets: &std::ops::Range<usize>| offsets.end > prompt.len() && offsets.start < text.len();
        let (first, last) =
            (encoded.offsets.iter().position(overlaps), encoded.offsets.iter().rposition(overlaps));
        let (Some(first), Some(last)) = (first, last) else {
            return Err(wrong("a choice has no token").into());
        };
        // What does not fit is left out at the front: the choice stands at the end.
        let start = (last + 1).saturating_sub(max_length);
        if first <= start {
            return Err(wrong("a choice has no token before it, or none that fits").into());
        }
        let token_ids = encoded.ids[start..=last].to_vec();
        let length = token_ids.len() as u32;
        let segments = vec![Segment { sample_id: id as u64, length }];
        let trained = std::iter::once((first - start) as u32..length).collect();
        Ok(Row { id: id as u64, token_ids, segments, trained })
    });
    Ok(Scored { rows: rows.collect::<CommandResult<_>>()?, right })
}

/// Questions that go through the model together.
const TOGETHER: usize = 16;

/// How often the right choice scores higher than all others. Of equals none counts: a model that knows nothing is not right.
pub(crate) fn accuracy(
    model: &mut Model,
    choice: Choice,
    questions: &[Scored],
    bar: &Bar,
) -> CommandResult<Share> {
    let (mut right, mut chance) = (0, 0.0);
    for (group, group_of) in questions.chunks(TOGETHER).enumerate() {
        let rows: Vec<Row> = group_of.iter().flat_map(|question| question.rows.clone()).collect();
        let all = model.row_losses(choice, &rows)?;
        let mut losses = all.as_slice();
        for question in group_of {
            let (own, rest) = losses.split_at(question.rows.len());
            losses = rest;
            let mine = own[question.right];
            let best = |(other, loss): (usize, &f64)| other == question.right || *loss > mine;
            right += u64::from(own.iter().enumerate().all(best));
            chance += 1.0 / own.len() as f64;
        }
        bar.at((group * TOGETHER + group_of.len()) as u64, questions.len() as u64);
    }
    let rows = questions.len() as u64;
    Ok(Share { right, rows, chance: chance / rows.max(1) as f64 })
}

/// Tokens that an answer may take beyond those of the completion: enough to see that it goes on.
const BEYOND: usize = 4;

/// How often the likeliest continuation is the completion.
pub(crate) fn exact_match(
    model: &mut Model,
    choice: Choice,
    questions: &[Question],
    tokenizer: &Tokenizer,
    bar: &Bar,
) -> CommandResult<Share> {
    let mut right = 0;
    for (group, questions_of_group) in questions.chunks(TOGETHER).enumerate() {
        let requests = questions_of_group.iter().map(|question| {
            let expected = tokenizer.encode(&question.completion, false)?.len();
            let options = SamplingOptions {
                temperature: 0.0,
                max_tokens: expected + BEYOND,
                stop_ids: tokenizer.stop_ids().to_vec(),
                ..SamplingOptions::default()
            };
            Ok(Request { prompt: prompt_ids(tokenizer, &question.prompt, true)?, options })
        });
        let requests = requests.collect::<CommandResult<Vec<_>>>()?;
        let ends = model.continue_all(choice, &requests, &mut |_, _| std::ops::ControlFlow::Continue(()))?;
        for (question, end) in questions_of_group.iter().zip(ends) {
            let text = tokenizer.decode(&end.tokens, true)?;
            right += u64::from(text.trim() == question.completion.trim());
        }
        bar.at((group * TOGETHER + questions_of_group.len()) as u64, questions.len() as u64);
    }
    Ok(Share { right, rows: questions.len() as u64, chance: 0.0 })
}

#[cfg(test)]
mod tests {
    use shanty_data::Place;
    use shanty_testkit::fixtures;

    use super::*;

    fn question(prompt: &str, completion: &str, choices: &[&str]) -> Question {
        Question {
            place: Place { file: "a.jsonl".into(), line: 3 },
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
            choices: choices.iter().map(|choice| (*choice).to_owned()).collect(),
        }
    }

    #[test]
    fn choices_stand_where_the_completion_would() {
        let tokenizer = Tokenizer::load(&fixtures::reference("tokenizer")).unwrap();
        let question = question("is it good?\nsay:", " bad", &["good", "bad"]);
        let scored = scored(&question, &tokenizer, 200).unwrap();
        assert_eq!(scored.right, 1);
        let text = |row: &Row, trained: bool| {
            let range = row.trained[0].start as usize..row.trained[0].end as usize;
            let ids = if trained { &row.token_ids[range] } else { &row.token_ids[..range.start] };
            tokenizer.decode(ids, true).unwrap()
        };
        for (row, answer) in scored.rows.iter().zip([" good", " bad"]) {
            assert_eq!((text(row, false).as_str(), text(row, true).as_str()), ("is it good?\nsay:", answer));
            assert_eq!(row.trained[0].end as usize, row.token_ids.len(), "no end token is scored");
        }
        // The front goes where there is no room.
        let short = super::scored(&question, &tokenizer, 8).unwrap();
        assert!(short.rows.iter().all(|row| row.token_ids.len() == 8));
        assert_eq!(text(&short.rows[1], true), " bad");
    }

    #[test]
    fn rows_that_cannot_be_scored_are_told() {
        let tokenizer = Tokenizer::load(&fixtures::reference("tokenizer")).unwrap();
        for (completion, choices) in [("c", &["a", "b"][..]), ("a", &["a"]), ("", &["", "b"])] {
            let question = question("p", completion, choices);
            let failure = scored(&question, &tokenizer, 200).err().expect("it cannot be scored");
            assert_eq!(failure.diagnostics()[0].code, "SH0923", "{completion:?} {choices:?}");
        }
        let long = question("p", "a long answer", &["a long answer", "b"]);
        assert!(scored(&long, &tokenizer, 3).is_err(), "no token before it fits");
    }
}
