//! Small networks that prefixes and prompts are trained through.
//!
//! What the base sees is a matrix `[virtual tokens, features]`. Trained directly, each of its rows moves alone; trained as the
//! output of a network of an embedding of each virtual token, they move together (Li and Liang, arXiv 2101.00190; Liu et
//! al., arXiv 2103.10385). The networks and the names of their tensors are those of Hugging Face PEFT 0.21.
//!
//! They are tiny beside the base, so candle runs them and differentiates them. That allocates: some tensors of
//! `[virtual tokens, hidden]` and a copy of the weights for each micro-batch, none of the size of an activation.

mod lstm;
mod ops;
mod solve;

use std::ops::Range;

use candle_core::{Device, Tensor as Candle, Var};

use super::{
    branch::PassDropout,
    layout::ParameterLayout,
    method::{Reparameterisation, Start, Tensor},
};
use crate::{
    engine::StepKey,
    error::{Error, Result},
};

/// The form of a network.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    /// Linear, tanh, linear: prefix tuning's projection.
    Projection,
    /// Linear, ReLU, linear, ReLU, linear: p-tuning's MLP.
    Mlp,
    /// A bidirectional LSTM, then linear, ReLU, linear: p-tuning's other encoder.
    Lstm { hidden: usize, layers: usize, dropout: f32 },
}

/// A network from an embedding of each virtual token to what the base sees of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptNetwork {
    form: Form,
    tensors: Vec<Tensor>,
    /// Where each tensor lies in the flat buffer that is trained.
    places: Vec<Range<usize>>,
    /// Virtual tokens and features of what it makes.
    output: [usize; 2],
}

impl PromptNetwork {
    /// Prefix tuning's projection: embedding `[count, inputs]`, linear to `hidden`, tanh, linear to `outputs`. With `zero`
    /// the last layer begins at 0.
    pub fn projection(count: usize, inputs: usize, hidden: usize, outputs: usize, zero: bool) -> Self {
        let mut tensors = vec![embedding(count, inputs)];
        linear(&mut tensors, "transform.0", inputs, hidden);
        linear(&mut tensors, "transform.2", hidden, outputs);
        if zero {
            tensors[3..].iter_mut().for_each(|tensor| tensor.start = Start::Constant(0.0));
        }
        Self::new(Form::Projection, tensors, [count, outputs])
    }

    /// P-tuning's MLP: embedding `[count, features]`, linear, ReLU, linear, ReLU, linear, `hidden` wide in between.
    pub fn mlp(count: usize, features: usize, hidden: usize) -> Self {
        let mut tensors = vec![embedding(count, features)];
        linear(&mut tensors, "mlp_head.0", features, hidden);
        linear(&mut tensors, "mlp_head.2", hidden, hidden);
        linear(&mut tensors, "mlp_head.4", hidden, features);
        Self::new(Form::Mlp, tensors, [count, features])
    }

    /// P-tuning's LSTM: embedding `[count, features]`, `layers` bidirectional layers of `hidden` units a direction with
    /// `dropout` between them, then linear, ReLU, linear.
    pub fn lstm(count: usize, features: usize, hidden: usize, layers: usize, dropout: f32) -> Self {
        let mut tensors = vec![embedding(count, features)];
        let start = Start::Uniform { bound: 1.0 / (hidden as f32).sqrt() };
        for layer in 0..layers {
            let inputs = if layer == 0 { features } else { 2 * hidden };
            for direction in lstm::DIRECTIONS {
                for (name, shape) in [
                    ("weight_ih", vec![4 * hidden, inputs]),
                    ("weight_hh", vec![4 * hidden, hidden]),
                    ("bias_ih", vec![4 * hidden]),
                    ("bias_hh", vec![4 * hidden]),
                ] {
                    let name = format!("lstm_head.{name}_l{layer}{direction}");
                    tensors.push(Tensor::new(name, shape).start(start));
                }
            }
        }
        linear(&mut tensors, "mlp_head.0", 2 * hidden, 2 * hidden);
        linear(&mut tensors, "mlp_head.2", 2 * hidden, features);
        Self::new(Form::Lstm { hidden, layers, dropout }, tensors, [count, features])
    }

    fn new(form: Form, tensors: Vec<Tensor>, output: [usize; 2]) -> Self {
        let layout = ParameterLayout::new(Vec::new(), tensors.clone());
        let places = layout.entries().iter().map(|entry| entry.range.clone()).collect();
        Self { form, tensors, places, output }
    }

    fn variables(&self, flat: &[f32]) -> candle_core::Result<Vec<Var>> {
        let variable = |(tensor, place): (&Tensor, &Range<usize>)| {
            let numbers = flat.get(place.clone()).ok_or_else(|| too_short(flat.len(), place.end))?;
            Var::from_slice(numbers, tensor.shape.as_slice(), &Device::Cpu)
        };
        self.tensors.iter().zip(&self.places).map(variable).collect()
    }

    fn output(&self, tensors: &[Candle], key: Option<StepKey>) -> candle_core::Result<Candle> {
        let (embedding, rest) = (&tensors[0], &tensors[1..]);
        let layer = |x: &Candle, weights: &[Candle]| ops::linear(x, &weights[0], &weights[1]);
        match self.form {
            Form::Projection => layer(&layer(embedding, rest)?.tanh()?, &rest[2..]),
            Form::Mlp => {
                let first = layer(embedding, rest)?.relu()?;
                layer(&layer(&first, &rest[2..])?.relu()?, &rest[4..])
            }
            Form::Lstm { hidden, layers, dropout: p } => {
                let (lstm, head) = rest.split_at(8 * layers);
                let dropout = key.filter(|_| p > 0.0);
                let dropout = dropout.map(|StepKey { seed, step }| PassDropout { p, seed, step });
                let x = lstm::forward(embedding, lstm, hidden, dropout)?;
                layer(&layer(&x, head)?.relu()?, &head[2..])
            }
        }
    }
}

impl Reparameterisation for PromptNetwork {
    fn tensors(&self) -> Vec<Tensor> {
        self.tensors.clone()
    }

    fn forward(&self, trained: &[f32], key: Option<StepKey>, effective: &mut [f32]) -> Result<()> {
        let run = || {
            let inputs: Vec<Candle> =
                self.variables(trained)?.iter().map(|variable| variable.as_tensor().detach()).collect();
            self.output(&inputs, key)?.flatten_all()?.to_vec1::<f32>()
        };
        let numbers = run().map_err(failed)?;
        effective[..numbers.len()].copy_from_slice(&numbers);
        Ok(())
    }

    fn backward(
        &self,
        trained: &[f32],
        key: Option<StepKey>,
        effective_gradient: &[f32],
        trained_gradient: &mut [f32],
    ) -> Result<()> {
        let mut run = || {
            let variables = self.variables(trained)?;
            let inputs: Vec<Candle> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
            let output = self.output(&inputs, key)?;
            let [rows, columns] = self.output;
            let weight =
                Candle::from_slice(&effective_gradient[..rows * columns], (rows, columns), &Device::Cpu)?;
            let gradients = (output * weight)?.sum_all()?.backward()?;
            for (variable, place) in variables.iter().zip(&self.places) {
                let Some(part) = gradients.get(variable) else { continue };
                let part = part.flatten_all()?.to_vec1::<f32>()?;
                for (sum, part) in trained_gradient[place.clone()].iter_mut().zip(part) {
                    *sum += part;
                }
            }
            Ok(())
        };
        run().map_err(failed)
    }

    fn reach(&self, effective: &[f32], trained: &mut [f32]) -> Result<bool> {
        if self.form != Form::Projection {
            return Ok(false);
        }
        let [count, outputs] = self.output;
        let inside = || {
            let tensors = self.variables(trained)?;
            let hidden = ops::linear(&tensors[0], &tensors[1], &tensors[2])?.tanh()?;
            Ok((hidden.dim(1)?, hidden.flatten_all()?.to_vec1::<f32>()?))
        };
        let (hidden, inside) = inside().map_err(failed)?;
        let [.., weight, bias] = self.places.as_slice() else { return Ok(false) };
        let (weight, bias) = (weight.clone(), bias.clone());
        trained[bias].fill(0.0);
        let target = &effective[..count * outputs];
        solve::last_layer(&inside, target, [count, hidden, outputs], &mut trained[weight]);
        Ok(true)
    }
}

fn embedding(count: usize, features: usize) -> Tensor {
    Tensor::new("embedding.weight", [count, features]).start(Start::Normal { deviation: 1.0 })
}

fn linear(tensors: &mut Vec<Tensor>, name: &str, inputs: usize, outputs: usize) {
    let start = Start::Uniform { bound: 1.0 / (inputs as f32).sqrt() };
    for (part, shape) in [("weight", vec![outputs, inputs]), ("bias", vec![outputs])] {
        tensors.push(Tensor::new(format!("{name}.{part}"), shape).start(start));
    }
}

fn failed(source: candle_core::Error) -> Error {
    Error::Network { reason: source.to_string() }
}

fn too_short(found: usize, wanted: usize) -> candle_core::Error {
    candle_core::Error::Msg(format!("a flat buffer of {found} numbers, {wanted} are needed"))
}
