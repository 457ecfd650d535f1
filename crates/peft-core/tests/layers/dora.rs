//! DoRA with dropout beside candle's autograd, with the length of a row held constant as PEFT holds it.

use candle_core::D;
use shanty_peft_core::{
    adapter::{
        BranchScratch, PassDropout,
        lora::{Lora, dora::Dora},
    },
    backend::{View, cpu::Cpu},
    nn::linear::{Branch, Linear, TrainedParts},
    random::dropout_scales,
};

use crate::{
    SUM,
    scene::{
        Field, assert_near, backward, batch, constant, cpu, fresh, gradient, rows as random_rows, variable,
    },
};

/// The masks' scales of 1 / (1 - p) and lengths of rows that nearly cancel make partial sums longer than the result.
const TOLERANCE: f64 = 3.0 * SUM;

fn check(input: usize, output: usize, rank: usize, p: f32, accumulate: bool) {
    let (cpu, mut random) = (cpu(), fresh());
    let (packed, batch) = batch(&cpu, &random_rows(&mut random, &[&[31], &[1, 2, 33], &[7]], 9));
    let tokens = packed.tokens();
    let (x, dy) = (random.numbers(tokens * input, 1.0), random.numbers(tokens * output, 1.0));
    let (weight, bias) = (random.numbers(output * input, 0.3), random.numbers(output, 0.5));
    // Something else, A, B, m, something else.
    let starts = [2, 2 + rank * input, 2 + rank * (input + output)];
    let length = starts[2] + output + 3;
    let mut parameters = random.numbers(length, 0.5);
    parameters[starts[2]..starts[2] + output].copy_from_slice(&random.around_one(output));
    let lora = Lora {
        a: starts[0],
        b: starts[1],
        rank,
        input,
        output,
        scale: 0.7,
        bias: None,
        module: random.below(99),
    };
    let dora = Dora { lora, magnitude: starts[2] };
    let dropout = (p > 0.0).then(|| PassDropout { p, seed: random.next(), step: random.next() });

    let x_in = variable(&x, tokens, input);
    let a_in = variable(&parameters[starts[0]..starts[1]], rank, input);
    let b_in = variable(&parameters[starts[1]..starts[2]], output, rank);
    let m_in = variable(&parameters[starts[2]..starts[2] + output], 1, output);
    let w = constant(&weight, output, input);
    let mut mask = vec![1.0; tokens * input];
    if let Some(dropout) = dropout {
        for (token, mask) in mask.chunks_exact_mut(input).enumerate() {
            let (sample, position) = (packed.sample_ids[token], packed.positions[token]);
            dropout_scales(dropout.key(lora.module), sample, position, p, mask);
        }
    }
    let dropped = (x_in.as_tensor() * constant(&mask, tokens, input)).unwrap();
    let whole = (&w + (b_in.matmul(&a_in).unwrap() * 0.7_f32 as f64).unwrap()).unwrap();
    let lengths = whole.sqr().unwrap().sum(D::Minus1).unwrap().sqrt().unwrap().detach();
    let gain = m_in.as_tensor().broadcast_div(&lengths.unsqueeze(0).unwrap()).unwrap();
    let product = |x: &candle_core::Tensor, w: &candle_core::Tensor| x.matmul(&w.t().unwrap()).unwrap();
    let branch = (product(&product(&dropped, &a_in), &b_in) * 0.7_f32 as f64).unwrap();
    let base = product(&dropped, &w);
    // PEFT: (gain - 1) base + gain branch, on top of the frozen layer.
    let extra = base.broadcast_mul(&(&gain - 1.0).unwrap()).unwrap();
    let extra = (extra + branch.broadcast_mul(&gain).unwrap()).unwrap();
    let y = (product(&x_in, &w) + extra).unwrap().broadcast_add(&constant(&bias, 1, output)).unwrap();
    let gradients = backward(&y, &dy);

    let layer = Linear::<Cpu> {
        weight: View::<Cpu>::new(&weight, output, input),
        bias: Some(View::<Cpu>::new(&bias, 1, output)),
        branch: Some(Branch { branch: &dora, parameters: &parameters[..], dropout }),
        merged: false,
        trained: TrainedParts::default(),
    };
    let mut start = |columns: usize| match accumulate {
        true => random.numbers(tokens * columns, 1.0),
        false => vec![0.0; tokens * columns],
    };
    let (y_before, dx_before) = (start(output), start(input));
    let target = |before: &[f32], columns: usize| match accumulate {
        true => Field::holding(before, tokens, columns),
        false => Field::poisoned(tokens, columns),
    };
    let poison = |count: usize| vec![f32::NAN; count];
    let mut scratch = BranchScratch::<Cpu> {
        wide: poison(tokens * input),
        narrow: poison(tokens * rank),
        output: poison(tokens * output),
        fixed: [output * rank, (rank * rank).max(output), output, output].map(poison),
    };
    let (mut got, mut kept) = (target(&y_before, output), poison(tokens * output));
    let x = Field::holding(&x, tokens, input);
    layer.forward(&cpu, &batch, x.view(), accumulate, got.view_mut(), &mut kept, &mut scratch);
    assert_near("y", &got.added_to(&y_before), &y, TOLERANCE);
    let mut again = poison(tokens * output);
    layer.keep_again(&cpu, &batch, x.view(), &mut again, &mut scratch);
    assert_eq!(kept, again);

    let before = random.numbers(length, 1.0);
    let (mut flat, mut dx) = (before.clone(), target(&dx_before, input));
    scratch.wide.fill(f32::NAN);
    scratch.narrow.fill(f32::NAN);
    let dy = Field::holding(&dy, tokens, output);
    let into = Some(dx.view_mut());
    layer.backward(&cpu, &batch, x.view(), &kept, dy.view(), accumulate, into, &mut flat, &mut scratch);
    let added: Vec<f32> = flat.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_near("dA", &added[starts[0]..starts[1]], &gradient(&gradients, &a_in), TOLERANCE);
    assert_near("dB", &added[starts[1]..starts[2]], &gradient(&gradients, &b_in), TOLERANCE);
    assert_near("dm", &added[starts[2]..starts[2] + output], &gradient(&gradients, &m_in), TOLERANCE);
    assert_near("dx", &dx.added_to(&dx_before), &gradient(&gradients, &x_in), TOLERANCE);
    let outside = added[..2].iter().chain(&added[length - 3..]);
    assert!(outside.into_iter().all(|difference| *difference == 0.0), "a neighbour's gradient was touched");
}

#[test]
fn without_dropout() {
    for (input, output, rank) in [(33, 48, 4), (48, 20, 1), (130, 70, 17)] {
        for accumulate in [false, true] {
            check(input, output, rank, 0.0, accumulate);
        }
    }
}

#[test]
fn with_dropout() {
    for (input, output, rank) in [(33, 48, 4), (48, 20, 1)] {
        for accumulate in [false, true] {
            check(input, output, rank, 0.3, accumulate);
        }
    }
}
