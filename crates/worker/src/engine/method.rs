//! A job's adapter in the words of the numeric crate.

use shanty_config::job::{self, AdapterSpec, JobSpec, LoraInit, Method};
use shanty_peft_core::adapter::{
    AdaLoraConfig, Bias, Ia3Config, LoraConfig, LoraStart, Selection, SharedMethod, TargetModules,
    select::Pattern,
};

use crate::Error;

use super::virtual_tokens;

/// The method of a job of `steps` steps; where these are not known yet (epochs, before the data is prepared), of many.
pub(super) fn method(spec: &JobSpec, steps: Option<u64>) -> Result<SharedMethod, Error> {
    if let Some(method) = virtual_tokens::method(spec)? {
        return Ok(method);
    }
    Ok(match spec.adapter.method {
        Method::Ia3 => ia3(spec).shared(),
        Method::Adalora => adalora(spec, steps.or(spec.train.steps).unwrap_or(UNKNOWN_STEPS)).shared(),
        _ => lora(spec).shared(),
    })
}

/// Stands for a number of steps that is not known yet, where only sizes are asked for.
const UNKNOWN_STEPS: u64 = 1 << 32;

fn base(spec: &JobSpec) -> Option<String> {
    Some(spec.base.model.display().to_string())
}

fn lora(spec: &JobSpec) -> LoraConfig {
    let adapter = &spec.adapter;
    let selection = selection(adapter);
    LoraConfig {
        base_model_name_or_path: base(spec),
        r: adapter.r,
        lora_alpha: adapter.lora_alpha,
        lora_dropout: adapter.lora_dropout,
        use_rslora: adapter.use_rslora,
        use_dora: adapter.has_magnitudes(),
        bias: match adapter.bias {
            job::Bias::None => Bias::None,
            job::Bias::All => Bias::All,
            job::Bias::LoraOnly => Bias::LoraOnly,
        },
        lora_bias: adapter.lora_bias,
        init_lora_weights: match adapter.init_lora_weights {
            LoraInit::Default => LoraStart::Default,
            LoraInit::Gaussian => LoraStart::Gaussian,
            LoraInit::Random => LoraStart::Random,
            LoraInit::Pissa => LoraStart::Pissa,
            LoraInit::Olora => LoraStart::Olora,
            LoraInit::Loftq => LoraStart::Loftq,
        },
        target_modules: selection.target_modules,
        exclude_modules: selection.exclude_modules,
        layers_to_transform: selection.layers_to_transform,
        layers_pattern: selection.layers_pattern,
        // Whole numbers, as the job was checked.
        rank_pattern: pattern(adapter.rank_pattern.as_ref(), |rank| rank as usize),
        alpha_pattern: pattern(adapter.alpha_pattern.as_ref(), |alpha| alpha),
        modules_to_save: selection.modules_to_save,
        trainable_token_indices: adapter.trainable_token_indices.clone().unwrap_or_default(),
        loraplus_lr_ratio: adapter.loraplus_lr_ratio,
        loraplus_lr_embedding: adapter.loraplus_lr_embedding,
    }
}

fn ia3(spec: &JobSpec) -> Ia3Config {
    let adapter = &spec.adapter;
    Ia3Config {
        base_model_name_or_path: base(spec),
        target_modules: adapter.target_modules.as_ref().map(targets),
        feedforward_modules: adapter.feedforward_modules.as_ref().map(targets),
        exclude_modules: adapter.exclude_modules.as_ref().map(targets),
        modules_to_save: adapter.modules_to_save.as_ref().map(names).unwrap_or_default(),
        init_ia3_weights: true,
    }
}

fn adalora(spec: &JobSpec, steps: u64) -> AdaLoraConfig {
    let adapter = &spec.adapter;
    let (tinit, tfinal) = adapter.adalora_phases(steps);
    AdaLoraConfig {
        base_model_name_or_path: base(spec),
        target_r: adapter.target_r,
        init_r: adapter.init_r,
        tinit,
        tfinal,
        delta_t: adapter.deltaT,
        beta1: adapter.beta1,
        beta2: adapter.beta2,
        orth_reg_weight: adapter.orth_reg_weight,
        total_step: steps,
        lora_alpha: adapter.lora_alpha,
        lora_dropout: adapter.lora_dropout,
        selection: selection(adapter),
        rank_pattern: None,
    }
}

fn selection(adapter: &AdapterSpec) -> Selection {
    Selection {
        target_modules: adapter.target_modules.as_ref().map_or_else(TargetModules::all_linear, targets),
        exclude_modules: adapter.exclude_modules.as_ref().map(targets),
        layers_to_transform: adapter
            .layers_to_transform
            .as_ref()
            .map(|layers| layers.iter().map(|layer| *layer as usize).collect()),
        layers_pattern: adapter.layers_pattern.as_ref().map(names).unwrap_or_default(),
        modules_to_save: adapter.modules_to_save.as_ref().map(names).unwrap_or_default(),
    }
}

fn targets(targets: &job::TargetModules) -> TargetModules {
    match targets {
        job::TargetModules::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
        job::TargetModules::Names(names) => TargetModules::Names(names.clone()),
    }
}

fn names(names: &job::TargetModules) -> Vec<String> {
    match names {
        job::TargetModules::Pattern(name) => vec![name.clone()],
        job::TargetModules::Names(names) => names.clone(),
    }
}

fn pattern<T>(
    map: Option<&std::collections::BTreeMap<String, f64>>,
    convert: impl Fn(f64) -> T,
) -> Pattern<T> {
    Pattern(map.into_iter().flatten().map(|(name, value)| (name.clone(), convert(*value))).collect())
}
