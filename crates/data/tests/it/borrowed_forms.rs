//! Rows as other programs have them (alpaca, sharegpt, OpenAI's weights), and what of them is trained.

use serde_json::{Value, json};
use shanty_data::{Format, TemplateUse, Tokenizer, TrainOn};
use shanty_diagnostic::Diagnose;

use crate::helpers::{Bench, positions};

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// A template like ChatML's, whose answers end in a token of the vocabulary; tools and calls are written as JSON.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn chat(rows: &[Value]) -> Bench {
    Bench::with_fixture("chat/chatml")
        .tokenizer_config(json!({ "chat_template": TEMPLATE }))
        .train(lines(rows))
}

/// All text of the first row, and the parts that are trained.
fn texts(bench: &Bench) -> (String, Vec<String>) {
    let row = &bench.rows().1[0];
    let tokenizer = Tokenizer::load(&bench.options.model_dir).unwrap();
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    let trained =
        row.trained.iter().map(|range| text(&row.token_ids[range.start as usize..range.end as usize]));
    (text(&row.token_ids), trained.collect())
}

#[test]
fn alpaca_is_stanfords_text_where_the_model_has_no_template() {
    let row = json!({"instruction": "Add.", "input": "1 2", "output": "three", "id": 4});
    let mut bench = Bench::with_fixture("tokenizer").train(lines(&[row]));
    bench.options.max_length = 1024;
    let (summary, _) = bench.rows();
    assert_eq!(
        (summary.train.form.as_str(), &*summary.train.ignored_columns),
        ("alpaca", &["id".to_owned()][..])
    );
    let (text, trained) = texts(&bench);
    assert!(text.contains("Below is an instruction that describes a task, paired with"), "{text}");
    assert!(text.contains("### Input:\n1 2\n\n### Response:three"), "{text}");
    assert_eq!(trained, ["three</s>"]);
}

#[test]
fn alpaca_is_a_conversation_where_the_model_has_a_template_and_it_is_wanted() {
    let row = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
    let mut bench = chat(&[row]);
    let (text, trained) = texts(&bench);
    assert!(text.contains("<|im_start|>user\nAdd.\n\n1 2<|im_end|>"), "{text}");
    assert_eq!(trained, ["3<|im_end|>"]);
    bench.options.chat_template = TemplateUse::None;
    let (text, _) = texts(&bench);
    assert!(text.contains("### Response:3"), "{text}");
}

#[test]
fn pairs_are_rendered_where_it_is_asked_for() {
    let mut bench = chat(&[json!({"prompt": "Hi", "completion": "Ahoy"})]);
    bench.options.chat_template = TemplateUse::Model;
    let (text, trained) = texts(&bench);
    assert!(text.starts_with("<|im_start|>user\nHi<|im_end|>"), "{text}");
    assert_eq!(trained, ["Ahoy<|im_end|>"]);
}

#[test]
fn sharegpt_turns_get_their_roles_and_tools() {
    let call = json!({"name": "tide", "arguments": {"port": "Dover"}}).to_string();
    let row = json!({
        "system": "Be brief.",
        "tools": json!([{"name": "tide"}]).to_string(),
        "conversations": [
            {"from": "human", "value": "When is high tide?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "At noon."},
        ],
    });
    let bench = chat(&[row]);
    let (summary, _) = bench.rows();
    assert_eq!(summary.train.form, "sharegpt");
    let (text, trained) = texts(&bench);
    assert!(text.starts_with("<|im_start|>system\nTools: [{\"name\": \"tide\"}]<|im_end|>"), "{text}");
    assert!(text.contains("<|im_start|>system\nBe brief.<|im_end|>"), "{text}");
    assert!(text.contains("<|im_start|>tool\nnoon<|im_end|>"), "{text}");
    assert_eq!(trained.len(), 2);
    assert!(trained[0].contains("\"name\": \"tide\""), "{trained:?}");
    assert_eq!(trained[1], "At noon.<|im_end|>");
}

#[test]
fn nulls_that_fixed_columns_leave_in_messages_are_no_values() {
    let user = json!({"role": "user", "content": "a", "tool_calls": null, "weight": null});
    let answer = json!({"role": "assistant", "content": "b", "tool_calls": null});
    let (text, _) = texts(&chat(&[json!({"messages": [user, answer], "tools": null})]));
    assert!(!text.contains("null"), "{text}");
}

#[test]
fn answers_of_weight_0_are_not_trained() {
    let say =
        |text: &str, flag: &str, value: Value| json!({"role": "assistant", "content": text, flag: value});
    let ask = json!({"role": "user", "content": "?"});
    let messages = json!([
        ask, say("one", "weight", json!(0)), ask, say("two", "weight", json!(1)), ask, say("three", "train", json!(false)),
        ask, say("four", "train", json!(true)), ask, {"role": "assistant", "content": "five"},
    ]);
    let row = json!({"messages": messages});
    let (_, trained) = texts(&chat(std::slice::from_ref(&row)));
    assert_eq!(trained, ["two<|im_end|>", "four<|im_end|>", "five<|im_end|>"]);

    // The same with marks in the template.
    let marked = TEMPLATE.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
    );
    let mut bench = chat(&[row]).tokenizer_config(json!({ "chat_template": marked }));
    bench.options.require_end_token = false;
    assert_eq!(texts(&bench).1, ["two", "four", "five"]);
}

#[test]
fn everything_is_trained_where_it_is_asked_for_but_for_answers_of_weight_0() {
    let messages = json!([
        {"role": "user", "content": "ask"}, {"role": "assistant", "content": "hide", "weight": 0},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "show"},
    ]);
    let mut bench = chat(&[json!({"messages": messages})]);
    bench.options.train_on = TrainOn::All;
    let row = &bench.rows().1[0];
    let (text, trained) = texts(&bench);
    assert_eq!(trained.len(), 2, "{trained:?}");
    assert!(trained[0].ends_with("<|im_start|>assistant\n"), "{trained:?}");
    assert!(trained[1].ends_with("show<|im_end|>\n"), "{trained:?}");
    assert!(text.contains("hide<|im_end|>"), "{text}");
    assert_eq!(positions(row)[0], 1, "the first token has nothing before it");

    let mut pair = Bench::new().train(lines(&[json!({"prompt": "ask", "completion": " say"})]));
    pair.options.train_on = TrainOn::All;
    let row = &pair.rows().1[0];
    assert_eq!(positions(row), (1..row.token_ids.len()).collect::<Vec<_>>());
}

#[test]
fn conversations_of_weight_0_alone_are_left_out_and_a_file_of_them_refused() {
    let silent = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
    ]});
    let heard =
        json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let (summary, _) = chat(&[silent.clone(), heard]).rows();
    assert_eq!((summary.train.samples, summary.train.dropped.unweighted), (1, 1));
    assert_eq!(summary.train.examples[0].what, "unweighted");
    assert!(summary.warnings[0].contains("1 hold only answers of weight 0"), "{:?}", summary.warnings);
    let error = chat(&[silent]).prepare().unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0221", "{error:?}");
}

#[test]
fn wrong_turns_are_refused_where_they_stand() {
    let say = |weight: Value| json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]);
    let turn = |from: &str, value: Value| json!({"conversations": [{"from": from, "value": value}]});
    let cases = [
        (json!({"messages": say(json!(0.5))}), "`messages[1].weight`", "0.5"),
        (json!({"messages": say(json!("1"))}), "`messages[1].weight`", "\"1\""),
        (json!({"messages": say(json!(2))}), "`messages[1].weight`", "not 0 or 1"),
        (
            json!({"messages": [{"role": "user", "content": "a", "weight": 1}]}),
            "`messages[0].weight`",
            "assistant's",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": false}]}),
            "`messages[0].train`",
            "what `weight`",
        ),
        (turn("narrator", json!("once")), "`conversations[0].from`", "narrator"),
        (turn("human", json!(5)), "`conversations[0].value`", "a number"),
        (turn("function_call", json!("tide()")), "`conversations[0].value`", "a call as JSON"),
        (json!({"conversations": ["hi"]}), "`conversations[0]`", "a string"),
        (json!({"conversations": [{"value": "hi"}]}), "`conversations[0].from`", "null"),
        (json!({"messages": say(json!(1)), "tools": "{}"}), "`tools`", "an object"),
        (json!({"messages": say(json!(1)), "tools": "tide"}), "`tools`", "a list of tools"),
        (json!({"instruction": "a", "input": 3, "output": "b"}), "`input`", "a number"),
        (json!({"instruction": "a", "output": null}), "`output`", "null"),
    ];
    for (row, column, says) in cases {
        let error = chat(std::slice::from_ref(&row)).prepare().unwrap_err().diagnostic();
        assert_eq!((error.code.as_str(), error.line), ("SH0207", Some(1)), "{row}: {error:?}");
        assert!(error.message.contains(column) && error.message.contains(says), "{row}: {error:?}");
    }
}

#[test]
fn template_is_refused_where_it_makes_no_sense() {
    let mut bench = chat(&[json!({"messages": [{"role": "user", "content": "a"}]})]);
    bench.options.chat_template = TemplateUse::None;
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0219");
    let mut bench = chat(&[json!({"text": "a"})]);
    bench.options.chat_template = TemplateUse::Model;
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0219");
    let mut bench =
        Bench::with_fixture("tokenizer").train(lines(&[json!({"instruction": "a", "output": "b"})]));
    bench.options.chat_template = TemplateUse::Model;
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0210");
    let mut bench = chat(&[json!({"conversations": [{"from": "human", "value": "a"}]})]);
    bench.options.format = Format::Messages;
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0206");
}

#[test]
fn tokens_that_a_template_puts_together_must_be_of_the_vocabulary() {
    // As Phi-3 does it: `<|` and the role and `|>`.
    let template = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}<|im_end|>{% endfor %}\
                    {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
    let messages =
        json!([{"role": "user", "content": "what is <|this|>?"}, {"role": "assistant", "content": "b"}]);
    let bench =
        chat(&[json!({ "messages": messages })]).tokenizer_config(json!({ "chat_template": template }));
    let error = bench.prepare().unwrap_err().diagnostic();
    assert_eq!((error.code.as_str(), error.line), ("SH0213", Some(1)), "{error:?}");
    assert!(error.message.contains("`<|assistant|>`") || error.message.contains("`<|user|>`"), "{error:?}");
}
