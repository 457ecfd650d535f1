//! What each form of row is trained on.

use serde_json::json;
use shanty_data::{Format, Tokenizer};

use crate::helpers::{Bench, positions};

fn line(value: serde_json::Value) -> String {
    format!("{value}\n")
}

#[test]
fn text_is_trained_from_its_second_token_to_its_end_token() {
    let bench = Bench::new().train(line(json!({"text": "To be, or not to be"})));
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let (summary, rows) = bench.rows();
    let mut expected = tokenizer.encode("To be, or not to be", false).unwrap();
    expected.push(tokenizer.eos().unwrap());
    assert_eq!(rows[0].token_ids, expected);
    assert_eq!(rows[0].trained, [1..expected.len() as u32]);
    assert_eq!((summary.train.records, summary.train.samples, summary.train.rows), (1, 1, 1));
}

#[test]
fn text_begins_as_the_tokenizer_begins_it() {
    // This one puts <s> (1) first; </s> is 2.
    let bench = Bench::with_fixture("tokenizer").train(line(json!({"text": "ab"})));
    let ids = &bench.rows().1[0].token_ids;
    assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&2)));
    let bench = Bench::with_fixture("tokenizer")
        .tokenizer_config(json!({"add_bos_token": false}))
        .train(line(json!({"text": "ab"})));
    assert_eq!(bench.rows().1[0].token_ids, ids[1..]);
}

#[test]
fn end_token_is_trained_also_where_it_is_the_padding_token() {
    let bench = Bench::with_fixture("tokenizer")
        .tokenizer_config(json!({"pad_token": "</s>"}))
        .train(line(json!({"prompt": "a</s>b", "completion": "c</s>d"})));
    let row = &bench.rows().1[0];
    let ends: Vec<usize> = (0..row.token_ids.len()).filter(|at| row.token_ids[*at] == 2).collect();
    assert_eq!(ends.len(), 3);
    let trained = positions(row);
    // The one in the prompt is not, the one in the completion and the last are.
    assert_eq!(ends.iter().map(|at| trained.contains(at)).collect::<Vec<_>>(), [false, true, true]);
}

#[test]
fn documents_longer_than_a_row_are_cut_and_lose_nothing() {
    let text = "So shaken as we are, so wan with care. ".repeat(100);
    let mut bench = Bench::new().train(line(json!({"text": text})));
    bench.options.packing = false;
    bench.options.max_length = 64;
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let (summary, rows) = bench.rows();
    let mut expected = tokenizer.encode(&text, true).unwrap();
    expected.push(tokenizer.eos().unwrap());
    let ids: Vec<u32> = rows.iter().flat_map(|row| row.token_ids.clone()).collect();
    assert_eq!(ids, expected);
    assert_eq!((summary.train.cut, summary.train.truncated), (1, 0));
    assert_eq!(summary.train.trained_tokens, expected.len() as u64 - rows.len() as u64);
    assert!(rows[..rows.len() - 1].iter().all(|row| row.token_ids.len() == 64));
}

#[test]
fn completion_and_end_token_are_trained() {
    let bench = Bench::new().train(line(json!({"prompt": "Define \"fork\".", "completion": " a tool."})));
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let (summary, rows) = bench.rows();
    let prompt = tokenizer.encode("Define \"fork\".", true).unwrap();
    let mut expected = tokenizer.encode("Define \"fork\". a tool.", true).unwrap();
    assert!(expected.starts_with(&prompt));
    expected.push(tokenizer.eos().unwrap());
    assert_eq!(rows[0].token_ids, expected);
    assert_eq!(rows[0].trained, [prompt.len() as u32..expected.len() as u32]);
    assert_eq!(summary.train.merged_boundaries, 0);
}

#[test]
fn token_across_the_boundary_is_trained_and_counted() {
    let bench = Bench::new().train(line(json!({"prompt": "the sa", "completion": "me thing"})));
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let (summary, rows) = bench.rows();
    assert_eq!(summary.train.merged_boundaries, 1);
    let same = tokenizer.encode("the same", true).unwrap().len() as u32 - 1;
    assert_eq!(tokenizer.decode(&rows[0].token_ids[same as usize..=same as usize], false).unwrap(), " same");
    assert_eq!(rows[0].trained, [same..rows[0].token_ids.len() as u32]);
}

#[test]
fn end_token_in_the_text_is_not_doubled() {
    let bench = Bench::new().train(line(json!({"prompt": "a", "completion": " b<|endoftext|>"})));
    let ids = &bench.rows().1[0].token_ids;
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 1);
}

#[test]
fn over_long_samples_are_truncated_dropped_and_counted() {
    let long = "word ".repeat(100);
    let mut bench = Bench::new().train(
        line(json!({"prompt": "a", "completion": " b"}))
            + &line(json!({"prompt": "a", "completion": long}))
            + &line(json!({"prompt": long, "completion": " never seen"})),
    );
    bench.options.max_length = 20;
    let (summary, rows) = bench.rows();
    let train = &summary.train;
    assert_eq!((train.records, train.samples, train.truncated), (3, 2, 2));
    assert_eq!(train.dropped.truncated_away, 1);
    assert!(train.truncated_trained_tokens > 80);
    assert!(rows.iter().all(|row| row.token_ids.len() <= 20));
    let warnings = summary.warnings.join("\n");
    assert!(
        warnings.contains("1 of 3 records are left out: 1 hold nothing to be trained within 20 tokens"),
        "{warnings}"
    );
    assert!(warnings.contains("2 of 3 records are longer than 20 tokens"), "{warnings}");
}

#[test]
fn conversations_without_answer_and_empty_texts_are_left_out_aloud() {
    let user = json!({"role": "user", "content": "a"});
    let assistant = json!({"role": "assistant", "content": "b"});
    let bench =
        Bench::new().train(line(json!({"messages": [user]})) + &line(json!({"messages": [user, assistant]})));
    let summary = bench.prepare().unwrap();
    assert_eq!((summary.train.samples, summary.train.dropped.no_answer), (1, 1));
    assert!(summary.warnings[0].contains("1 hold no answer of the assistant"), "{:?}", summary.warnings);
    let bench = Bench::new().train(line(json!({"text": ""})) + &line(json!({"text": "a b"})));
    assert_eq!(bench.prepare().unwrap().train.dropped.empty, 1);
}

#[test]
fn job_file_decides_between_several_forms() {
    let mut bench =
        Bench::new().train(line(json!({"text": "x y", "prompt": "a", "completion": " b", "id": 3})));
    assert!(bench.prepare().is_err());
    bench.options.format = Format::PromptCompletion;
    let summary = bench.prepare().unwrap();
    assert_eq!(summary.train.form, "prompt-completion");
    assert_eq!(summary.train.ignored_columns, ["text", "id"]);
}

#[test]
fn lines_may_end_and_begin_in_many_ways() {
    // Byte order mark, CRLF, blank lines, no line break at the end.
    let bench = Bench::new().train("\u{feff}{\"text\": \"a b\"}\r\n\r\n  \n{\"text\": \"c d\"}");
    let (summary, rows) = bench.rows();
    assert_eq!(summary.train.records, 2);
    let prepared = shanty_data::Prepared::open(&bench.options.out).unwrap();
    let sources = prepared.samples_of_row(shanty_data::Split::Train, 0).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(sources.iter().map(|source| source.line).collect::<Vec<_>>(), [1, 4]);
    assert_eq!(sources[1].to_string(), format!("{}:4", bench.path("train.jsonl").display()));
}

#[test]
fn globs_are_read_in_the_order_of_names() {
    let mut bench = Bench::new();
    for (name, text) in [("b.jsonl", "second"), ("a.jsonl", "first"), ("c.txt", "not read")] {
        bench.write(name, line(json!({"text": format!("{text} {text}")})));
    }
    bench.options.train = bench.path("*.jsonl").to_str().unwrap().into();
    let (summary, rows) = bench.rows();
    assert_eq!(summary.train.files, 2);
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let text = tokenizer.decode(&rows[0].token_ids, true).unwrap();
    assert_eq!(text, "first firstsecond second");
}
