//! The linear layer: weight, bias, and the LoRA branch with dropout.

use candle_core::{Tensor, Var};
use shanty_peft_core::{
    adapter::{BranchScratch, PassDropout, lora::Lora},
    backend::{View, cpu::Cpu},
    batch::PackedBatch,
    nn::linear::{Branch, Linear, TrainedParts},
    random::{DropoutKey, dropout_scales},
};

use crate::{
    SUM,
    memory::Random,
    scene::{
        Field, assert_near, backward, batch, constant, cpu, fresh, gradient, rows as random_rows, variable,
    },
};

/// Shape of a layer: features in and out, rank (0: no branch), dropout.
#[derive(Clone, Copy)]
struct Case {
    input: usize,
    output: usize,
    rank: usize,
    p: f32,
    bias: bool,
}

/// Everything random that a case needs.
struct Scene {
    case: Case,
    packed: PackedBatch,
    batch: shanty_peft_core::backend::cpu::CpuBatch,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    /// Something else, A, something else, B: a flat vector of parameters.
    parameters: Vec<f32>,
    dy: Vec<f32>,
    scale: f32,
    key: DropoutKey,
}

const BEFORE_A: usize = 3;
const BETWEEN: usize = 2;

impl Scene {
    fn new(cpu: &Cpu, random: &mut Random, case: Case) -> Self {
        let Case { input, output, rank, .. } = case;
        let (packed, batch) = batch(cpu, &random_rows(random, &[&[61], &[1, 2, 33], &[7]], 9));
        let tokens = packed.tokens();
        Self {
            case,
            batch,
            x: random.numbers(tokens * input, 1.0),
            weight: random.numbers(output * input, 0.1),
            bias: random.numbers(output, 0.5),
            parameters: random.numbers(BEFORE_A + BETWEEN + rank * (input + output), 0.5),
            dy: random.numbers(tokens * output, 1.0),
            scale: 0.7,
            key: DropoutKey { seed: random.next(), step: random.next(), module: random.below(99) },
            packed,
        }
    }

    fn tokens(&self) -> usize {
        self.packed.tokens()
    }

    fn b_start(&self) -> usize {
        BEFORE_A + self.case.rank * self.case.input + BETWEEN
    }

    fn a(&self) -> &[f32] {
        &self.parameters[BEFORE_A..BEFORE_A + self.case.rank * self.case.input]
    }

    fn b(&self) -> &[f32] {
        &self.parameters[self.b_start()..]
    }

    fn lora(&self) -> Lora {
        let Case { input, output, rank, .. } = self.case;
        let (a, b, module) = (BEFORE_A, self.b_start(), self.key.module);
        Lora { a, b, rank, input, output, scale: self.scale, bias: None, module }
    }

    fn layer<'a>(&'a self, lora: &'a Lora) -> Linear<'a, Cpu> {
        let Case { input, output, rank, p, bias } = self.case;
        let DropoutKey { seed, step, .. } = self.key;
        let branch = (rank > 0).then(|| Branch {
            branch: lora as _,
            parameters: &self.parameters[..],
            dropout: (p > 0.0).then_some(PassDropout { p, seed, step }),
        });
        Linear {
            weight: View::<Cpu>::new(&self.weight, output, input),
            bias: bias.then(|| View::<Cpu>::new(&self.bias, 1, output)),
            branch,
            trained: TrainedParts::default(),
            merged: false,
        }
    }

    /// y and the variables x, A, B, in candle.
    fn oracle(&self) -> (Tensor, Var, Option<(Var, Var)>) {
        let Case { input, output, rank, p, bias } = self.case;
        let tokens = self.tokens();
        let x = variable(&self.x, tokens, input);
        let weight = constant(&self.weight, output, input);
        let mut y = x.matmul(&weight.t().unwrap()).unwrap();
        if bias {
            y = y.broadcast_add(&constant(&self.bias, 1, output)).unwrap();
        }
        if rank == 0 {
            return (y, x, None);
        }
        let (a, b) = (variable(self.a(), rank, input), variable(self.b(), output, rank));
        let mut mask = vec![1.0; tokens * input];
        for (token, mask) in mask.chunks_exact_mut(input).enumerate() {
            dropout_scales(self.key, self.packed.sample_ids[token], self.packed.positions[token], p, mask);
        }
        let dropped = (x.as_tensor() * constant(&mask, tokens, input)).unwrap();
        let branch = dropped.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        let y = (y + (branch * f64::from(self.scale)).unwrap()).unwrap();
        (y, x, Some((a, b)))
    }

    fn check(&self, cpu: &Cpu, random: &mut Random, accumulate: bool) {
        let Case { input, output, rank, .. } = self.case;
        let tokens = self.tokens();
        let (wanted, x_in, branch) = self.oracle();
        let gradients = backward(&wanted, &self.dy);
        let lora = self.lora();
        let (layer, x) = (self.layer(&lora), Field::holding(&self.x, tokens, input));
        let mut start = |columns: usize| {
            if accumulate { random.numbers(tokens * columns, 1.0) } else { vec![0.0; tokens * columns] }
        };
        let (y_before, dx_before) = (start(output), start(input));
        let target = |before: &[f32], columns: usize| {
            if accumulate {
                Field::holding(before, tokens, columns)
            } else {
                Field::poisoned(tokens, columns)
            }
        };

        let mut y = target(&y_before, output);
        let mut projected = vec![f32::NAN; tokens * rank];
        let mut scratch = BranchScratch::<Cpu> {
            wide: vec![f32::NAN; tokens * input],
            narrow: vec![f32::NAN; tokens * rank],
            output: Vec::new(),
            fixed: std::array::from_fn(|_| Vec::new()),
        };
        layer.forward(cpu, &self.batch, x.view(), accumulate, y.view_mut(), &mut projected, &mut scratch);
        assert_near("y", &y.added_to(&y_before), &wanted, SUM);

        // The flat gradient is added to: A's and B's places hold something, their neighbours are nobody's business.
        let flat_before = random.numbers(self.parameters.len(), 1.0);
        let (dy, mut dx) = (Field::holding(&self.dy, tokens, output), target(&dx_before, input));
        for input_gradient in [true, false] {
            let mut flat = flat_before.clone();
            scratch.wide.fill(f32::NAN);
            scratch.narrow.fill(f32::NAN);
            let into = input_gradient.then(|| dx.view_mut());
            layer.backward(
                cpu,
                &self.batch,
                x.view(),
                &projected,
                dy.view(),
                accumulate,
                into,
                &mut flat,
                &mut scratch,
            );
            let added: Vec<f32> =
                flat.iter().zip(&flat_before).map(|(after, before)| after - before).collect();
            let (da, db) = (BEFORE_A..BEFORE_A + rank * input, self.b_start()..self.parameters.len());
            if let Some((a_in, b_in)) = &branch {
                assert_near("dA", &added[da.clone()], &gradient(&gradients, a_in), SUM);
                assert_near("dB", &added[db.clone()], &gradient(&gradients, b_in), SUM);
            }
            let outside = (0..flat.len()).filter(|at| !da.contains(at) && !db.contains(at));
            assert!(outside.into_iter().all(|at| added[at] == 0.0), "a neighbour's gradient was touched");
        }
        assert_near("dx", &dx.added_to(&dx_before), &gradient(&gradients, &x_in), SUM);
    }
}

#[test]
fn a_frozen_layer_with_and_without_bias() {
    let (cpu, mut random) = (cpu(), fresh());
    for bias in [false, true] {
        // Not (1, 1): one weight that happens to be near 0 makes a result that is all rounding of what it is added to.
        for (input, output) in [(1, 9), (9, 1), (48, 33), (130, 200)] {
            let case = Case { input, output, rank: 0, p: 0.0, bias };
            for accumulate in [false, true] {
                Scene::new(&cpu, &mut random, case).check(&cpu, &mut random, accumulate);
            }
        }
    }
}

/// Ranks below, at and above a vector register and the shortest side that counts as narrow.
#[test]
fn a_branch_of_any_rank() {
    let (cpu, mut random) = (cpu(), fresh());
    for rank in [1, 5, 8, 16, 17, 32, 70] {
        for (input, output) in [(48, 33), (33, 130), (384, 128)] {
            let case = Case { input, output, rank, p: 0.0, bias: false };
            for accumulate in [false, true] {
                Scene::new(&cpu, &mut random, case).check(&cpu, &mut random, accumulate);
            }
        }
    }
}

#[test]
fn a_branch_with_dropout_and_bias() {
    let (cpu, mut random) = (cpu(), fresh());
    for rank in [1, 5, 16] {
        for p in [0.1, 0.5] {
            let case = Case { input: 70, output: 45, rank, p, bias: true };
            for accumulate in [false, true] {
                Scene::new(&cpu, &mut random, case).check(&cpu, &mut random, accumulate);
            }
        }
    }
}
