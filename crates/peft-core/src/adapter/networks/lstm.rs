//! A bidirectional LSTM as torch computes it (Hochreiter and Schmidhuber, 1997; `torch.nn.LSTM`).
//!
//! `i, f, g, o = x W_ihᵀ + b_ih + h W_hhᵀ + b_hh` in four parts, `c = σ(f) c + σ(i) tanh(g)`, `h = σ(o) tanh(c)`. Both
//! directions run over the virtual tokens; a layer's output is `[forward h | backward h]`. Between layers, not behind the last,
//! numbers are dropped while training.

use candle_core::{Device, Result, Tensor};

use super::ops::{linear, sigmoid};
use crate::{
    adapter::PassDropout,
    random::{DropoutKey, dropout_scales},
};

/// What the names of the two directions' tensors end in.
pub(super) const DIRECTIONS: [&str; 2] = ["", "_reverse"];
/// Module numbers of the masks, beyond those of all linear layers of a base.
const MASKS: u32 = 1 << 31;

/// x `[T, in]` to `[T, 2 * hidden]`; `tensors` are four a direction and two directions a layer.
pub(super) fn forward(
    x: &Tensor,
    tensors: &[Tensor],
    hidden: usize,
    dropout: Option<PassDropout>,
) -> Result<Tensor> {
    let mut x = x.clone();
    for (layer, tensors) in tensors.chunks_exact(8).enumerate() {
        if let Some(pass) = dropout.filter(|_| layer > 0) {
            let (count, features) = x.dims2()?;
            x = (x * mask(pass, layer, count, features)?)?;
        }
        let forward = direction(&x, &tensors[..4], hidden, false)?;
        let backward = direction(&x, &tensors[4..], hidden, true)?;
        x = Tensor::cat(&[forward, backward], 1)?;
    }
    Ok(x)
}

/// What each number between two layers is multiplied by: a function of seed, step, layer and place alone.
fn mask(pass: PassDropout, layer: usize, count: usize, features: usize) -> Result<Tensor> {
    let key = DropoutKey { seed: pass.seed, step: pass.step, module: MASKS + layer as u32 };
    let mut scales = vec![0.0; count * features];
    for (token, scales) in scales.chunks_exact_mut(features).enumerate() {
        dropout_scales(key, 0, token as u32, pass.p, scales);
    }
    Tensor::from_vec(scales, (count, features), &Device::Cpu)
}

/// One direction of a layer, `[T, hidden]`.
fn direction(x: &Tensor, tensors: &[Tensor], hidden: usize, reverse: bool) -> Result<Tensor> {
    let [weight_ih, weight_hh, bias_ih, bias_hh] = tensors else {
        candle_core::bail!("a direction of an LSTM has {} tensors", tensors.len())
    };
    let inputs = linear(x, weight_ih, bias_ih)?;
    let count = x.dim(0)?;
    let mut h = Tensor::zeros((1, hidden), x.dtype(), x.device())?;
    let mut c = h.clone();
    let mut outputs = Vec::with_capacity(count);
    for step in 0..count {
        let token = if reverse { count - 1 - step } else { step };
        let gates = (inputs.narrow(0, token, 1)? + linear(&h, weight_hh, bias_hh)?)?;
        let gate = |index: usize| gates.narrow(1, index * hidden, hidden)?.contiguous();
        let kept = (sigmoid(&gate(1)?)? * &c)?;
        c = (kept + (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?)?;
        h = (sigmoid(&gate(3)?)? * c.tanh()?)?;
        outputs.push(h.clone());
    }
    if reverse {
        outputs.reverse();
    }
    Tensor::cat(&outputs, 0)
}
