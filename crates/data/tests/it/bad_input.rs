//! Wrong input: each mistake has its code, file, line and column, and leaves nothing behind.

use std::fs;

use serde_json::json;
use shanty_data::{Format, PrepareOptions};
use shanty_diagnostic::{Diagnose, Kind};

use crate::helpers::Bench;

struct Case {
    name: &'static str,
    bench: Bench,
    code: &'static str,
    line: Option<usize>,
    column: Option<usize>,
    says: &'static str,
}

fn case(name: &'static str, bench: Bench, code: &'static str, says: &'static str) -> Case {
    Case { name, bench, code, line: None, column: None, says }
}

fn at(
    name: &'static str,
    text: impl AsRef<[u8]>,
    code: &'static str,
    line: usize,
    says: &'static str,
) -> Case {
    Case { line: Some(line), ..case(name, Bench::new().train(text), code, says) }
}

fn with(mut bench: Bench, change: impl FnOnce(&mut PrepareOptions)) -> Bench {
    change(&mut bench.options);
    bench
}

fn files() -> Vec<Case> {
    let good = "{\"text\": \"a b\"}\n";
    vec![
        case("no such file", Bench::new(), "SH0201", "no such file"),
        case(
            "no match",
            with(Bench::new(), |o| o.train = "/nowhere/*.jsonl".to_owned()),
            "SH0201",
            "no file matches",
        ),
        case(
            "a URL",
            with(Bench::new(), |o| o.train = "s3://b/a.jsonl".to_owned()),
            "SH0201",
            "only local files",
        ),
        case("a folder", with(Bench::new(), |o| o.train = "/tmp".to_owned()), "SH0201", "it is a folder"),
        case(
            "no eval file",
            with(Bench::new().train(good), |o| o.eval = Some("none.jsonl".to_owned())),
            "SH0201",
            "none.jsonl",
        ),
        case("empty file", Bench::new().train(""), "SH0202", "has no rows"),
        case("blank lines alone", Bench::new().train("\n  \n\r\n"), "SH0202", "has no rows"),
        {
            let bench = Bench::new().train(good);
            bench.write("train2.jsonl", "");
            let pattern = bench.path("train*.jsonl").to_str().unwrap().to_owned();
            case("second file empty", with(bench, |o| o.train = pattern), "SH0202", "train2.jsonl")
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.gz", [0x1f, 0x8b, 8, 0]).to_str().unwrap().to_owned();
            case("compressed", with(bench, |o| o.train = path), "SH0218", "gzip")
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.csv", "text\nhello\n").to_str().unwrap().to_owned();
            case(
                "comma-separated",
                with(bench, |o| o.train = path),
                "SH0218",
                "neither JSON Lines nor Parquet",
            )
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.parquet", "PAR1 and no more").to_str().unwrap().to_owned();
            case("broken Parquet", with(bench, |o| o.train = path), "SH0208", "data.parquet")
        },
    ]
}

fn lines() -> Vec<Case> {
    let good = "{\"text\": \"a b\"}\n";
    let pair = "{\"prompt\": \"a\", \"completion\": \" b\"}\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    vec![
        Case {
            column: Some(11),
            ..at(
                "invalid UTF-8",
                [good.as_bytes(), b"{\"text\": \"\xff\"}\n"].concat(),
                "SH0203",
                2,
                "not valid UTF-8",
            )
        },
        Case {
            column: Some(14),
            ..at(
                "UTF-8 counts as characters",
                [&b"{\"text\": \"\xc3\xa9\xc3\xa9\xc3\xa9\xff\"}\n"[..]].concat(),
                "SH0203",
                1,
                "column 14",
            )
        },
        at("broken line", format!("{good}{{\"text\": \"a\"\n"), "SH0204", 2, "EOF while parsing an object"),
        Case { column: Some(10), ..at("single quotes", "{\"text\": 'a'}\n", "SH0204", 1, "expected value") },
        at(
            "two objects on a line",
            "{\"text\": \"a\"} {\"text\": \"b\"}\n",
            "SH0204",
            1,
            "trailing characters",
        ),
        at("a JSON array", format!("[{}]\n", good.trim()), "SH0204", 1, "without `[`"),
        at("a number", format!("{good}12\n"), "SH0204", 2, "it is a number"),
        at("unknown columns", "{\"body\": \"a\", \"id\": 1}\n", "SH0205", 1, "`body`, `id`"),
        at("no columns", "{}\n", "SH0205", 1, "(none)"),
        at("other tools' names", "{\"conversations\": []}\n", "SH0205", 1, "rename it to `messages`"),
        at("half a pair", "{\"prompt\": \"a\"}\n", "SH0205", 1, "a `completion` is missing"),
        at("two forms", "{\"text\": \"a\", \"messages\": []}\n", "SH0205", 1, "text and messages"),
        at(
            "column missing later",
            format!("{pair}{{\"prompt\": \"a\"}}\n"),
            "SH0206",
            2,
            "no column `completion`",
        ),
        at("another form later", format!("{good}\n{pair}"), "SH0206", 3, "no column `text`"),
        Case {
            line: Some(1),
            ..case(
                "not the form asked for",
                with(Bench::new().train(good), |o| o.format = Format::Messages),
                "SH0206",
                "`messages`",
            )
        },
        at("text is a number", format!("{good}{{\"text\": 5}}\n"), "SH0207", 2, "`text` of"),
        at("text is null", "{\"text\": null}\n", "SH0207", 1, "is null, not a string"),
        at(
            "completion is a list",
            "{\"prompt\": \"a\", \"completion\": [\"b\"]}\n",
            "SH0207",
            1,
            "`completion`",
        ),
        at("messages is a string", "{\"messages\": \"hi\"}\n", "SH0207", 1, "is a string, not a list"),
        at("no messages", format!("{chat}{{\"messages\": []}}\n"), "SH0207", 2, "an empty list"),
        at(
            "message without role",
            "{\"messages\": [{\"from\": \"human\", \"value\": \"a\"}]}\n",
            "SH0207",
            1,
            "`messages[0].role`",
        ),
        at(
            "message without content",
            "{\"messages\": [{\"role\": \"user\"}]}\n",
            "SH0207",
            1,
            "`messages[0].content`",
        ),
        at(
            "no answers",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
            "SH0214",
            0,
            "1 hold no answer",
        ),
    ]
}

fn models() -> Vec<Case> {
    let text = "{\"text\": \"a b\"}\n";
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let fixture = || Bench::with_fixture("tokenizer");
    let chatml = |template: &str| {
        Bench::with_fixture("chat/chatml").tokenizer_config(json!({ "chat_template": template })).train(chat)
    };
    let broken_file = |name: &str, content: &str| {
        let bench = fixture().train(text);
        fs::write(bench.options.model_dir.join(name), content).unwrap();
        bench
    };
    vec![
        case(
            "no model folder",
            with(Bench::new().train(text), |o| o.model_dir = "/nowhere".into()),
            "SH0209",
            "tokenizer.json",
        ),
        case("broken tokenizer", broken_file("tokenizer.json", "{}"), "SH0209", "tokenizer.json"),
        case(
            "broken configuration",
            broken_file("tokenizer_config.json", "{,"),
            "SH0209",
            "tokenizer_config.json",
        ),
        case("no template", fixture().train(chat), "SH0210", "no chat template"),
        case("template does not parse", chatml("{% if %}"), "SH0211", "line 1 of the template"),
        Case {
            line: Some(1),
            ..case("template raises", chatml("{{ raise_exception('not so') }}"), "SH0211", "not so")
        },
        Case {
            line: Some(1),
            ..case("template calls nothing", chatml("{{ nothing() }}"), "SH0211", "nothing")
        },
        case(
            "end token is none",
            fixture().tokenizer_config(json!({"eos_token": "<|im_end|>"})).train(text),
            "SH0213",
            "`<|im_end|>`",
        ),
        case(
            "rows of one token",
            with(Bench::new().train(text), |o| o.max_length = 1),
            "SH0219",
            "two tokens",
        ),
        case(
            "nothing left",
            with(Bench::new().train("{\"prompt\": \"a b c d e f\", \"completion\": \" g\"}\n"), |o| {
                o.max_length = 3
            }),
            "SH0214",
            "1 hold nothing to be trained within 3 tokens",
        ),
        {
            let bench = Bench::new().train(text);
            fs::create_dir(&bench.options.out).unwrap();
            fs::write(bench.options.out.join("thesis.txt"), "mine").unwrap();
            case("folder is somebody's", bench, "SH0216", "other files")
        },
    ]
}

#[test]
fn each_mistake_has_its_code_and_place() {
    let cases: Vec<Case> = files().into_iter().chain(lines()).chain(models()).collect();
    assert!(cases.len() >= 40);
    for case in cases {
        let before = listing(&case.bench);
        let error = case.bench.prepare().expect_err(case.name);
        let diagnostic = error.diagnostic();
        let shown = format!("{}: {diagnostic:?}", case.name);
        assert_eq!(diagnostic.code, case.code, "{shown}");
        assert!(diagnostic.message.contains(case.says), "{shown}");
        assert_eq!(diagnostic.line, case.line.filter(|line| *line > 0), "{shown}");
        if case.column.is_some() {
            assert_eq!(diagnostic.column, case.column, "{shown}");
        }
        if case.line.is_some_and(|line| line > 0) {
            assert_eq!(diagnostic.file, Some(case.bench.path("train.jsonl")), "{shown}");
        }
        assert_eq!(diagnostic.kind, Kind::User, "{shown}");
        assert!(!diagnostic.message.ends_with('.'), "{shown}");
        assert_eq!(listing(&case.bench), before, "{shown}: something is left behind");
    }
}

fn listing(bench: &Bench) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(bench.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn every_code_has_a_page() {
    let pages = crate::helpers::root().join("docs/errors");
    for number in 201..=220 {
        let page = fs::read_to_string(pages.join(format!("SH0{number}.md"))).unwrap();
        assert!(page.starts_with(&format!("# SH0{number}: ")), "{page}");
        for heading in ["## What happened", "## Likely causes", "## What to do"] {
            assert!(page.contains(heading), "SH0{number} lacks {heading}");
        }
    }
}
