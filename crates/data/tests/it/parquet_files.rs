//! Parquet gives the same rows as the same data in JSON Lines.

use std::{fs::File, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, DictionaryArray, Int64Array, LargeStringArray, ListArray, RecordBatch, StringArray,
        StringViewArray, StructArray,
    },
    buffer::OffsetBuffer,
    datatypes::{DataType, Field, Int32Type},
};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use serde_json::json;
use shanty_data::{Prepared, Split};
use shanty_diagnostic::Diagnose;

use crate::helpers::{Bench, check_split, rows_of};

fn write(bench: &Bench, name: &str, columns: Vec<(&str, ArrayRef)>, compression: Compression) -> String {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = bench.path(name);
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_max_row_group_row_count(Some(700))
        .build();
    let mut writer =
        ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path.to_str().unwrap().to_owned()
}

fn texts() -> Vec<String> {
    (0..3000).map(|index| format!("Row {index} says {} times nothing", index % 17)).collect()
}

/// A file with a column of so many texts; gives its path.
pub fn text_file(bench: &Bench, count: i64) -> String {
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..count));
    let text = (0..count).map(|index| format!("Row {index} says {} times nothing", index % 17)).collect();
    write(bench, "texts.parquet", vec![("id", ids), ("text", strings("small", text))], Compression::SNAPPY)
}

fn strings(kind: &str, texts: Vec<String>) -> ArrayRef {
    let texts = texts.iter().map(String::as_str);
    match kind {
        "small" => Arc::new(StringArray::from_iter_values(texts)),
        "large" => Arc::new(LargeStringArray::from_iter_values(texts)),
        "view" => Arc::new(StringViewArray::from_iter_values(texts)),
        _ => Arc::new(texts.collect::<DictionaryArray<Int32Type>>()),
    }
}

#[test]
fn text_columns_of_all_kinds_give_the_rows_of_json_lines() {
    let lines: String = texts().iter().map(|text| format!("{}\n", json!({ "text": text }))).collect();
    let (_, expected) = Bench::new().train(lines).rows();
    for kind in ["small", "large", "view", "dictionary"] {
        for compression in
            [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())]
        {
            let mut bench = Bench::new();
            let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..3000));
            let columns = vec![("id", ids), ("text", strings(kind, texts()))];
            bench.options.train = write(&bench, "data.parquet", columns, compression).into();
            let (summary, rows) = bench.rows();
            assert_eq!(rows, expected, "{kind} {compression}");
            assert_eq!(summary.train.ignored_columns, ["id"]);
        }
    }
}

/// A column of conversations, each of one question and one answer.
fn conversations(count: usize) -> ArrayRef {
    let roles = (0..count * 2).map(|index| if index % 2 == 0 { "user" } else { "assistant" });
    let contents = (0..count * 2).map(|index| format!("message {index}"));
    let roles: ArrayRef = Arc::new(StringArray::from_iter_values(roles));
    let contents: ArrayRef = Arc::new(StringArray::from_iter_values(contents));
    let messages = StructArray::from(vec![
        (Arc::new(Field::new("role", DataType::Utf8, false)), roles),
        (Arc::new(Field::new("content", DataType::Utf8, false)), contents),
    ]);
    let item = Arc::new(Field::new("item", messages.data_type().clone(), false));
    let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(2, count));
    Arc::new(ListArray::new(item, offsets, Arc::new(messages), None))
}

#[test]
fn lists_of_messages_give_the_rows_of_json_lines() {
    let lines: String = (0..50)
        .map(|index| {
            let user = json!({"role": "user", "content": format!("message {}", index * 2)});
            let assistant = json!({"role": "assistant", "content": format!("message {}", index * 2 + 1)});
            format!("{}\n", json!({ "messages": [user, assistant] }))
        })
        .collect();
    let (_, expected) = Bench::new().train(lines).rows();
    let mut bench = Bench::new();
    bench.options.train =
        write(&bench, "data.parquet", vec![("messages", conversations(50))], Compression::SNAPPY).into();
    let (summary, rows) = bench.rows();
    assert_eq!(summary.train.form, "messages");
    assert_eq!(rows, expected);
    let prepared = Prepared::open(&bench.options.out).unwrap();
    check_split(&prepared, Split::Train);
    assert_eq!(prepared.samples_of_row(Split::Train, 0).unwrap()[0].line, 1);
}

#[test]
fn files_of_both_kinds_may_be_mixed() {
    let mut bench = Bench::new();
    write(&bench, "a.parquet", vec![("text", strings("small", texts()))], Compression::SNAPPY);
    bench.write("b.jsonl", "{\"text\": \"the last\"}\n");
    bench.options.train = bench.path("[ab].*").to_str().unwrap().into();
    let summary = bench.prepare().unwrap();
    assert_eq!((summary.train.files, summary.train.records), (2, 3001));
    let prepared = Prepared::open(&bench.options.out).unwrap();
    let last = rows_of(&prepared, Split::Train)
        .iter()
        .flat_map(|row| row.segments.clone())
        .map(|s| s.sample_id)
        .max();
    assert_eq!(last, Some(3000));
}

#[test]
fn wrong_columns_are_errors_with_their_row() {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..3));
    let holes: ArrayRef = Arc::new(StringArray::from(vec![Some("a b"), None]));
    let none: ArrayRef = Arc::new(StringArray::from(Vec::<&str>::new()));
    let other: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let cases = [
        (vec![("text", numbers)], "SH0207", Some(1)),
        (vec![("text", holes)], "SH0207", Some(2)),
        (vec![("text", none)], "SH0202", None),
        (vec![("body", other)], "SH0205", Some(1)),
    ];
    for (columns, code, line) in cases {
        let mut bench = Bench::new();
        bench.options.train = write(&bench, "data.parquet", columns, Compression::SNAPPY).into();
        let diagnostic = bench.prepare().unwrap_err().diagnostic();
        assert_eq!((diagnostic.code.as_str(), diagnostic.line), (code, line), "{diagnostic}");
        assert_eq!(diagnostic.file, Some(bench.path("data.parquet")));
    }
}
