use shanty_config::{
    Place, check_files, from_json,
    job::{Quantization, TargetModules},
    load_job, parse_override, to_json,
};

use crate::{Bench, GOOD, owned};

#[test]
fn the_example_job_is_right_and_its_files_are_there() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/shakespeare/job.toml");
    let job = load_job(example.as_ref(), &[]).unwrap_or_else(|errors| panic!("{errors}"));
    check_files(&job).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(job.warnings, []);
    assert_eq!(job.value.adapter.r, 16);
    assert_eq!(job.value.base.quantization, Quantization::Nf4);
}

#[test]
fn flags_win_over_variables_win_over_the_file_wins_over_defaults() {
    let bench = Bench::new();
    let environment = [("SHANTY_JOB__TRAIN__STEPS", "20"), ("SHANTY_JOB__TRAIN__SEED", "1"), ("HOME", "/")];
    let flags = [("train.steps", "30")];

    let job = bench.load(GOOD).expect("right");
    assert_eq!((job.value.train.steps, job.value.train.seed), (Some(10), 17));
    let job = bench.load_with(GOOD, &environment, &[]).expect("right");
    assert_eq!((job.value.train.steps, job.value.train.seed), (Some(20), 1));
    let job = bench.load_with(GOOD, &environment, &flags).expect("right");
    assert_eq!((job.value.train.steps, job.value.train.seed), (Some(30), 1));

    assert_eq!(job.locate("train.steps"), Place::Flag { text: "--set train.steps=30".to_owned() });
    let variable = "SHANTY_JOB__TRAIN__SEED".to_owned();
    assert_eq!(job.locate("train.seed"), Place::Environment { variable });
    assert!(matches!(job.locate("data.max_length"), Place::File { at: Some(at), .. } if at.line == 7));
}

#[test]
fn of_two_flags_for_one_key_the_later_wins() {
    let job =
        Bench::new().load_with(GOOD, &[], &[("train.steps", "3"), ("train.steps", "4")]).expect("right");
    assert_eq!(job.value.train.steps, Some(4));
    assert_eq!(job.locate("train.steps"), Place::Flag { text: "--set train.steps=4".to_owned() });
}

#[test]
fn values_from_outside_are_read_as_their_key_wants() {
    let flags = [
        ("name", "17"),
        ("train.learning_rate", "1e-4"),
        ("train.betas", "[0.8, 0.9]"),
        ("base.quantization", "none"),
        ("base.double_quantization", "false"),
        ("adapter.target_modules", r#"["q_proj", "v_proj"]"#),
        ("cluster.workers", "{ min = 2, max = 3 }"),
        ("cluster.workers.max", "4"),
        ("sample.prompt", "\"a\\nb\""),
    ];
    let job = Bench::new().load_with(GOOD, &[], &flags).unwrap_or_else(|errors| panic!("{errors}")).value;
    assert_eq!(job.name, "17");
    assert_eq!(job.train.learning_rate, Some(1e-4));
    assert_eq!(job.train.betas, [0.8, 0.9]);
    assert_eq!(job.base.quantization, Quantization::None);
    assert!(!job.base.double_quantization);
    let names = ["q_proj", "v_proj"].map(str::to_owned).to_vec();
    assert_eq!(job.adapter.target_modules, Some(TargetModules::Names(names)));
    assert_eq!((job.cluster.workers.min, job.cluster.workers.max), (2, 4));
    assert_eq!(job.sample.prompt.as_deref(), Some("a\nb"));
}

#[test]
fn a_table_from_outside_leaves_the_other_keys_of_the_file() {
    let text = format!("{GOOD}[cluster]\nworkers = {{ min = 2, max = 5 }}\n");
    let job = Bench::new().load_with(text, &[], &[("cluster.workers.max", "9")]).expect("right");
    assert_eq!((job.value.cluster.workers.min, job.value.cluster.workers.max), (2, 9));
}

#[test]
fn required_keys_may_come_from_outside_the_file() {
    let environment = [("SHANTY_JOB__BASE__MODEL", "/models/tiny"), ("SHANTY_JOB__DATA__TRAIN", "/d.jsonl")];
    let job = Bench::new().load_with("", &environment, &[("name", "x")]).expect("right");
    assert_eq!(job.value.base.model.to_str(), Some("/models/tiny"));
}

#[test]
fn paths_of_the_file_count_from_its_folder_and_others_from_here() {
    let bench = Bench::new();
    let here = std::env::current_dir().expect("a current folder");
    let job = bench.load(GOOD).expect("right").value;
    assert_eq!(job.base.model, bench.path("model"));
    assert_eq!(
        job.data.train.paths(),
        [("data.train".to_owned(), bench.path("data/*.jsonl").to_str().expect("UTF-8"))]
    );
    assert_eq!(job.checkpoint.store, Some(here.join("runs/pirate")));

    let text = format!("{GOOD}[checkpoint]\nstore = \"out\"\n");
    assert_eq!(bench.load(&text).expect("right").value.checkpoint.store, Some(bench.path("out")));
    let job = bench.load_with(&text, &[], &[("checkpoint.store", "out")]).expect("right").value;
    assert_eq!(job.checkpoint.store, Some(here.join("out")));
}

#[test]
fn a_job_survives_the_wire_to_the_last_bit() {
    let flags = [("train.learning_rate", "0.00031415926535897"), ("adapter.lora_dropout", "0.1")];
    let job = Bench::new().load_with(GOOD, &[], &flags).expect("right").value;
    let wire = to_json(&job);
    assert_eq!(from_json(&wire).expect("what was written"), job);
    assert_eq!(to_json(&from_json(&wire).expect("what was written")), wire);
}

#[test]
fn a_job_from_the_wire_is_checked_like_a_file() {
    let job = Bench::new().load(GOOD).expect("right").value;
    let codes = |wire: &str| -> Vec<&'static str> {
        from_json(wire).expect_err("wrong").iter().map(shanty_config::Error::code).collect()
    };
    assert_eq!(codes(&to_json(&job).replace("\"r\":16", "\"r\":0")), ["SH0104"]);
    assert_eq!(codes(&to_json(&job).replace("\"r\":16", "\"rank\":16")), ["SH0114"]);
    assert_eq!(codes("{"), ["SH0114"]);
}

#[test]
fn overrides_split_at_the_first_equals_sign() {
    assert_eq!(parse_override("a.b = c=d").expect("right"), owned(&[("a.b", "c=d")])[0]);
    assert!(parse_override("train.steps").is_err());
    assert!(parse_override(" =5").is_err());
}

#[test]
fn errors_from_elsewhere_are_shown_at_the_key_they_are_about() {
    let text = format!("{GOOD}[adapter]\ntarget_modules = [\"q_proj\", \"nope\"]\n");
    let job = Bench::new().load(text).expect("right");
    let error = shanty_diagnostic::Diagnostic::new("SH0403", "`nope` matches no module");
    let shown = job.attach("adapter.target_modules[1]", error);
    assert_eq!((shown.line, shown.column, shown.width), (Some(11), Some(29), Some(6)));
}

#[test]
fn what_looks_wrong_is_told_and_not_stopped_at() {
    let text = "
name = \"x\"
base.model = \"model\"
data.train = \"data/a.jsonl\"
[train]
epochs = 2
steps = 4
warmup_steps = 4
learning_rate = 0.5
global_batch_size = 2
eval_every_steps = 2
[cluster]
workers = { min = 1, max = 4 }
";
    let job = Bench::new().load(text).expect("allowed");
    let told: Vec<_> = job.warnings.iter().map(|warning| (warning.code.as_str(), warning.line)).collect();
    let expected = [
        ("SH0120", Some(9)),
        ("SH0120", Some(8)),
        ("SH0121", Some(10)),
        ("SH0122", Some(6)),
        ("SH0122", Some(11)),
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_start_that_trains_badly_and_keys_of_other_methods_are_warned_of() {
    // The first key behind `[adapter]` stands in line 11.
    let warned = |adapter: &str| -> Vec<(String, usize)> {
        let job = Bench::new().load(format!("{GOOD}[adapter]\n{adapter}")).expect("right");
        job.warnings.iter().map(|warning| (warning.code.clone(), warning.line.unwrap_or(0))).collect()
    };
    let told = |code: &str, line: usize| (code.to_owned(), line);
    let random = warned("method = \"prompt_tuning\"\nprompt_tuning_init = \"RANDOM\"\n");
    assert_eq!(random, [told("SH0123", 12)]);
    assert_eq!(warned("method = \"prompt_tuning\"\n"), []);
    let zero = warned("method = \"prefix_tuning\"\nprefix_init = \"zero\"\n");
    assert_eq!(zero, [told("SH0123", 12)]);
    let other = warned("method = \"p_tuning\"\nr = 8\nprefix_projection = true\nencoder_hidden_size = 64\n");
    assert_eq!(other, [told("SH0122", 12), told("SH0122", 13)]);
    assert_eq!(warned("encoder_hidden_size = 64\n"), [told("SH0122", 11)]);
    assert_eq!(
        warned("method = \"prefix_tuning\"\nprefix_projection = true\nencoder_hidden_size = 64\n"),
        []
    );
}

#[test]
fn the_learning_rate_follows_the_method_unless_it_is_named() {
    let rate = |adapter: &str| {
        let text = format!("{GOOD}[adapter]\nmethod = \"{adapter}\"\n");
        Bench::new().load(text).expect("right").value.learning_rate()
    };
    assert_eq!(["lora", "prefix_tuning", "prompt_tuning", "p_tuning"].map(rate), [2e-4, 5e-3, 1e-2, 1e-4]);
    let named = Bench::new().load_with(GOOD, &[], &[("train.learning_rate", "3e-3")]).expect("right").value;
    assert_eq!(named.learning_rate(), 3e-3);
}

#[test]
fn several_sources_of_data_are_tables_in_either_spelling() {
    let bench = Bench::new();
    bench.write("data/b.jsonl", "{\"text\": \"haul away\"}\n");
    let inline = "name = \"x\"\nbase.model = \"model\"\n[data]\nmax_length = 256\ntrain = [{ path = \"data/a.jsonl\", weight = 7 }, \
                  { path = \"s3://crew/*.parquet\", weight = 3.0, format = \"text\" }]\n";
    let spread = "name = \"x\"\nbase.model = \"model\"\n[data]\nmax_length = 256\n[[data.train]]\npath = \"data/a.jsonl\"\nweight = 7\n\
                  [[data.train]]\npath = \"s3://crew/*.parquet\"\nweight = 3.0\nformat = \"text\"\n";
    let job = bench.load(inline).expect("right");
    assert_eq!(job.value, bench.load(spread).expect("right").value);
    check_files(&job).expect("what is in a store is looked at later");
    let sources = job.value.data.train.sources();
    assert_eq!(sources[0].path, bench.path("data/a.jsonl").to_str().expect("UTF-8"));
    assert_eq!((sources[0].weight, sources[0].format), (Some(7.0), None));
    assert_eq!((sources[1].path.as_str(), sources[1].weight), ("s3://crew/*.parquet", Some(3.0)));
    let wire = to_json(&job.value);
    assert_eq!(from_json(&wire).expect("what was written"), job.value);
    let outside = [("data.train", "[{ path = \"/d/a.jsonl\" }, { path = \"/d/b.jsonl\" }]")];
    assert_eq!(bench.load_with(GOOD, &[], &outside).expect("right").value.data.train.sources().len(), 2);

    let text = inline.replace("data/a.jsonl", "data/none.jsonl");
    let errors = check_files(&bench.load(text).expect("right")).expect_err("it is not there");
    let places: Vec<_> = errors.diagnostics().iter().map(|error| (error.code.clone(), error.line)).collect();
    assert_eq!(places, [("SH0111".to_owned(), Some(5))]);
}

#[test]
fn a_model_of_the_hub_is_no_path() {
    let bench = Bench::new();
    let with_model =
        |model: &str| bench.load(GOOD.replace("\"model\"", &format!("\"{model}\""))).expect("right");
    let job = with_model("crew/tiny@main");
    assert_eq!(job.value.base.model.to_str(), Some("hf://crew/tiny@main"));
    check_files(&job).expect("what is on the hub is looked at later");
    // A folder of that name, or one that could hold it, is a path.
    bench.write("crew/other/config.json", "{}");
    assert_eq!(with_model("crew/tiny").value.base.model, bench.path("crew/tiny"));
    assert_eq!(with_model("./shanty/tiny").value.base.model, bench.path("shanty/tiny"));
}

#[test]
fn a_base_is_shared_by_a_word_or_a_number() {
    use shanty_config::job::Shard;
    let bench = Bench::new();
    let shard = |line: &str, flags: &[(&str, &str)]| {
        let text = GOOD.replace("[base]\n", &format!("[base]\n{line}\n"));
        let more = "[cluster]\nworkers = { max = 8 }\n";
        bench.load_with(format!("{text}\n{more}"), &[], flags).map(|loaded| loaded.value.base.shard)
    };
    assert_eq!(shard("", &[]).unwrap(), Shard::Auto);
    assert_eq!(shard("shard = \"replicate\"", &[]).unwrap(), Shard::Replicate);
    assert_eq!(shard("shard = 4", &[]).unwrap(), Shard::Parts(4));
    assert_eq!(shard("", &[("base.shard", "2")]).unwrap(), Shard::Parts(2));
    assert_eq!(shard("shard = 4", &[("base.shard", "auto")]).unwrap(), Shard::Auto);
    let wrong = |line: &str| shard(line, &[]).unwrap_err().to_string();
    assert!(wrong("shard = \"replicated\"").contains("replicate"), "{}", wrong("shard = \"replicated\""));
    assert!(wrong("shard = 9").contains("at most `cluster.workers.max`"), "{}", wrong("shard = 9"));
    assert!(wrong("shard = 1").contains("at least 2"), "{}", wrong("shard = 1"));
    let dense = wrong("shard = 2\nquantization = \"none\"");
    assert!(dense.contains("quantization"), "{dense}");
    let written = serde_json::to_value(Shard::Parts(3)).unwrap();
    assert_eq!(
        (written.clone(), serde_json::from_value::<Shard>(written).unwrap()),
        (3.into(), Shard::Parts(3))
    );
}
