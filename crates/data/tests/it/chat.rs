//! Chat templates against what transformers renders, tokenises and masks.

use std::fs;

use serde_json::{Value, json};
use shanty_data::{Error, Message, Tokenizer};
use shanty_diagnostic::Diagnose;

use crate::helpers::{Bench, positions, reference, tiny_llama};

const STYLES: [&str; 3] = ["chatml", "llama3", "mistral"];
const TEMPLATES: [&str; 2] = ["chat_template.jinja", "chat_template_generation.jinja"];

fn style(style: &str, template: &str) -> (Bench, Vec<Value>) {
    let case = format!("chat/{style}");
    let bench = Bench::with_fixture(&case);
    let source = reference().join(&case).join(template);
    fs::copy(source, bench.options.model_dir.join("chat_template.jinja")).unwrap();
    let conversations = fs::read(reference().join(&case).join("conversations.json")).unwrap();
    (bench, serde_json::from_slice(&conversations).unwrap())
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}

#[test]
fn text_and_spans_are_those_of_transformers() {
    for (name, template) in STYLES.iter().flat_map(|name| TEMPLATES.map(|template| (*name, template))) {
        let (bench, conversations) = style(name, template);
        let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
        assert_eq!(conversations.len(), 5);
        for conversation in &conversations {
            let messages = conversation["messages"].as_array().unwrap();
            let rendered = tokenizer.render_answers(messages, None).unwrap();
            let label = format!("{name} {template} {}", conversation["name"]);
            assert_eq!(rendered.text, conversation["text"].as_str().unwrap(), "{label}");
            let characters = |at: usize| rendered.text[..at].chars().count() as i64;
            let spans: Vec<Vec<i64>> = rendered
                .answers
                .iter()
                .map(|answer| vec![characters(answer.start), characters(answer.end)])
                .collect();
            let expected: Vec<Vec<i64>> =
                conversation["assistant_spans"].as_array().unwrap().iter().map(numbers).collect();
            assert_eq!(spans, expected, "{label}");
        }
    }
}

#[test]
fn ids_and_labels_are_those_of_transformers() {
    for (name, template) in STYLES.iter().flat_map(|name| TEMPLATES.map(|template| (*name, template))) {
        let (mut bench, conversations) = style(name, template);
        let lines: String = conversations
            .iter()
            .map(|conversation| format!("{}\n", json!({"messages": conversation["messages"]})))
            .collect();
        bench.write("train.jsonl", lines);
        bench.options.packing = false;
        let (summary, rows) = bench.rows();
        assert_eq!(summary.train.form, "messages");
        assert_eq!(rows.len(), conversations.len());
        for (row, conversation) in rows.iter().zip(&conversations) {
            let label = format!("{name} {template} {}", conversation["name"]);
            let ids: Vec<i64> = row.token_ids.iter().map(|id| i64::from(*id)).collect();
            assert_eq!(ids, numbers(&conversation["input_ids"]), "{label}");
            let mut labels = vec![-100; ids.len()];
            for position in positions(row) {
                labels[position] = ids[position];
            }
            assert_eq!(labels, numbers(&conversation["labels"]), "{label}");
        }
    }
}

#[test]
fn refused_conversations_are_errors_with_their_line() {
    let case: Value =
        serde_json::from_slice(&fs::read(reference().join("chat/mistral/case.json")).unwrap()).unwrap();
    let refused = case["must_fail"].as_array().unwrap();
    assert!(!refused.is_empty());
    for template in TEMPLATES {
        let (bench, conversations) = style("mistral", template);
        for wrong in refused {
            let good = json!({"messages": conversations[0]["messages"]});
            bench.write("train.jsonl", format!("{good}\n{}\n", json!({"messages": wrong["messages"]})));
            let diagnostic = bench.prepare().unwrap_err().diagnostic();
            assert_eq!((diagnostic.code.as_str(), diagnostic.line), ("SH0211", Some(2)));
            assert!(diagnostic.message.contains(wrong["error"].as_str().unwrap()), "{diagnostic}");
        }
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

#[test]
fn prompts_for_generation_end_where_the_answer_begins() {
    let tokenizer = Tokenizer::load(&tiny_llama()).unwrap();
    let prompt = tokenizer.render(&[message("user", "Hi")], true).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let ids = tokenizer.encode(&prompt, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), prompt);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "user\nHi\nassistant\n");
    // <|endoftext|> ends texts, <|im_end|> answers.
    assert_eq!((tokenizer.eos(), tokenizer.answer_end(), tokenizer.pad()), (Some(0), Some(2), Some(3)));
    assert_eq!(tokenizer.stop_ids(), [0, 2]);
    assert_eq!(tokenizer.vocabulary_size(), 8192);
    let (marked, _) = style("chatml", TEMPLATES[1]);
    let marked = Tokenizer::load(&marked.options.model_dir).unwrap();
    assert!(marked.render(&[message("user", "Hi")], true).unwrap().ends_with("<|im_start|>assistant\n"));
}

fn with_template(template: &str) -> Bench {
    Bench::with_fixture("chat/chatml").tokenizer_config(json!({ "chat_template": template }))
}

fn render(template: &str, time: Option<i64>) -> Result<String, Error> {
    let bench = with_template(template);
    Tokenizer::load_at(&bench.options.model_dir, time)?.render(&[message("user", " Hi ")], false)
}

#[test]
fn templates_run_as_in_transformers() {
    let cases = [
        // Methods of Python's strings, lists and dicts.
        ("{{ messages[0].content.strip().upper() }}", "HI"),
        ("{{ messages[0]['content'].startswith(' ') }}", "True"),
        ("{{ messages[0].get('name', 'nobody') }}", "nobody"),
        (
            "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
            "role=user;content= Hi ;",
        ),
        ("{{ messages[::-1][0].role }}{{ messages[-1].role }}", "useruser"),
        // Blocks take the line break after them along, and the space before.
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}y", "y"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        // Tokens by name; those that there are not are undefined.
        ("{{ eos_token }}{{ bos_token is defined }}{{ pad_token }}", "<|im_end|>False<|endoftext|>"),
        // json.dumps(messages, ensure_ascii=False), nothing escaped for HTML.
        ("{{ messages | tojson }}", r#"[{"role": "user", "content": " Hi "}]"#),
        ("{{ {'a': '<é>'} | tojson(indent=2) }}", "{\n  \"a\": \"<é>\"\n}"),
        ("{{ tools is none }}{{ documents is none }}{{ None }}{{ missing }}", "TrueTrueNone"),
        ("{% generation %}\n{{ messages[0].content }}{% endgeneration %}\n!", " Hi !"),
    ];
    for (template, expected) in cases {
        assert_eq!(render(template, None).unwrap(), expected, "{template}");
    }
}

#[test]
fn templates_have_the_clock_that_they_are_given_or_none() {
    let template = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}";
    assert_eq!(render(template, None).unwrap(), "26 Jul 2024");
    assert_eq!(render(template, Some(1_732_438_061)).unwrap(), "24 Nov 2024");
}

#[test]
fn named_templates_give_the_default_one() {
    let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    let bench = Bench::with_fixture("chat/chatml").tokenizer_config(json!({ "chat_template": named }));
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    assert_eq!(tokenizer.render(&[message("user", "Hi")], false).unwrap(), "d");
    let named = json!([{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]);
    let bench = Bench::with_fixture("chat/chatml").tokenizer_config(json!({ "chat_template": named }));
    assert_eq!(Tokenizer::load(&bench.options.model_dir).unwrap_err().diagnostic().code, "SH0209");
}

fn answer_error(template: &str, messages: &Value) -> (String, String) {
    let bench = with_template(template).train(format!("{}\n", json!({ "messages": messages })));
    let diagnostic = bench.prepare().unwrap_err().diagnostic();
    assert_eq!(diagnostic.line, Some(1), "{diagnostic}");
    (diagnostic.code, diagnostic.message)
}

#[test]
fn templates_that_rewrite_earlier_turns_are_refused_without_marks() {
    // Earlier answers lose their thoughts, as in reasoning models.
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('/')[-1] }}\
                    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let messages = json!([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "hm/b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "hm/d"}
    ]);
    let (code, message) = answer_error(template, &messages);
    assert_eq!(code, "SH0212");
    assert!(message.contains("message 2"), "{message}");

    let marked = template
        .replace("{{ m.content if", "{% if m.role == 'assistant' %}{% generation %}{{ m.content if")
        .replace("<|im_end|>\n{% endfor", "<|im_end|>{% endgeneration %}{% endif %}\n{% endfor");
    let bench = with_template(&marked).train(format!("{}\n", json!({ "messages": messages })));
    let (_, rows) = bench.rows();
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let trained: Vec<u32> = positions(&rows[0]).into_iter().map(|at| rows[0].token_ids[at]).collect();
    assert_eq!(tokenizer.decode(&trained, false).unwrap(), "b<|im_end|>hm/d<|im_end|>");
}

#[test]
fn template_of_another_model_is_refused() {
    // Only a literal that is written counts: the untaken branch does no harm.
    let template = "{% for m in messages %}{{ m.content }}{% if m.role == 'tool' %}<|tool|>{% endif %}\
                    {% if m.role == 'assistant' %}<|eot_id|>{% endif %}{% endfor %}";
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let (code, message) = answer_error(template, &messages);
    assert_eq!(code, "SH0213");
    assert!(message.contains("`<|eot_id|>`"), "{message}");
}

#[test]
fn answers_without_end_token_are_refused_or_warned_of() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let mut bench = with_template(template).train(format!("{}\n", json!({ "messages": messages })));
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0222");
    bench.options.require_end_token = false;
    let summary = bench.prepare().unwrap();
    assert!(summary.warnings.iter().any(|warning| warning.contains("end token")), "{:?}", summary.warnings);
    let good = Bench::new().train(format!("{}\n", json!({ "messages": messages })));
    assert_eq!(good.prepare().unwrap().warnings, Vec::<String>::new());
}
