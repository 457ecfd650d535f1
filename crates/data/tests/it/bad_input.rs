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
            with(Bench::new(), |o| o.train = "/nowhere/*.jsonl".into()),
            "SH0201",
            "no file matches",
        ),
        case("a URL", with(Bench::new(), |o| o.train = "ftp://b/a.jsonl".into()), "SH0223", "`ftp://`"),
        case("a folder", with(Bench::new(), |o| o.train = "/tmp".into()), "SH0201", "it is a folder"),
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
            case("second file empty", with(bench, |o| o.train = pattern.into()), "SH0202", "train2.jsonl")
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.gz", [0x1f, 0x8b, 8, 0]).to_str().unwrap().to_owned();
            case("compressed", with(bench, |o| o.train = path.into()), "SH0218", "gzip")
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.csv", "text\nhello\n").to_str().unwrap().to_owned();
            case(
                "comma-separated",
                with(bench, |o| o.train = path.into()),
                "SH0218",
                "neither JSON Lines nor Parquet",
            )
        },
        {
            let bench = Bench::new();
            let path = bench.write("data.parquet", "PAR1 and no more").to_str().unwrap().to_owned();
            case("broken Parquet", with(bench, |o| o.train = path.into()), "SH0208", "data.parquet")
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
        at("other tools' names", "{\"conversations\": []}\n", "SH0207", 1, "an empty list"),
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
            "SH0221",
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

/// Data sets as they are found: broken, half converted, of other programs.
fn found_in_the_wild() -> Vec<Case> {
    let alpaca = "{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"}\n";
    let shares = "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n";
    let chat = |messages: &str| {
        let text = format!("{{\"messages\": {messages}}}\n");
        Bench::with_fixture("chat/chatml")
            .tokenizer_config(json!({"chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"}))
            .train(text)
    };
    let row = |name, bench: Bench, code, says| Case { line: Some(1), ..case(name, bench, code, says) };
    vec![
        at("cut in the middle of a conversation", &shares[..60], "SH0204", 1, "EOF"),
        at(
            "alpaca, then a row without output",
            format!("{alpaca}{{\"instruction\": \"a\"}}\n"),
            "SH0206",
            2,
            "`output`",
        ),
        at("alpaca, then sharegpt", format!("{alpaca}{shares}"), "SH0206", 2, "`instruction`"),
        at(
            "alpaca and a pair",
            "{\"instruction\": \"a\", \"output\": \"b\", \"prompt\": \"a\", \"completion\": \"b\"}\n",
            "SH0205",
            1,
            "prompt-completion and alpaca",
        ),
        at(
            "a question and an answer",
            "{\"question\": \"a\", \"answer\": \"b\"}\n",
            "SH0205",
            1,
            "rename them",
        ),
        at("preference pairs", "{\"chosen\": \"a\", \"rejected\": \"b\"}\n", "SH0205", 1, "preference pairs"),
        at("an instruction alone", "{\"instruction\": \"a\"}\n", "SH0205", 1, "an `output` is missing"),
        at("a comma after the last key", "{\"text\": \"a\",}\n", "SH0204", 1, "trailing comma"),
        at("Python's words", "{\"text\": None}\n", "SH0204", 1, "expected"),
        at("not a number", "{\"text\": NaN}\n", "SH0204", 1, "expected"),
        at("half a surrogate", "{\"text\": \"\\ud83d\"}\n", "SH0204", 1, ""),
        at("a control character in a string", "{\"text\": \"a\tb\"}\n", "SH0204", 1, "control character"),
        at(
            "lists in lists without end",
            format!("{{\"text\": {}}}\n", "[".repeat(5000)),
            "SH0204",
            1,
            "recursion limit",
        ),
        at("UTF-16", [0xff, 0xfe, b'{', 0, b'"', 0], "SH0203", 1, "not valid UTF-8"),
        at("Latin 1", b"{\"text\": \"caf\xe9\"}\n", "SH0203", 1, "column 14"),
        at("zero bytes", [0; 64], "SH0204", 1, ""),
        at(
            "a line without end",
            [b"{\"text\": \"", &vec![b'a'; 65 << 20][..]].concat(),
            "SH0204",
            1,
            "longer than 64 MiB",
        ),
        at("nulls all the way", "{\"messages\": null}\n", "SH0207", 1, "null, not a list"),
        row("a message that is null", chat("[null]"), "SH0207", "`messages[0]`"),
        row(
            "a content that is an object",
            chat("[{\"role\": \"user\", \"content\": {\"text\": \"a\"}}]"),
            "SH0207",
            "`messages[0].content`",
        ),
        row(
            "no content and no call",
            chat("[{\"role\": \"assistant\", \"content\": null, \"tool_calls\": null}]"),
            "SH0207",
            "`messages[0].content`",
        ),
        row("a list of lists", chat("[[]]"), "SH0207", "`messages[0]`"),
        row("messages as one text", chat("\"user: a\""), "SH0207", "a string, not a list"),
    ]
}

/// Templates that are broken or mean harm. A model may come from anybody.
fn templates() -> Vec<Case> {
    let chat = "{\"messages\": [{\"role\": \"pirate\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let with_template = |template: &str| {
        Bench::with_fixture("chat/chatml").tokenizer_config(json!({ "chat_template": template })).train(chat)
    };
    let whole = |name, template: &str, says| case(name, with_template(template), "SH0211", says);
    let of_row = |name, template: &str, says| Case { line: Some(1), ..whole(name, template, says) };
    vec![
        whole("a block without end", "{% for m in messages %}{{ m }}", "line 1 of the template"),
        whole("an unknown block", "{% generate %}{% endgenerate %}", "unknown statement"),
        whole("half an expression", "{{ messages[0 }}", "line 1 of the template"),
        of_row("an unknown filter", "{{ messages | sort_of }}", "sort_of"),
        of_row(
            "a role that it refuses",
            "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}",
            "unknown role pirate",
        ),
        of_row("a key that is not there", "{{ messages[0].name.first }}", "undefined"),
        of_row(
            "a loop that takes for ever",
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "fuel",
        ),
        of_row("a macro that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        of_row(
            "a text that doubles",
            "{% set ns = namespace(s='ha') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "fuel",
        ),
        of_row("a template that includes itself", "{% include 'chat_template' %}", ""),
    ]
}

#[test]
fn each_mistake_has_its_code_and_place() {
    let cases: Vec<Case> = files()
        .into_iter()
        .chain(lines())
        .chain(models())
        .chain(found_in_the_wild())
        .chain(templates())
        .collect();
    assert!(cases.len() >= 75);
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
    for number in 201..=229 {
        let page = fs::read_to_string(pages.join(format!("SH0{number}.md"))).unwrap();
        assert!(page.starts_with(&format!("# SH0{number}: ")), "{page}");
        for heading in ["## What happened", "## Likely causes", "## What to do"] {
            assert!(page.contains(heading), "SH0{number} lacks {heading}");
        }
    }
}
