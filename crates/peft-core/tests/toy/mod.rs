//! A whole method of adaptation in under 60 lines: `y = l * (W x + b)` with one trained l for each output.

use std::sync::Arc;

use serde_json::{Map, Value};
use shanty_peft_core::{
    Result,
    adapter::{
        BranchScratch, LinearBranch, LinearSite, Matched, Method, MethodOn, Needs, ParameterEntry,
        ParameterLayout, Registration, Start, TargetModules, Tensor, config,
    },
    backend::{Backend, View, ViewMut},
    model::{ModelConfig, Module},
};

#[derive(Debug)]
pub struct OutputScale;

pub const REGISTRATION: Registration =
    Registration { peft_type: "OUTPUT_SCALE", read: |_| Ok(Arc::new(OutputScale)) };

impl Method for OutputScale {
    fn peft_type(&self) -> &'static str {
        REGISTRATION.peft_type
    }
    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        TargetModules::all_linear().find(model)
    }
    fn tensors(&self, module: &Module) -> Vec<Tensor> {
        vec![Tensor::new("scale", [module.shape[0]]).start(Start::Constant(1.0))]
    }
    fn needs(&self, module: &Module) -> Needs {
        Needs { kept: module.shape[0], output: module.shape[0], ..Needs::default() }
    }
    fn settings(&self, layout: &ParameterLayout, _state: &[f32]) -> Map<String, Value> {
        Map::from_iter([("target_modules".to_owned(), config::adapted_modules(layout))])
    }
}

impl<B: Backend> MethodOn<B> for OutputScale {
    fn linear(&self, _module: &Module, tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<B>>> {
        Some(Box::new(Scale { at: tensors[0].range.start, len: tensors[0].range.len() }))
    }
}

#[rustfmt::skip]
struct Scale { at: usize, len: usize }

impl<B: Backend> LinearBranch<B> for Scale {
    #[rustfmt::skip]
    fn forward(&self, site: &LinearSite<'_, B>, x: View<'_, B>, accumulate: bool, y: ViewMut<'_, B>,
        kept: &mut B::Buffer, scratch: &mut BranchScratch<B>,
    ) {
        self.keep_again(site, x, kept, scratch);
        let scale = View::<B>::at(site.parameters, self.at, 1, self.len);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.backend.scale_columns(1.0, View::<B>::new(kept, x.rows, self.len), scale, beta, y);
    }
    #[rustfmt::skip]
    fn keep_again(&self, site: &LinearSite<'_, B>, x: View<'_, B>, kept: &mut B::Buffer, _: &mut BranchScratch<B>) {
        let mut z = ViewMut::<B>::new(kept, x.rows, self.len);
        site.multiply(x, 0.0, z.reborrow());
        site.add_bias(z);
    }
    #[rustfmt::skip]
    fn backward(&self, site: &LinearSite<'_, B>, x: View<'_, B>, kept: &B::Buffer, dy: View<'_, B>, accumulate: bool,
        dx: Option<ViewMut<'_, B>>, gradient: &mut B::Buffer, scratch: &mut BranchScratch<B>,
    ) {
        let z = View::<B>::new(kept, x.rows, self.len);
        site.backend.column_dot(dy, z, ViewMut::<B>::at(gradient, self.at, 1, self.len));
        if let Some(dx) = dx {
            self.input_gradient(site, dy, accumulate, dx, scratch);
        }
    }
    #[rustfmt::skip]
    fn input_gradient(&self, site: &LinearSite<'_, B>, dy: View<'_, B>, accumulate: bool, dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        let scale = View::<B>::at(site.parameters, self.at, 1, self.len);
        let dz = ViewMut::<B>::new(&mut *scratch.output, dy.rows, self.len);
        site.backend.scale_columns(1.0, dy, scale, 0.0, dz);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.multiply_backward(View::<B>::new(&scratch.output, dy.rows, self.len), beta, dx);
    }
}
