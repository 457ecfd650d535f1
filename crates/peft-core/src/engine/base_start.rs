//! Starts of trained tensors that follow from the base.

use crate::{
    adapter::{AnyMethod, Fit, ModuleStart, ParameterEntry, Role, Start},
    error::Result,
    model::{BaseSource, LayerWeights, ModelConfig, Module, ModuleKind, Norm, Place, Projection},
};

/// Fills in what is [`Start::Base`] or [`Start::Computed`].
pub(super) fn fill(
    fit: &Fit,
    config: &ModelConfig,
    base: &mut dyn BaseSource,
    parameters: &mut [f32],
) -> Result<()> {
    let Some(method) = fit.method() else { return Ok(()) };
    let layout = fit.layout();
    for adapted in layout.modules() {
        let (module, tensors) = (&adapted.module, layout.tensors(adapted));
        if tensors.iter().all(|entry| !matches!(entry.start, Start::Base | Start::Computed)) {
            continue;
        }
        for entry in tensors.iter().filter(|entry| entry.start == Start::Base) {
            copy(&**method, config, base, module, entry, &mut parameters[entry.range.clone()])?;
        }
        if adapted.branch && tensors.iter().any(|entry| entry.start == Start::Computed) {
            let weight = weight(base, module)?;
            method.start(&mut ModuleStart { module, tensors, weight: &weight, parameters })?;
        }
    }
    Ok(())
}

/// A module's weight, row after row.
fn weight(base: &mut dyn BaseSource, module: &Module) -> Result<Vec<f32>> {
    let mut weight = vec![0.0; module.shape[0] * module.shape[1]];
    match (module.place, module.kind) {
        (Place::Layer(layer), ModuleKind::Linear) => {
            let weights = base.layer(layer)?;
            weights.linear(Projection::ALL[module.index]).weight.write_f32(&mut weight);
        }
        (Place::Layer(layer), ModuleKind::Norm) => {
            weight.copy_from_slice(norm(&base.layer(layer)?, Norm::ALL[module.index]));
        }
        (_, ModuleKind::Norm) => weight.copy_from_slice(base.final_norm()),
        (_, ModuleKind::Head) => base.head().rows_f32(0..module.shape[0], &mut weight),
        (_, ModuleKind::Embedding) => base.embedding().rows_f32(0..module.shape[0], &mut weight),
        _ => {}
    }
    Ok(weight)
}

fn norm<'a>(weights: &LayerWeights<'a>, norm: Norm) -> &'a [f32] {
    let of = |norm: Option<&'a [f32]>| norm.unwrap_or_default();
    match norm {
        Norm::AttentionInput => weights.input_norm,
        Norm::Query => of(weights.query_norm),
        Norm::Key => of(weights.key_norm),
        Norm::AttentionOutput => of(weights.attention_output_norm),
        Norm::MlpInput => weights.mlp_norm,
        Norm::MlpOutput => of(weights.mlp_output_norm),
    }
}

fn copy(
    method: &dyn AnyMethod,
    config: &ModelConfig,
    base: &mut dyn BaseSource,
    module: &Module,
    entry: &ParameterEntry,
    out: &mut [f32],
) -> Result<()> {
    match (entry.role, module.place) {
        (Role::Rows, _) => {
            let table = base.embedding();
            for (row, token) in out.chunks_exact_mut(config.hidden_size).zip(method.trained_tokens()) {
                table.gather_row(*token as usize, row);
            }
        }
        (Role::Bias, Place::Layer(layer)) => {
            let weights = base.layer(layer)?;
            if let Some(bias) = weights.linear(Projection::ALL[module.index]).bias {
                out.copy_from_slice(bias);
            }
        }
        _ => out.copy_from_slice(&weight(base, module)?),
    }
    Ok(())
}
