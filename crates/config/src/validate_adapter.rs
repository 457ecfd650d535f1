//! What is wrong, or looks wrong, with `[adapter]` of a method that adapts modules.

use crate::{
    job::{Bias, JobSpec, LoraInit, Method, Quantization, TargetModules},
    validate::{Findings, Warning},
};

/// Refuses impossible values.
pub(crate) fn adapter(spec: &JobSpec, findings: &mut Findings) {
    let adapter = &spec.adapter;
    findings.require_hinted(
        adapter.r >= 1,
        "adapter.r",
        adapter.r,
        "must be at least 1",
        Some("8 to 64 are usual; 16 is the default"),
    );
    findings.require(
        adapter.lora_alpha.is_finite() && adapter.lora_alpha > 0.0,
        "adapter.lora_alpha",
        adapter.lora_alpha,
        "must be above 0",
    );
    findings.require_hinted(
        (0.0..1.0).contains(&adapter.lora_dropout),
        "adapter.lora_dropout",
        adapter.lora_dropout,
        "must be at least 0 and below 1",
        Some("it is a share: 0.05 drops 5 % of the adapter's inputs"),
    );
    let all_linear = Some("use `\"all-linear\"` for every linear layer");
    if let Some(targets) = &adapter.target_modules {
        names("adapter.target_modules", targets, all_linear, findings);
    }
    if let Some(excluded) = &adapter.exclude_modules {
        names("adapter.exclude_modules", excluded, None, findings);
    }
    match &adapter.modules_to_save {
        Some(TargetModules::Pattern(pattern)) => {
            let hint = "write a list: `modules_to_save = [\"lm_head\"]`";
            findings.require_hinted(
                false,
                "adapter.modules_to_save",
                format!("`{pattern}`"),
                "must be a list of names",
                Some(hint),
            );
        }
        Some(saved) => names("adapter.modules_to_save", saved, None, findings),
        None => {}
    }
    let listed = matches!(adapter.target_modules, Some(TargetModules::Names(_)));
    findings.require_hinted(
        adapter.layers_to_transform.is_none() || listed,
        "adapter.layers_to_transform",
        "given",
        "needs a list of names in `target_modules`",
        Some("write `target_modules = [\"q_proj\", \"v_proj\"]`, or name the layers in a regular expression"),
    );
    findings.require(
        adapter.layers_pattern.is_none() || adapter.layers_to_transform.is_some(),
        "adapter.layers_pattern",
        "given",
        "needs `layers_to_transform`",
    );
    for (name, rank) in adapter.rank_pattern.iter().flatten() {
        let key = format!("adapter.rank_pattern.{name}");
        let whole = *rank >= 1.0 && rank.fract() == 0.0 && *rank <= 65536.0;
        findings.require(whole, &key, rank, "must be a whole number of at least 1");
    }
    for (name, alpha) in adapter.alpha_pattern.iter().flatten() {
        let key = format!("adapter.alpha_pattern.{name}");
        findings.require(alpha.is_finite() && *alpha > 0.0, &key, alpha, "must be above 0");
    }
    if let Some(ratio) = adapter.loraplus_lr_ratio {
        let hint = Some("16 is what the authors of LoRA+ recommend");
        let sound = ratio.is_finite() && ratio > 0.0;
        findings.require_hinted(sound, "adapter.loraplus_lr_ratio", ratio, "must be above 0", hint);
    }
    let embedding = adapter.loraplus_lr_embedding;
    let sound = embedding.is_finite() && embedding > 0.0;
    findings.require(sound, "adapter.loraplus_lr_embedding", embedding, "must be above 0");
    findings.require_hinted(
        !(adapter.has_magnitudes() && adapter.lora_bias),
        "adapter.lora_bias",
        adapter.lora_bias,
        "does not go together with magnitudes",
        Some("PEFT refuses it, too: take `method = \"lora\"`, or leave `lora_bias` out"),
    );
    let quantised = spec.base.quantization == Quantization::Nf4;
    findings.require_hinted(
        adapter.init_lora_weights != LoraInit::Loftq || quantised,
        "adapter.init_lora_weights",
        "`loftq`",
        "makes up for what 4 bits lose, and the base is not quantised",
        Some("set `base.quantization = \"nf4\"`, or take another start"),
    );
    if adapter.method == Method::Adalora {
        adalora(spec, findings);
    }
}

fn adalora(spec: &JobSpec, findings: &mut Findings) {
    let adapter = &spec.adapter;
    let (first, last) = (adapter.init_r, adapter.target_r);
    findings.require(first >= 1, "adapter.init_r", first, "must be at least 1");
    let rule = format!("must be from 1 to `init_r`, which is {first}");
    let hint = Some("`init_r` of 1.5 times `target_r` is usual");
    findings.require_hinted(last >= 1 && last <= first, "adapter.target_r", last, &rule, hint);
    findings.require(adapter.deltaT >= 1, "adapter.deltaT", adapter.deltaT, "must be at least 1");
    for (key, beta) in [("adapter.beta1", adapter.beta1), ("adapter.beta2", adapter.beta2)] {
        findings.require(beta > 0.0 && beta < 1.0, key, beta, "must be between 0 and 1");
    }
    let weight = adapter.orth_reg_weight;
    let sound = weight.is_finite() && weight >= 0.0;
    findings.require(sound, "adapter.orth_reg_weight", weight, "must not be negative");
    let Some(steps) = spec.train.steps else { return };
    let (begin, end) = adapter.adalora_phases(steps);
    let rule = format!("must leave steps to prune in: {begin} before and {end} behind are all of {steps}");
    let key = if adapter.tinit.is_some() { "adapter.tinit" } else { "adapter.tfinal" };
    findings.require(begin + end < steps, key, if adapter.tinit.is_some() { begin } else { end }, &rule);
}

fn names(key: &str, targets: &TargetModules, hint: Option<&str>, findings: &mut Findings) {
    let rule = "must name at least one module";
    match targets {
        TargetModules::Pattern(pattern) => {
            findings.require_hinted(!pattern.trim().is_empty(), key, "empty", rule, hint);
        }
        TargetModules::Names(names) => {
            findings.require_hinted(!names.is_empty(), key, "empty", rule, hint);
            for (index, name) in names.iter().enumerate() {
                let key = format!("{key}[{index}]");
                findings.require(
                    !name.trim().is_empty(),
                    &key,
                    "empty",
                    "must be a module's name or its end",
                );
                let hint = Some("write `target_modules = \"all-linear\"`, without brackets");
                let rule = "has that meaning only as a text of its own, not in a list";
                findings.require_hinted(name != "all-linear", &key, "`all-linear`", rule, hint);
            }
        }
    }
}

/// Values that are allowed and look wrong.
pub(crate) fn warnings(spec: &JobSpec) -> Vec<Warning> {
    let adapter = &spec.adapter;
    let mut warnings = Vec::new();
    let mut warn = |key: &str, message: String, hint: &str| {
        warnings.push(Warning {
            code: "SH0120",
            key: format!("adapter.{key}"),
            message,
            hint: hint.to_owned(),
        });
    };
    if adapter.method.is_lora() {
        let root = if adapter.use_rslora { (adapter.r as f64).sqrt() } else { adapter.r as f64 };
        let scale = adapter.lora_alpha / root;
        if !(0.1..=8.0).contains(&scale) {
            let message = format!("the update is scaled by {scale:.3}: 0.25 to 4 are usual");
            warn("lora_alpha", message, "`lora_alpha` of one or two times `r` is a good first try");
        }
        if adapter.bias != Bias::None {
            let word = if adapter.bias == Bias::All { "all" } else { "adapted" };
            let message = format!(
                "{word} biases of the base are trained: switched off, the adapter leaves another base"
            );
            warn("bias", message, "leave `bias` out unless that is what you want");
        }
    }
    if adapter.method == Method::Ia3 && adapter.modules_to_save.is_some() {
        let message = "whole modules are many times as large as all scales of IA3".to_owned();
        warn("modules_to_save", message, "LoRA is the better choice where whole modules are trained");
    }
    warnings
}
