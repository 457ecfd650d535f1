//! What Hugging Face PEFT makes of an adapter that was trained here.
//!
//! Needs a Python with peft, transformers and torch: `SHANTY_PYTHON`, else `python3`. Without one the test is
//! skipped aloud; where `SHANTY_REQUIRE_PYTHON` is set, as in continuous integration, it fails.

use std::{
    env,
    process::{Command, Stdio},
};

use shanty_testkit::{TinyJob, fixtures};

use crate::support::Place;

/// Token ids that the tiny model knows, of two rows as long as each other.
const IDS: &str = "[[5,17,33,120,64,7,201,9],[8,40,12,99,150,31,77,260]]";
const CHECK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/open_in_peft.py");

/// An interpreter that has PEFT, or none and a word about it.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn python() -> Option<String> {
    let python = env::var("SHANTY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python)
        .args(["-c", "import peft, torch, transformers"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if found {
        return Some(python);
    }
    assert!(
        env::var_os("SHANTY_REQUIRE_PYTHON").is_none(),
        "`{python}` cannot import peft, torch and transformers"
    );
    eprintln!("SKIPPED: `{python}` cannot import peft, torch and transformers; nothing was compared");
    None
}

/// Trains `job`, writes logits of base and adapter in f32, and lets PEFT open and compare them.
fn trained_adapter_opens_in_peft(job: TinyJob) {
    let Some(python) = python() else { return };
    let place = Place::new(job).unwrap();
    let run = place.run(2).unwrap();
    let adapter = place.adapter(&run).unwrap();
    let adapter = adapter.to_str().unwrap();
    let logits = ["logits", "--model", "model", "--adapter", adapter, "--quantization", "none", "--ids", IDS];
    place
        .shanty
        .run(&[&logits[..], &["--out", "logits.safetensors"]].concat())
        .unwrap()
        .expect_code(0)
        .unwrap();

    let check = Command::new(python)
        .arg(CHECK)
        .args(["--model", "model", "--adapter", adapter, "--ids", IDS, "--logits", "logits.safetensors"])
        // f32 on both sides; the reference cases hold logits to the same.
        .args(["--tolerance", "1e-4"])
        .current_dir(place.folder.path())
        .output()
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}\n{complained}");
}

#[test]
fn peft_opens_what_was_trained_without_a_warning_and_gives_the_same_logits() {
    trained_adapter_opens_in_peft(TinyJob { quantization: "none", ..TinyJob::default() });
}

#[test]
fn peft_opens_what_was_trained_on_a_4_bit_base() {
    trained_adapter_opens_in_peft(TinyJob { quantization: "nf4", ..TinyJob::default() });
}

/// A job of virtual tokens; `adapter` is the job's `[adapter]`.
fn virtual_tokens(adapter: &'static str) {
    let job = TinyJob {
        adapter: Some(adapter),
        max_length: 64,
        learning_rate: 2e-2,
        quantization: "none",
        ..TinyJob::default()
    };
    trained_adapter_opens_in_peft(job);
}

#[test]
fn peft_opens_a_prefix() {
    virtual_tokens("method = \"prefix_tuning\"\nnum_virtual_tokens = 6");
}

#[test]
fn peft_opens_a_prefix_that_was_trained_through_a_projection() {
    virtual_tokens(
        "method = \"prefix_tuning\"\nnum_virtual_tokens = 6\nprefix_projection = true\nencoder_hidden_size = 24",
    );
}

#[test]
fn peft_opens_prompts() {
    virtual_tokens("method = \"prompt_tuning\"\nnum_virtual_tokens = 6");
    virtual_tokens(
        "method = \"prompt_tuning\"\nnum_virtual_tokens = 6\nprompt_tuning_init_text = \"Haul away, Joe:\"",
    );
}

#[test]
fn peft_opens_what_p_tuning_made() {
    virtual_tokens("method = \"p_tuning\"\nnum_virtual_tokens = 6\nencoder_hidden_size = 24");
    virtual_tokens(
        "method = \"p_tuning\"\nnum_virtual_tokens = 6\nencoder_reparameterization_type = \"LSTM\"\nencoder_hidden_size = 12",
    );
}

#[test]
fn peft_combines_adapters_to_the_same_change() {
    let Some(python) = python() else { return };
    let place = Place::new(TinyJob::default()).unwrap();
    for (name, adapter) in [
        ("a", "adapters/lora_all_linear/llama/adapter"),
        ("b", "adapters/lora_qv/llama/adapter"),
        ("c", "adapters/rslora/llama/adapter"),
    ] {
        fixtures::copy_folder(&fixtures::reference(adapter), &place.path(name)).unwrap();
    }
    // Ranks: cat and svd take any, linear needs one: the first with itself and its opposite half.
    let cases = [
        ("cat", "0.7,-1.3", vec!["a", "b"]),
        ("svd", "0.7,0.4", vec!["a", "b"]),
        ("linear", "0.6,-0.25", vec!["a", "a2"]),
        ("cat", "1,0.5,2", vec!["a", "b", "c"]),
    ];
    fixtures::copy_folder(&place.path("a"), &place.path("a2")).unwrap();
    for (index, (how, weights, adapters)) in cases.iter().enumerate() {
        let out = format!("combined-{index}");
        let arguments =
            [&["adapters", "combine"][..], adapters, &["--how", how, "--weights", weights, "--out", &out]]
                .concat();
        place.shanty.run(&arguments).unwrap().expect_code(0).unwrap();
        let check = Command::new(&python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/combine_in_peft.py"))
            .args(["--model", "model", "--how", how, "--weights", weights, "--combined", &out])
            .args(adapters)
            .current_dir(place.folder.path())
            .output()
            .unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
        assert!(check.status.success(), "{how} {adapters:?}: {said}\n{complained}");
    }
}
