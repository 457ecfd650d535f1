use shanty_config::{Error, check_files};
use shanty_diagnostic::Diagnose;

use crate::Bench;

/// A job file, and the codes with their lines that it is answered with (line 0: the file as a whole).
struct Wrong {
    what: &'static str,
    text: &'static str,
    answers: &'static [(&'static str, usize)],
}

const fn wrong(what: &'static str, text: &'static str, answers: &'static [(&'static str, usize)]) -> Wrong {
    Wrong { what, text, answers }
}

/// Three lines that make a file complete; what is tested begins at line 4.
macro_rules! after_head {
    ($text:literal) => {
        concat!("name = \"x\"\nbase.model = \"model\"\ndata.train = \"data/a.jsonl\"\n", $text)
    };
}

/// The same with several sources, in line 4.
macro_rules! mixed {
    ($train:literal) => {
        concat!("name = \"x\"\nbase.model = \"model\"\n[data]\ntrain = ", $train, "\n")
    };
}

const WRONG: &[Wrong] = &[
    // not a file that can be read as TOML
    wrong("no closing quote", "name = \"x\n", &[("SH0106", 1)]),
    wrong("no value", "name = \"x\"\n[train]\nsteps =\n", &[("SH0106", 3)]),
    wrong("a key twice", after_head!("[train]\nseed = 1\nseed = 2\n"), &[("SH0106", 6)]),
    wrong("a table twice", after_head!("[train]\n[train]\n"), &[("SH0106", 5)]),
    wrong("JSON", "{\"name\": \"x\"}\n", &[("SH0106", 1)]),
    wrong("YAML", "name: x\n", &[("SH0106", 1)]),
    // unknown keys
    wrong("a typo", after_head!("[train]\nlearnign_rate = 1e-3\n"), &[("SH0102", 5)]),
    wrong(
        "a key at the top",
        "learning_rate = 1e-3\nname = \"x\"\nbase.model = \"m\"\ndata.train = \"d\"\n",
        &[("SH0102", 1)],
    ),
    wrong("an unknown table", after_head!("[optimizer]\nlr = 1\n"), &[("SH0102", 4)]),
    wrong("a typo in an inline table", after_head!("[cluster]\nworkers = { mim = 1 }\n"), &[("SH0102", 5)]),
    wrong("a dotted typo", after_head!("train.step = 4\n"), &[("SH0102", 4)]),
    wrong(
        "three at once",
        after_head!("[train]\na1 = 1\nseed = \"x\"\n[adapter]\nr = 0\nb1 = 2\n"),
        &[("SH0102", 5), ("SH0103", 6), ("SH0102", 9)],
    ),
    // wrong types
    wrong("a number in quotes", after_head!("[adapter]\nr = \"16\"\n"), &[("SH0103", 5)]),
    wrong("a fraction for a count", after_head!("[train]\nsteps = 1.5\n"), &[("SH0103", 5)]),
    wrong("text for yes or no", after_head!("[data]\npacking = \"yes\"\n"), &[("SH0106", 4)]),
    wrong("a number for yes or no", after_head!("data.packing = 1\n"), &[("SH0103", 4)]),
    wrong("a table for a number", after_head!("[train.steps]\nx = 1\n"), &[("SH0103", 4)]),
    wrong("a number for a table", after_head!("cluster = 3\n"), &[("SH0103", 4)]),
    wrong("one beta", after_head!("[train]\nbetas = [0.9]\n"), &[("SH0103", 5)]),
    wrong("a beta in quotes", after_head!("[train]\nbetas = [\n0.9,\n\"b\"]\n"), &[("SH0103", 7)]),
    wrong(
        "a number among modules",
        after_head!("[adapter]\ntarget_modules = [\"q\", 3]\n"),
        &[("SH0103", 5)],
    ),
    wrong(
        "a date for a name",
        "name = 2026-01-01\nbase.model = \"m\"\ndata.train = \"d\"\n",
        &[("SH0103", 1)],
    ),
    wrong(
        "a model that is no path",
        "name = \"x\"\nbase = \"model\"\ndata.train = \"d\"\n",
        &[("SH0103", 2)],
    ),
    // unknown words
    wrong("an unknown quantisation", after_head!("base.quantization = \"int8\"\n"), &[("SH0107", 4)]),
    wrong("an unknown method", after_head!("[adapter]\nmethod = \"lorra\"\n"), &[("SH0107", 5)]),
    wrong("an unknown sharding", after_head!("base.shard = \"zero3\"\n"), &[("SH0107", 4)]),
    wrong("an unknown schedule", after_head!("train.schedule = \"cosin\"\n"), &[("SH0107", 4)]),
    wrong("an unknown device", after_head!("cluster.device = \"gpu\"\n"), &[("SH0107", 4)]),
    // missing keys
    wrong("an empty file", "", &[("SH0105", 0), ("SH0105", 0), ("SH0105", 0)]),
    wrong("no name", "[base]\nmodel = \"m\"\n[data]\ntrain = \"d\"\n", &[("SH0105", 0)]),
    wrong("no model", "name = \"x\"\n[base]\n[data]\ntrain = \"d\"\n", &[("SH0105", 2)]),
    wrong("no data", "name = \"x\"\nbase.model = \"m\"\n[data]\neval = \"d\"\n", &[("SH0105", 3)]),
    // impossible values
    wrong("an empty name", "name = \"\"\nbase.model = \"m\"\ndata.train = \"d\"\n", &[("SH0104", 1)]),
    wrong(
        "a name with a slash",
        "name = \"a/b\"\nbase.model = \"m\"\ndata.train = \"d\"\n",
        &[("SH0104", 1)],
    ),
    wrong(
        "a name that is a flag",
        "name = \"-x\"\nbase.model = \"m\"\ndata.train = \"d\"\n",
        &[("SH0104", 1)],
    ),
    wrong("a negative rank", after_head!("[adapter]\nr = -4\n"), &[("SH0104", 5)]),
    wrong("rank 0", after_head!("[adapter]\nr = 0\n"), &[("SH0104", 5)]),
    wrong("alpha 0", after_head!("[adapter]\nlora_alpha = 0\n"), &[("SH0104", 5)]),
    wrong("alpha that is no number", after_head!("[adapter]\nlora_alpha = nan\n"), &[("SH0104", 5)]),
    wrong("dropout 1", after_head!("[adapter]\nlora_dropout = 1.0\n"), &[("SH0104", 5)]),
    wrong("negative dropout", after_head!("[adapter]\nlora_dropout = -0.1\n"), &[("SH0104", 5)]),
    wrong("no target", after_head!("[adapter]\ntarget_modules = []\n"), &[("SH0104", 5)]),
    wrong("an empty target", after_head!("[adapter]\ntarget_modules = [\n\"q\",\n\"\"]\n"), &[("SH0104", 7)]),
    wrong("an empty pattern", after_head!("[adapter]\ntarget_modules = \"\"\n"), &[("SH0104", 5)]),
    wrong(
        "all-linear in a list",
        after_head!("[adapter]\ntarget_modules = [\"all-linear\"]\n"),
        &[("SH0104", 5)],
    ),
    wrong("an unknown start", after_head!("[adapter]\ninit_lora_weights = \"eva\"\n"), &[("SH0107", 5)]),
    wrong(
        "whole modules as a text",
        after_head!("[adapter]\nmodules_to_save = \"lm_head\"\n"),
        &[("SH0104", 5)],
    ),
    wrong("layers without names", after_head!("[adapter]\nlayers_to_transform = [0, 1]\n"), &[("SH0104", 5)]),
    wrong(
        "a negative layer",
        after_head!("[adapter]\ntarget_modules = [\"q\"]\nlayers_to_transform = [0, -1]\n"),
        &[("SH0104", 6)],
    ),
    wrong("a rank of a half", after_head!("[adapter]\nrank_pattern = { q_proj = 2.5 }\n"), &[("SH0104", 5)]),
    wrong(
        "a rank as a text",
        after_head!("[adapter]\nr = 4\nrank_pattern = { q_proj = \"8\" }\n"),
        &[("SH0103", 6)],
    ),
    wrong("alpha 0 for some", after_head!("[adapter]\nalpha_pattern = { q_proj = 0 }\n"), &[("SH0104", 5)]),
    wrong("a ratio of 0", after_head!("[adapter]\nloraplus_lr_ratio = 0\n"), &[("SH0104", 5)]),
    wrong(
        "magnitudes and a bias",
        after_head!("[adapter]\nmethod = \"dora\"\nlora_bias = true\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "a start from what nothing loses",
        after_head!("base.quantization = \"none\"\n[adapter]\ninit_lora_weights = \"loftq\"\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "a higher rank in the end",
        after_head!("[adapter]\nmethod = \"adalora\"\ninit_r = 4\ntarget_r = 8\n"),
        &[("SH0104", 7)],
    ),
    wrong(
        "no step to prune in",
        after_head!("train.steps = 10\n[adapter]\nmethod = \"adalora\"\ntinit = 4\ntfinal = 6\n"),
        &[("SH0104", 7)],
    ),
    wrong("smoothing by 1", after_head!("[adapter]\nmethod = \"adalora\"\nbeta1 = 1.0\n"), &[("SH0104", 6)]),
    wrong(
        "no virtual token",
        after_head!("[adapter]\nmethod = \"prefix_tuning\"\nnum_virtual_tokens = 0\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "more virtual tokens than a row has",
        after_head!("data.max_length = 64\n[adapter]\nmethod = \"prompt_tuning\"\nnum_virtual_tokens = 63\n"),
        &[("SH0104", 7)],
    ),
    wrong(
        "a prefix of no text",
        after_head!("[adapter]\nmethod = \"prefix_tuning\"\nprefix_init_text = \" \"\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "a prompt of a text that is not there",
        after_head!("[adapter]\nmethod = \"prompt_tuning\"\nprompt_tuning_init = \"TEXT\"\n"),
        &[("SH0104", 4)],
    ),
    wrong(
        "a start in other letters",
        after_head!("[adapter]\nmethod = \"prompt_tuning\"\nprompt_tuning_init = \"text\"\n"),
        &[("SH0107", 6)],
    ),
    wrong(
        "a network without width",
        after_head!("[adapter]\nmethod = \"p_tuning\"\nencoder_hidden_size = 0\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "an encoder without layers",
        after_head!("[adapter]\nmethod = \"p_tuning\"\nencoder_num_layers = 0\n"),
        &[("SH0104", 6)],
    ),
    wrong(
        "an encoder that drops all",
        after_head!("[adapter]\nmethod = \"p_tuning\"\nencoder_dropout = 1.0\n"),
        &[("SH0104", 6)],
    ),
    wrong("rows of no token", after_head!("data.max_length = 0\n"), &[("SH0104", 4)]),
    wrong("a broken glob", after_head!("data.eval = \"data/[.jsonl\"\n"), &[("SH0104", 4)]),
    wrong("data of an unknown store", after_head!("data.eval = \"ftp://b/x.jsonl\"\n"), &[("SH0104", 4)]),
    wrong("data of nowhere", after_head!("data.eval = \"s3://\"\n"), &[("SH0104", 4)]),
    wrong("no source", mixed!("[]"), &[("SH0104", 4)]),
    wrong("a source without path", mixed!("[{ weight = 1 }]"), &[("SH0103", 4)]),
    wrong("an unknown key of a source", mixed!("[{ path = \"a\", weigth = 1 }]"), &[("SH0102", 4)]),
    wrong("a source that is a number", mixed!("[\n3]"), &[("SH0103", 5)]),
    wrong("a weight of nothing", mixed!("[{ path = \"a\",\nweight = 0 }]"), &[("SH0104", 5)]),
    wrong("a weight in quotes", mixed!("[{ path = \"a\", weight = \"1\" }]"), &[("SH0103", 4)]),
    wrong("some weights", mixed!("[{ path = \"a\", weight = 1 }, { path = \"b\" }]"), &[("SH0104", 4)]),
    wrong("an unknown form of a source", mixed!("[{ path = \"a\", format = \"csv\" }]"), &[("SH0107", 4)]),
    wrong("steps without rows", after_head!("[train]\nglobal_batch_size = 0\n"), &[("SH0104", 5)]),
    wrong("passes without rows", after_head!("[train]\nmicro_batch_size = 0\n"), &[("SH0104", 5)]),
    wrong("a rate of 0", after_head!("[train]\nlearning_rate = 0.0\n"), &[("SH0104", 5)]),
    wrong("an endless rate", after_head!("[train]\nlearning_rate = inf\n"), &[("SH0104", 5)]),
    wrong("a beta of 1", after_head!("[train]\nbetas = [0.9, 1.0]\n"), &[("SH0104", 5)]),
    wrong("epsilon 0", after_head!("[train]\nepsilon = 0\n"), &[("SH0104", 5)]),
    wrong("negative decay", after_head!("[train]\nweight_decay = -0.1\n"), &[("SH0104", 5)]),
    wrong("a negative norm", after_head!("[train]\nmax_grad_norm = -1\n"), &[("SH0104", 5)]),
    wrong("no epoch", after_head!("[train]\nepochs = 0\n"), &[("SH0104", 5)]),
    wrong("no step", after_head!("[train]\nsteps = 0\n"), &[("SH0104", 5)]),
    wrong("a huge seed", after_head!("[train]\nseed = 99999999999999999999\n"), &[("SH0104", 5)]),
    wrong("too many epochs", after_head!("[train]\nepochs = 4294967296\n"), &[("SH0104", 5)]),
    wrong("no checkpoint kept", after_head!("[checkpoint]\nkeep = 0\n"), &[("SH0104", 5)]),
    wrong("no worker", after_head!("[cluster]\nworkers = { min = 0 }\n"), &[("SH0104", 5)]),
    wrong("more than at most", after_head!("[cluster]\nworkers = { min = 3, max = 2 }\n"), &[("SH0104", 5)]),
    wrong("at least 2, at most 1", after_head!("[cluster]\nworkers = { min = 2 }\n"), &[("SH0104", 5)]),
    wrong("a sample of nothing", after_head!("[sample]\nmax_tokens = 0\n"), &[("SH0104", 5)]),
];

#[test]
fn every_wrong_job_file_is_answered_with_its_code_and_line() {
    let bench = Bench::new();
    for Wrong { what, text, answers } in WRONG {
        let errors = bench.load(text).map(|_| ()).expect_err(what);
        let answered: Vec<(String, usize)> = errors
            .diagnostics()
            .into_iter()
            .map(|diagnostic| (diagnostic.code, diagnostic.line.unwrap_or(0)))
            .collect();
        let expected: Vec<(String, usize)> =
            answers.iter().map(|(code, line)| ((*code).to_owned(), *line)).collect();
        assert_eq!(answered, expected, "{what}: {errors}");
        for diagnostic in errors.diagnostics() {
            assert_eq!(diagnostic.file, Some(bench.path("job.toml")), "{what}");
            assert_eq!(diagnostic.line.is_some(), diagnostic.column.is_some(), "{what}");
            if diagnostic.code != "SH0106" {
                let hinted = diagnostic.hint.is_some() || diagnostic.message.contains("must");
                assert!(hinted, "{what}: says neither what to do nor what must be: {diagnostic}");
            }
        }
    }
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let bench = Bench::new();
    let answer = |path: std::path::PathBuf| {
        let errors = shanty_config::load_job_with(&path, Vec::new(), &[]).expect_err("unreadable");
        let diagnostic = errors.diagnostic();
        (diagnostic.code, diagnostic.line, diagnostic.column, diagnostic.message)
    };
    let (code, line, _, message) = answer(bench.path("none.toml"));
    assert_eq!((code.as_str(), line), ("SH0101", None));
    assert!(message.ends_with("there is no such file"), "{message}");
    let (code, _, _, message) = answer(bench.folder().to_owned());
    assert!(code == "SH0101" && message.ends_with("it is a folder"), "{message}");
    let (code, _, _, message) = answer(bench.write("big.toml", vec![b'#'; (4 << 20) + 1]));
    assert!(code == "SH0101" && message.contains("larger than 4 MiB"), "{message}");
    let (code, line, column, _) = answer(bench.write("latin.toml", b"name = \"x\"\n# \xe9\n"));
    assert_eq!((code.as_str(), line, column), ("SH0108", Some(2), Some(3)));
    let (code, _, _, message) = answer(bench.write("wide.toml", b"\xff\xfen\0a\0"));
    assert!(code == "SH0108" && message.contains("UTF-16"), "{message}");
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_do_no_harm() {
    let bench = Bench::new();
    let text = "\u{feff}name = \"x\"\r\nbase.model = \"model\"\r\ndata.train = \"data/a.jsonl\"\r\n";
    assert_eq!(bench.load(text).expect("right").value.name, "x");
    let errors = bench.load(format!("{text}[train]\r\nsteps = 0\r\n")).expect_err("wrong");
    assert_eq!((errors.diagnostic().line, errors.diagnostic().column), (Some(5), Some(9)));
}

#[test]
fn values_from_variables_and_flags_are_answered_with_their_names() {
    let bench = Bench::new();
    let answer = |environment: &[(&str, &str)], flags: &[(&str, &str)]| {
        let errors = bench.load_with(crate::GOOD, environment, flags).expect_err("wrong");
        let diagnostic = errors.diagnostic();
        assert_eq!((&diagnostic.file, diagnostic.line), (&None, None), "no file is at fault");
        (diagnostic.code.clone(), diagnostic.message.clone(), diagnostic.hint.unwrap_or_default())
    };
    let (code, message, hint) = answer(&[("SHANTY_JOB__TRIAN__STEPS", "5")], &[]);
    assert_eq!((code.as_str(), hint.as_str()), ("SH0102", "did you mean `SHANTY_JOB__TRAIN__STEPS`?"));
    assert!(message.contains("environment variable `SHANTY_JOB__TRIAN__STEPS`"), "{message}");
    let (code, message, _) = answer(&[("SHANTY_JOB__ADAPTER__R", "many")], &[]);
    assert!(code == "SH0103" && message.contains("must be a whole number"), "{message}");
    let (code, message, _) = answer(&[], &[("adapter.r", "0")]);
    assert!(code == "SH0104" && message.contains("`--set adapter.r=0`"), "{message}");
    let (code, _, hint) = answer(&[], &[("lora_alpha", "1")]);
    assert_eq!((code.as_str(), hint.as_str()), ("SH0102", "did you mean `adapter.lora_alpha`?"));
    let (code, _, _) = answer(&[], &[("adapter", "3")]);
    assert_eq!(code, "SH0103");
    let (code, message, _) = answer(&[], &[("base.quantization", "int8")]);
    assert!(code == "SH0107" && message.contains("`nf4`, `none`"), "{message}");
}

#[test]
fn what_is_wrong_with_the_files_a_job_names_is_shown_at_their_keys() {
    const TEXT: &str = "name = \"x\"\n[base]\nmodel = \"model\"\n[data]\ntrain = \"data/a.jsonl\"\n";
    let answers = |bench: &Bench, text: &str| -> Vec<(&'static str, usize)> {
        let job = bench.load(text).unwrap_or_else(|errors| panic!("{errors}"));
        let Err(errors) = check_files(&job) else { return Vec::new() };
        let line = |error: &Error| error.diagnostic().line.unwrap_or(0);
        errors.iter().map(|error| (error.code(), line(error))).collect()
    };
    let bench = Bench::new();
    let fits = format!("{TEXT}max_length = 512\n[checkpoint]\nstore = \"out/a\"\n");
    assert_eq!(answers(&bench, &fits), []);
    assert_eq!(answers(&bench, &fits.replace("512", "513")), [("SH0112", 6)]);
    assert_eq!(answers(&bench, TEXT), [("SH0112", 4)], "the default of 2048 is above the context, too");
    let fits = fits.as_str();
    assert_eq!(answers(&bench, &fits.replace("\"model\"", "\"nowhere\"")), [("SH0110", 3)]);
    assert_eq!(answers(&bench, &fits.replace("\"model\"", "\"job.toml\"")), [("SH0110", 3)]);
    assert_eq!(answers(&bench, &fits.replace("\"model\"", "\"data\"")), [("SH0110", 3)]);
    assert_eq!(answers(&bench, &fits.replace("a.jsonl", "b.jsonl")), [("SH0111", 5)]);
    assert_eq!(answers(&bench, &fits.replace("a.jsonl", "*.parquet")), [("SH0111", 5)]);
    assert_eq!(answers(&bench, &fits.replace("data/a.jsonl", "data")), [("SH0111", 5)]);
    assert_eq!(answers(&bench, &fits.replace("out/a", "data/a.jsonl/out")), [("SH0113", 8)]);

    bench.write("model/config.json", "{");
    assert_eq!(answers(&bench, fits), [("SH0110", 3)]);
    bench.write("model/config.json", "{\"max_position_embeddings\": null}");
    assert_eq!(answers(&bench, fits), [], "a model that does not tell its context has no limit here");
    std::fs::remove_file(bench.path("model/tokenizer.json")).expect("remove");
    assert_eq!(answers(&bench, fits), [("SH0110", 3)]);
    assert!(!bench.path("out").exists(), "a check leaves nothing behind");
    let left: Vec<_> =
        std::fs::read_dir(bench.folder()).expect("list").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 3, "a check leaves nothing behind: {left:?}");
}
