//! What a job may say: every check that needs no file.

use crate::job::{BadStep, JobSpec, Method, PrefixInit, PromptTuningInit, TrainData};

/// A value that cannot be, or looks wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// The dotted key that it is about.
    pub key: String,
    /// Its value.
    pub value: String,
    /// What it must or cannot be.
    pub rule: String,
    /// What to do.
    pub hint: Option<String>,
}

/// A finding that is shown and not stopped at.
#[derive(Debug, Clone, PartialEq)]
pub struct Warning {
    /// `SH0120` and up.
    pub code: &'static str,
    /// The dotted key that it is about.
    pub key: String,
    /// What looks wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

#[derive(Default)]
pub(crate) struct Findings(Vec<Finding>);

impl Findings {
    /// Notes that `key` breaks a rule, unless it holds.
    pub(crate) fn require(&mut self, holds: bool, key: &str, value: impl ToString, rule: &str) {
        self.require_hinted(holds, key, value, rule, None);
    }

    pub(crate) fn require_hinted(
        &mut self,
        holds: bool,
        key: &str,
        value: impl ToString,
        rule: &str,
        hint: Option<&str>,
    ) {
        if !holds {
            self.0.push(Finding {
                key: key.to_owned(),
                value: value.to_string(),
                rule: rule.to_owned(),
                hint: hint.map(str::to_owned),
            });
        }
    }
}

/// Values that cannot be.
pub fn findings(spec: &JobSpec) -> Vec<Finding> {
    let mut findings = Findings::default();
    name(spec, &mut findings);
    crate::validate_adapter::adapter(spec, &mut findings);
    virtual_tokens(spec, &mut findings);
    data(spec, &mut findings);
    batches(spec, &mut findings);
    optimizer(spec, &mut findings);
    cluster(spec, &mut findings);
    shard(spec, &mut findings);
    findings.0
}

const LONGEST_NAME: usize = 64;

fn name(spec: &JobSpec, findings: &mut Findings) {
    let name = &spec.name;
    let good = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    let first_good = name.starts_with(|first: char| first.is_ascii_alphanumeric());
    let rule = "must be letters, digits, `-` and `_`, and begin with a letter or a digit";
    findings.require(
        !name.is_empty() && name.chars().all(good) && first_good,
        "name",
        format!("`{}`", name.escape_debug()),
        rule,
    );
    findings.require(
        name.len() <= LONGEST_NAME,
        "name",
        format!("{} letters long", name.len()),
        "must be at most 64",
    );
}

/// Rows and networks of virtual tokens.
fn virtual_tokens(spec: &JobSpec, findings: &mut Findings) {
    let adapter = &spec.adapter;
    if !adapter.method.has_virtual_tokens() {
        return;
    }
    let (count, longest) = (adapter.num_virtual_tokens, spec.data.max_length);
    let usual = Some("8 to 50 are usual; 20 is the default");
    findings.require_hinted(count >= 1, "adapter.num_virtual_tokens", count, "must be at least 1", usual);
    let room = "must leave at least two of the tokens of `data.max_length`";
    let hint = Some("virtual tokens count towards `data.max_length`: raise that, or use fewer of them");
    findings.require_hinted(count + 2 <= longest, "adapter.num_virtual_tokens", count, room, hint);
    if adapter.method == Method::PrefixTuning && adapter.prefix_init == PrefixInit::Text {
        let text = adapter.prefix_init_text.trim();
        findings.require(!text.is_empty(), "adapter.prefix_init_text", "empty", "must be a text");
    }
    if adapter.method == Method::PromptTuning && adapter.prompt_start() == PromptTuningInit::Text {
        let text = adapter.prompt_tuning_init_text.as_deref().unwrap_or("").trim();
        let hint = Some("tell of the task: `prompt_tuning_init_text = \"Write like Shakespeare:\"`");
        let rule = "must be a text where the prompt begins as one";
        findings.require_hinted(!text.is_empty(), "adapter.prompt_tuning_init_text", "empty", rule, hint);
    }
    let one = "must be at least 1";
    if let Some(hidden) = adapter.encoder_hidden_size {
        findings.require(hidden >= 1, "adapter.encoder_hidden_size", hidden, one);
    }
    let layers = adapter.encoder_num_layers;
    findings.require(
        (1..=64).contains(&layers),
        "adapter.encoder_num_layers",
        layers,
        "must be from 1 to 64",
    );
    let dropout = adapter.encoder_dropout;
    let share = "must be at least 0 and below 1";
    findings.require((0.0..1.0).contains(&dropout), "adapter.encoder_dropout", dropout, share);
}

fn data(spec: &JobSpec, findings: &mut Findings) {
    let data = &spec.data;
    for (key, path) in data.train.paths() {
        pattern(&key, path, findings);
    }
    weights(&data.train, findings);
    if let Some(eval) = &data.eval {
        pattern("data.eval", eval, findings);
    }
    findings.require_hinted(
        data.max_length >= 2,
        "data.max_length",
        data.max_length,
        "must be at least 2",
        Some("a row needs a token to see and a token to learn"),
    );
}

fn pattern(key: &str, pattern: &str, findings: &mut Findings) {
    let shown = format!("`{pattern}`");
    findings.require(!pattern.is_empty(), key, "empty", "must be a path or a glob");
    if let Some((scheme, rest)) = pattern.split_once("://") {
        let known = ["s3", "gs", "az", "http", "https"];
        findings.require_hinted(
            known.contains(&scheme) && !rest.is_empty(),
            key,
            &shown,
            "must be a path, a glob, or a URL that can be read",
            Some("`s3://`, `gs://`, `az://`, `http://` and `https://` can be"),
        );
        if scheme.starts_with("http") {
            // What stands behind a `?` is no glob there.
            return;
        }
    }
    if let Err(error) = glob::Pattern::new(pattern) {
        let rule = format!("no valid glob: {} at character {}", error.msg, error.pos + 1);
        let hint =
            Some("`*`, `?` and `[abc]` match letters, `**` matches folders; write `[[]` for a bracket");
        findings.require_hinted(false, key, shown, &rule, hint);
    }
}

/// All sources have a weight above 0, or none has one.
fn weights(train: &TrainData, findings: &mut Findings) {
    let TrainData::Many(sources) = train else { return };
    findings.require(!sources.is_empty(), "data.train", "an empty list", "must name at least one source");
    let weighted = sources.iter().filter(|source| source.weight.is_some()).count();
    findings.require_hinted(
        weighted == 0 || weighted == sources.len(),
        "data.train",
        format!("weighted in {weighted} of {} sources", sources.len()),
        "must have a weight in all or in none",
        Some("without weights every row comes once an epoch"),
    );
    for (index, weight) in
        sources.iter().enumerate().filter_map(|(index, source)| Some((index, source.weight?)))
    {
        let key = format!("data.train[{index}].weight");
        findings.require(weight.is_finite() && weight > 0.0, &key, weight, "must be above 0");
    }
}

fn batches(spec: &JobSpec, findings: &mut Findings) {
    let train = &spec.train;
    let one = "must be at least 1";
    let endless = Some("leave `steps` out to train for whole `epochs`");
    findings.require(train.steps.is_some() || train.epochs >= 1, "train.epochs", train.epochs, one);
    if let Some(steps) = train.steps {
        findings.require_hinted(steps >= 1, "train.steps", steps, one, endless);
    }
    findings.require_hinted(
        train.global_batch_size >= 1,
        "train.global_batch_size",
        train.global_batch_size,
        one,
        Some("rows per optimizer step, over all workers; 16 to 128 are usual"),
    );
    if let Some(rows) = train.micro_batch_size {
        let chosen = Some("leave it out to have it chosen from the memory that is there");
        findings.require_hinted(rows >= 1, "train.micro_batch_size", rows, one, chosen);
    }
    let memory = train.memory.as_str();
    findings.require_hinted(
        memory == "auto" || crate::job::bytes_of(memory).is_some(),
        "train.memory",
        memory,
        "must be `auto` or a size such as `8GiB`",
        Some("units are GiB, MiB, GB and MB"),
    );
    findings.require(spec.checkpoint.keep >= 1, "checkpoint.keep", spec.checkpoint.keep, one);
    let sample = &spec.sample;
    findings.require(sample.max_tokens >= 1, "sample.max_tokens", sample.max_tokens, one);
}

fn optimizer(spec: &JobSpec, findings: &mut Findings) {
    let train = &spec.train;
    let above = "must be above 0";
    let not_negative = "must not be negative";
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let advice = Some(spec.adapter.method.advice());
    let rate = spec.learning_rate();
    findings.require_hinted(positive(rate), "train.learning_rate", rate, above, advice);
    for (index, beta) in train.betas.into_iter().enumerate() {
        let key = format!("train.betas[{index}]");
        findings.require((0.0..1.0).contains(&beta), &key, beta, "must be at least 0 and below 1");
    }
    findings.require(positive(train.epsilon), "train.epsilon", train.epsilon, above);
    let decay = train.weight_decay;
    findings.require(decay.is_finite() && decay >= 0.0, "train.weight_decay", decay, not_negative);
    let norm = train.max_grad_norm;
    let off = Some("0 turns clipping off");
    findings.require_hinted(norm.is_finite() && norm >= 0.0, "train.max_grad_norm", norm, not_negative, off);
    bad_steps(spec, findings);
}

fn bad_steps(spec: &JobSpec, findings: &mut Findings) {
    let train = &spec.train;
    let spike = train.loss_spike;
    findings.require_hinted(
        spike == 0.0 || spike.is_finite() && spike > 1.0,
        "train.loss_spike",
        spike,
        "must be above 1, or 0",
        Some("3 takes a loss of three times the usual one for a spike; 0 looks for none"),
    );
    findings.require_hinted(
        train.rollback_steps == 0 || train.on_bad_step == BadStep::Skip,
        "train.rollback_steps",
        train.rollback_steps,
        "goes with `on_bad_step = \"skip\"` alone",
        Some("with `stop` the job fails, and `shanty resume` goes on from its last checkpoint"),
    );
}

fn cluster(spec: &JobSpec, findings: &mut Findings) {
    let workers = spec.cluster.workers;
    findings.require(workers.min >= 1, "cluster.workers.min", workers.min, "must be at least 1");
    findings.require(workers.max >= 1, "cluster.workers.max", workers.max, "must be at least 1");
    let priority = spec.cluster.priority;
    findings.require(priority <= 100, "cluster.priority", priority, "must be from 0 to 100");
    let checkpoint = &spec.checkpoint;
    if let Some(store) = checkpoint.store.as_ref().filter(|_| checkpoint.is_remote()) {
        let store = store.to_string_lossy();
        let known = ["s3://", "gs://", "az://"].iter().any(|scheme| {
            store.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
        });
        let rule =
            "must be a folder, or `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`";
        findings.require(known, "checkpoint.store", &store, rule);
    }
    if workers.min >= 1 && workers.max >= 1 {
        let rule = format!("must be at least `min`, which is {}", workers.min);
        let hint = "write `workers = { min = 1, max = 8 }`; `max` is 1 where it is left out";
        findings.require_hinted(
            workers.max >= workers.min,
            "cluster.workers.max",
            workers.max,
            &rule,
            Some(hint),
        );
    }
}

/// A base that several workers share.
fn shard(spec: &JobSpec, findings: &mut Findings) {
    let crate::job::Shard::Parts(parts) = spec.base.shard else { return };
    let alone = Some("`replicate` gives each worker a base of its own");
    findings.require_hinted(parts >= 2, "base.shard", parts, "must be at least 2", alone);
    let max = spec.cluster.workers.max;
    let rule = format!("must be at most `cluster.workers.max`, which is {max}");
    let hint = Some("workers train in whole groups: raise `cluster.workers.max` to a multiple of it");
    findings.require_hinted(parts <= max, "base.shard", parts, &rule, hint);
    let dense = spec.base.quantization == crate::job::Quantization::None;
    let rule = "must be `replicate` where `base.quantization` is `none`";
    findings.require_hinted(!dense, "base.shard", parts, rule, Some("only weights in 4 bits are shared"));
}

/// Values that are allowed and look wrong. `named` tells whether the user wrote a key.
pub fn warnings(spec: &JobSpec, named: impl Fn(&str) -> bool) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let (low, high) = spec.adapter.method.usual_learning_rates();
    let rate = spec.learning_rate();
    if rate < low || rate > high {
        warnings.push(Warning {
            code: "SH0120",
            key: "train.learning_rate".to_owned(),
            message: format!("a learning rate of {rate:e} is unusual: {low:e} to {high:e} are usual here"),
            hint: spec.adapter.method.advice().to_owned(),
        });
    }
    if spec.adapter.method == Method::PromptTuning && spec.adapter.prompt_start() == PromptTuningInit::Random
    {
        warnings.push(Warning {
            code: "SH0123",
            key: "adapter.prompt_tuning_init".to_owned(),
            message: "a prompt that begins at random lies far from all embeddings and trains badly"
                .to_owned(),
            hint: "begin from a text: `prompt_tuning_init_text = \"…\"`; or use `SAMPLE_VOCAB`".to_owned(),
        });
    }
    if spec.adapter.method == Method::PrefixTuning && spec.adapter.prefix_init != PrefixInit::Text {
        warnings.push(Warning {
            code: "SH0123",
            key: "adapter.prefix_init".to_owned(),
            message: "a prefix that begins as the keys and values of a text trains better".to_owned(),
            hint: "leave `prefix_init` out, and tell of the task in `prefix_init_text`".to_owned(),
        });
    }
    if let Some(steps) = spec.train.steps.filter(|steps| spec.train.warmup_steps >= *steps) {
        let warmup = spec.train.warmup_steps;
        warnings.push(Warning {
            code: "SH0120",
            key: "train.warmup_steps".to_owned(),
            message: format!("the warm-up of {warmup} steps is not over before the last of {steps} steps"),
            hint: "a warm-up of 3 to 10 % of all steps is usual".to_owned(),
        });
    }
    let (rows, workers) = (spec.train.global_batch_size, spec.cluster.workers.max);
    if rows < workers as usize {
        warnings.push(Warning {
            code: "SH0121",
            key: "train.global_batch_size".to_owned(),
            message: format!("{rows} rows a step leave some of {workers} workers without work"),
            hint: format!("set `global_batch_size` to {workers} or a multiple of it"),
        });
    }
    let parts = spec.base.shard.parts();
    if parts > 1 && !workers.is_multiple_of(parts) && workers >= parts {
        warnings.push(Warning {
            code: "SH0121",
            key: "base.shard".to_owned(),
            message: format!("of {workers} workers in groups of {parts}, {} wait as spares", workers % parts),
            hint: format!("set `cluster.workers.max` to a multiple of {parts}"),
        });
    }
    warnings.extend(crate::validate_adapter::warnings(spec));
    let mut without_effect = |key: &str, why: &str| {
        if named(key) {
            warnings.push(Warning {
                code: "SH0122",
                key: key.to_owned(),
                message: format!("`{key}` has no effect: {why}"),
                hint: "remove it".to_owned(),
            });
        }
    };
    for key in crate::methods::KEYS {
        if let Some(why) = spec.adapter.method.ignores(&spec.adapter, key) {
            without_effect(&format!("adapter.{key}"), why);
        }
    }
    if spec.train.steps.is_some() {
        without_effect("train.epochs", "`train.steps` says how long to train");
    }
    if spec.data.eval.is_none() {
        without_effect("train.eval_every_steps", "there is no `data.eval`");
    }
    if spec.base.quantization == crate::job::Quantization::None {
        without_effect("base.double_quantization", "`base.quantization` is `none`");
    }
    if spec.sample.prompt.is_none() {
        without_effect("sample.max_tokens", "there is no `sample.prompt`");
    }
    warnings
}
