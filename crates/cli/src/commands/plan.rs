//! `shanty plan`: what a job would train and cost, before it costs anything.

use serde::Serialize;
use shanty_config::JobSpec;
use shanty_data::{SourceSummary, Summary, order::Order};
use shanty_remote::hub::{Hub, Missing, ModelId};

use crate::{
    base,
    failure::{CommandResult, Exit},
    format,
    job_file::JobFile,
    preflight::{Memory, Preflight, Share},
    prepared,
    run::LocalOptions,
    ui::{Paint, Ui, paint},
};

/// Show what a job would train and cost: modules, parameters, memory, data, steps
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty plan job.toml
  shanty plan job.toml --set adapter.r=64 --output json

Reads the data once, as the run will. Writes nothing that stays.")]
pub(crate) struct Args {
    #[command(flatten)]
    file: JobFile,
    #[command(flatten)]
    local: LocalOptions,
    /// Download the base model first, if it is of the Hugging Face hub and not here
    #[arg(long)]
    download: bool,
}

/// What scripts see; the keys are a promise (DESIGN §5).
#[derive(Debug, Serialize)]
struct Plan {
    trainable_parameters: u64,
    total_parameters: u64,
    matched_modules: Vec<String>,
    /// Virtual tokens in front of every sample; they count towards a row's length.
    virtual_tokens: usize,
    memory: Memory,
    /// How many workers share a base, and why.
    shard: Share,
    tokens_per_epoch: u64,
    trained_tokens_per_epoch: u64,
    padding_fraction: f64,
    steps: u64,
    epochs: f64,
    rows: u64,
    eval_rows: u64,
    workers: u32,
    micro_batch_rows: usize,
    recompute: bool,
    /// What becomes of each layer's activations.
    layers: String,
    /// Tokens of the longest row that memory has room for; null where the memory of the card is not known.
    largest_context: Option<usize>,
    #[serde(skip)]
    positions: usize,
    data_form: String,
    /// Where there are several.
    sources: Vec<SourceSummary>,
    warnings: Vec<String>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let mut job = args.file.load(&args.local.overrides(), ui)?;
    if args.download {
        base::fetch(&mut job, ui)?;
    }
    if let Some((model, missing)) = base::missing(&job)? {
        return tell_download(&model, &missing, ui);
    }
    base::fetch(&mut job, ui)?;
    let spec = &job.value;
    let workers = spec.cluster.workers.max;
    let preflight = Preflight::of(&job, args.local.threads_each(workers))?;
    let (_scratch, data) = prepared::of_job(spec, &mut |_| {})?;
    let plan = plan(spec, preflight, data.summary())?;
    ui.data(&plan, |plan| render(plan, spec, ui.color_on_stdout()))?;
    for warning in &plan.warnings {
        ui.warn(warning);
    }
    Ok(Exit::Done)
}

/// Nothing can be planned of a model that is not here; what can be said is what it takes to get it.
fn tell_download(model: &ModelId, missing: &Missing, ui: &Ui) -> CommandResult<Exit> {
    let cache = Hub::from_env().cache().to_owned();
    let report = serde_json::json!({ "download": {
        "model": model.id, "commit": missing.commit, "files": missing.files, "bytes": missing.bytes, "cache": cache,
    }});
    ui.data(&report, |_| {
        format!(
            "would download {} in {} files: {} at commit {}, into {}\n\
             `shanty run` does it by itself; `shanty plan --download` does it and then shows the plan",
            format::bytes(missing.bytes),
            missing.files,
            model.id,
            missing.commit,
            cache.display(),
        )
    })?;
    Ok(Exit::Done)
}

fn plan(spec: &JobSpec, preflight: Preflight, data: &Summary) -> CommandResult<Plan> {
    let mix = data.train.mix();
    let order = Order::mixed(spec.train.seed, data.train.rows, &mix, spec.train.global_batch_size as u64)?;
    let steps = spec.train.steps.unwrap_or_else(|| u64::from(spec.train.epochs) * order.steps_per_epoch());
    let mut warnings = data.warnings.clone();
    warnings.extend(preflight.warnings);
    warnings.extend(doubts(spec, data, steps, &order));
    Ok(Plan {
        trainable_parameters: preflight.trainable_parameters,
        total_parameters: preflight.total_parameters,
        matched_modules: preflight.matched_modules,
        virtual_tokens: preflight.virtual_tokens,
        memory: preflight.memory,
        shard: preflight.shard,
        tokens_per_epoch: data.train.tokens,
        trained_tokens_per_epoch: data.train.trained_tokens,
        padding_fraction: data.train.padding_fraction,
        steps,
        epochs: steps as f64 / order.steps_per_epoch() as f64,
        rows: data.train.rows,
        eval_rows: data.eval.as_ref().map_or(0, |eval| eval.rows),
        workers: spec.cluster.workers.max,
        micro_batch_rows: preflight.micro_batch_rows,
        recompute: preflight.recompute,
        layers: preflight.layers,
        largest_context: preflight.largest_context,
        positions: preflight.positions,
        data_form: data.train.form.clone(),
        sources: data.train.sources.clone(),
        warnings,
    })
}

/// What is allowed and trains badly, as far as only data and model together tell.
fn doubts(spec: &JobSpec, data: &Summary, steps: u64, order: &Order) -> Vec<String> {
    let mut doubts = Vec::new();
    let (batch, workers) = (spec.train.global_batch_size as u64, u64::from(spec.cluster.workers.max));
    if batch < workers {
        doubts
            .push(format!("{workers} workers share steps of {batch} rows: {} of them idle", workers - batch));
    }
    if data.train.rows < batch {
        doubts.push(format!(
            "the data makes {} rows and a step wants {batch}: every step trains all of it",
            data.train.rows
        ));
    }
    if steps <= spec.train.warmup_steps {
        doubts.push(format!("all {steps} steps are warm-up: the learning rate never reaches its peak"));
    }
    let epochs = steps as f64 / order.steps_per_epoch() as f64;
    if epochs > 10.0 {
        doubts.push(format!("the data is passed over {epochs:.0} times: it will be learnt by heart"));
    }
    if data.train.padding_fraction > 0.5 {
        doubts.push(format!(
            "{:.0} % of the rows' room holds no token: a smaller data.max_length, or packing, wastes less",
            100.0 * data.train.padding_fraction
        ));
    }
    let cut = data.train.truncated_trained_tokens;
    if cut * 20 > data.train.trained_tokens {
        doubts.push(format!(
            "{} trained tokens are cut off at data.max_length = {}",
            format::count(cut),
            spec.data.max_length
        ));
    }
    if data.eval.is_none() {
        doubts.push("without data.eval nobody will know whether it learnt anything".to_owned());
    }
    doubts
}

fn render(plan: &Plan, spec: &JobSpec, color: bool) -> String {
    let head = |text: &str| paint(color, Paint::Bold, &format!("{text:<12}"));
    let memory = &plan.memory;
    let mut lines = vec![format!(
        "{}{} trainable of {} parameters ({})",
        head("parameters"),
        format::count(plan.trainable_parameters),
        format::count(plan.total_parameters),
        format::percent(plan.trainable_parameters, plan.total_parameters)
    )];
    lines.push(match plan.virtual_tokens {
        0 => format!("{}{} modules", head("matched"), plan.matched_modules.len()),
        count => format!(
            "{}{count} virtual tokens in front of every sample, within a row's length",
            head("matched")
        ),
    });
    lines.extend(format::modules(&plan.matched_modules).iter().map(|module| format!("{:12}{module}", "")));
    lines.push(format!(
        "{}{} a worker: base {}, adapter {}, optimizer {}, activations {}, scratch {}",
        head("memory"),
        format::bytes(memory.total()),
        format::bytes(memory.base),
        format::bytes(memory.adapter),
        format::bytes(memory.optimizer),
        format::bytes(memory.activations),
        format::bytes(memory.scratch),
    ));
    lines.extend(base_lines(plan, &head));
    lines.push(format!("{:12}micro-batches of {} rows; {}", "", plan.micro_batch_rows, plan.layers));
    if memory.host > 0 {
        lines.push(format!("{:12}{} more in the host's memory", "", format::bytes(memory.host)));
    }
    if let Some(tokens) = plan.largest_context {
        let made_for = match plan.positions < tokens {
            true => format!("; the base was made for {}", format::count(plan.positions as u64)),
            false => String::new(),
        };
        lines.push(format!(
            "{:12}rows of up to {} tokens would fit, one at a time{made_for}",
            "",
            format::count(tokens as u64)
        ));
    }
    lines.push(format!(
        "{}{} rows of up to {} tokens ({} form), {} held out",
        head("data"),
        format::count(plan.rows),
        spec.data.max_length,
        plan.data_form,
        format::count(plan.eval_rows),
    ));
    lines.push(format!(
        "{:12}{} tokens an epoch, {} of them trained; {:.1} % of the room is padding",
        "",
        format::count(plan.tokens_per_epoch),
        format::count(plan.trained_tokens_per_epoch),
        100.0 * plan.padding_fraction,
    ));
    lines.extend(plan.sources.iter().map(|source| {
        format!(
            "{:12}{} of {} rows an epoch from {}",
            "",
            format::count(source.rows_per_epoch),
            format::count(source.rows),
            source.path
        )
    }));
    lines.push(format!(
        "{}{} of {} rows each: {:.2} epochs",
        head("steps"),
        format::count(plan.steps),
        spec.train.global_batch_size,
        plan.epochs
    ));
    lines.join("\n")
}

/// How the base is held, why, and what that takes.
fn base_lines(plan: &Plan, head: &dyn Fn(&str) -> String) -> Vec<String> {
    let (shard, base) = (&plan.shard, &plan.memory.base_parts);
    let how = match shard.parts {
        1 => "each worker has its own".to_owned(),
        parts => format!("{parts} workers share one"),
    };
    let mut parts = vec![format!("layers {}", format::bytes(base.layers))];
    if base.slots > 0 {
        parts.push(format!("two whole layers in turn {}", format::bytes(base.slots)));
    }
    parts.push(format!("embedding {}", format::bytes(base.embedding)));
    if base.head > 0 {
        parts.push(format!("head {}", format::bytes(base.head)));
    }
    vec![
        format!("{}{how}: {}", head("base"), shard.reason),
        format!("{:12}of a worker's {}: {}", "", format::bytes(plan.memory.base), parts.join(", ")),
    ]
}
