//! The end of a decoder: last norm, output head and cross-entropy, in chunks of rows, on labelled rows only.

use candle_core::{Device, Tensor};
use candle_nn::RmsNorm as Oracle;
use shanty_peft_core::{
    adapter::BranchScratch,
    backend::{Backend, View, cpu::Cpu},
    batch::{PackedBatch, Row},
    loss::head::{Head, HeadGradient, TrainedHead},
    model::EmbeddingView,
    nn::rms_norm::RmsNorm,
    plan::{HeadMemory, HeadScratch},
};

use crate::{
    SUM,
    memory::Random,
    scene::{
        Field, assert_near, batch, constant, cpu, fresh, gradient, loaded, rows as random_rows, variable,
    },
};

const EPSILON: f32 = 1e-3;

/// Memory for chunks of `rows` rows, full of NaN.
struct Memory {
    shared: [Vec<f32>; 4],
    own: HeadMemory<Cpu>,
}

impl Memory {
    fn new(rows: usize, features: usize, vocabulary: usize, block_rows: usize) -> Self {
        let poisoned = |columns: usize| vec![f32::NAN; rows * columns];
        let own = HeadMemory {
            dx: poisoned(features),
            reciprocal: poisoned(1),
            losses: vec![f32::NAN; 1000],
            read_losses: Vec::new(),
            block: vec![f32::NAN; block_rows * features],
            kept: Vec::new(),
            few: Vec::new(),
            rows,
            block_rows,
        };
        Self { shared: [features, features, features, vocabulary].map(poisoned), own }
    }

    fn scratch(&mut self) -> HeadScratch<'_, Cpu> {
        let [x, normed, dnormed, logits] = &mut self.shared;
        HeadScratch { x, normed, dnormed, logits, own: &mut self.own }
    }
}

/// The scratch of a head without a branch.
fn no_branch() -> BranchScratch<Cpu> {
    let (wide, narrow, output) = (Vec::new(), Vec::new(), Vec::new());
    BranchScratch { wide, narrow, output, fixed: std::array::from_fn(|_| Vec::new()) }
}

/// `chunk` rows of logits at a time, `block_rows` rows of the table.
fn check(random: &mut Random, rows: &[Row], chunk: usize, vocabulary: usize, short: Option<usize>) {
    check_bounded(random, rows, chunk, vocabulary, short, None);
}

fn check_bounded(
    random: &mut Random,
    rows: &[Row],
    chunk: usize,
    vocabulary: usize,
    short: Option<usize>,
    soft_cap: Option<f32>,
) {
    let cpu = cpu();
    let features = 37;
    let (packed, batch) = batch(&cpu, rows);
    let (tokens, count) = (packed.tokens(), packed.predicting.len());
    let (hidden, weight) = (random.numbers(tokens * features, 2.0), random.around_one(features));
    let bf16: Vec<half::bf16> =
        random.numbers(vocabulary * features, 0.5).into_iter().map(half::bf16::from_f32).collect();
    let table: Vec<f32> = bf16.iter().map(|number| number.to_f32()).collect();

    let input = variable(&hidden, tokens, features);
    let index = Tensor::from_slice(&packed.predicting, count, &Device::Cpu).unwrap();
    let targets = Tensor::from_slice(&packed.targets, count, &Device::Cpu).unwrap();
    let norm = Oracle::new(constant(&weight, 1, features).squeeze(0).unwrap(), f64::from(EPSILON));
    let normed = norm.forward_diff(&input.index_select(&index, 0).unwrap()).unwrap();
    let logits = normed.matmul(&constant(&table, vocabulary, features).t().unwrap()).unwrap();
    let logits = match soft_cap.map(f64::from) {
        Some(cap) => ((logits / cap).unwrap().tanh().unwrap() * cap).unwrap(),
        None => logits,
    };
    let mean = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
    let sum = (mean * count as f64).unwrap();
    let wanted = gradient(&sum.backward().unwrap(), &input);

    let view = match short {
        Some(_) => EmbeddingView::from_bf16(&bf16, features),
        None => EmbeddingView::from_f32(&table, features),
    };
    let norm = RmsNorm { weight: View::<Cpu>::new(&weight, 1, features), epsilon: EPSILON, trained: None };
    let head = Head { norm, table: view, soft_cap, trained: TrainedHead::default() };
    let hidden = Field::holding(&hidden, tokens, features);
    let block_rows = short.unwrap_or(vocabulary);
    let mut memory = Memory::new(chunk, features, vocabulary, block_rows);
    let mut dx = Field::poisoned(tokens, features);
    let mut branch = no_branch();
    let gradient = HeadGradient::<Cpu> { hidden: dx.view_mut(), flat: &mut [] };
    head.loss(&cpu, &batch, count, hidden.view(), &mut memory.scratch(), &mut branch, Some(gradient));
    let loss = Head::<Cpu>::sum(&cpu, count, &mut memory.own);
    assert_near("loss", &[loss as f32], &sum, SUM);
    let dx = dx.numbers();
    assert_near("dx", &dx, &wanted, SUM);
    for row in (0..tokens).filter(|row| !packed.predicting.contains(&(*row as u32))) {
        let dx = &dx[row * features..(row + 1) * features];
        assert!(dx.iter().all(|number| *number == 0.0), "row {row} predicts nothing and got a gradient");
    }

    let mut memory = Memory::new(chunk, features, vocabulary, block_rows);
    head.loss(&cpu, &batch, count, hidden.view(), &mut memory.scratch(), &mut branch, None);
    let alone = Head::<Cpu>::sum(&cpu, count, &mut memory.own);
    assert_near("loss without gradient", &[alone as f32], &sum, SUM);
}

#[test]
fn chunks_of_any_size_and_a_last_one_that_is_not_full() {
    let mut random = fresh();
    let rows = random_rows(&mut random, &[&[61], &[1, 2, 33], &[7]], 97);
    let labelled = 60 + 1 + 32 + 6;
    for chunk in [1, 16, labelled, 512] {
        check(&mut random, &rows, chunk, 97, None);
    }
}

#[test]
fn a_table_of_16_bits_in_blocks() {
    let mut random = fresh();
    let rows = random_rows(&mut random, &[&[61], &[7]], 97);
    for block_rows in [13, 96, 97] {
        check(&mut random, &rows, 16, 97, Some(block_rows));
    }
}

/// Logits reach some ten units: caps below and above that.
#[test]
fn bounded_logits_with_their_slope() {
    let mut random = fresh();
    let rows = random_rows(&mut random, &[&[61], &[1, 2, 33]], 97);
    for soft_cap in [2.0, 30.0] {
        check_bounded(&mut random, &rows, 16, 97, None, Some(soft_cap));
        check_bounded(&mut random, &rows, 16, 97, Some(13), Some(soft_cap));
    }
}

#[test]
fn few_labelled_rows_of_many() {
    let mut random = fresh();
    let mut rows = random_rows(&mut random, &[&[200], &[3, 90], &[40]], 97);
    rows[0].trained = vec![5..6, 199..200];
    rows[1].trained = std::iter::once(4..5).collect();
    rows[2].trained.clear();
    check(&mut random, &rows, 2, 97, None);
    check(&mut random, &rows, 16, 97, None);
}

/// Logits far apart: the softmax of most classes is 0 in f32, the loss of a wrong one is large, nothing overflows.
#[test]
fn a_softmax_that_is_almost_certain() {
    let (cpu, mut random) = (cpu(), fresh());
    let logits: Vec<f32> = random.numbers(8 * 30, 300.0);
    let targets: Vec<u32> = (0..8).map(|_| random.below(30)).collect();
    let packed = PackedBatch { targets: targets.clone(), ..PackedBatch::default() };
    let batch = loaded(&cpu, &packed);
    let input = variable(&logits, 8, 30);
    let oracle = Tensor::from_slice(&targets, 8, &Device::Cpu).unwrap();
    let sum = (candle_nn::loss::cross_entropy(input.as_tensor(), &oracle).unwrap() * 8.0).unwrap();
    let wanted = gradient(&sum.backward().unwrap(), &input);
    let (mut logits, mut losses) = (Field::holding(&logits, 8, 30), Field::poisoned(8, 1));
    cpu.cross_entropy(&batch, 0, true, None, logits.view_mut(), losses.view_mut());
    assert_near("losses", &[losses.numbers().iter().sum()], &sum, SUM);
    assert_near("dlogits", &logits.numbers(), &wanted, SUM);
}
