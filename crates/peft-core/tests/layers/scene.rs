//! What the layer tests share: seeds, poisoned memory, the oracle's tensors.

use std::time::SystemTime;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use shanty_peft_core::{
    backend::{
        Backend, BatchRoom, View, ViewMut,
        cpu::{Cpu, CpuBatch},
    },
    batch::{PackedBatch, Row, Segment},
};

use crate::memory::Random;

/// Numbers that no earlier run has seen. The seed is printed with a failing test.
#[allow(clippy::print_stdout, reason = "shown where the test fails")]
pub fn fresh() -> Random {
    let seed = std::env::var("SHANTY_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = seed.unwrap_or_else(clock);
    println!("run again with SHANTY_TEST_SEED={seed}");
    Random::new(seed)
}

/// Two threads: work is split, and a mistake in the split shows.
pub fn cpu() -> Cpu {
    Cpu::new(2).unwrap()
}

/// A matrix in the middle of memory that nobody else may write.
pub struct Field {
    data: Vec<f32>,
    offset: usize,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Field {
    /// NaN everywhere.
    pub fn poisoned(rows: usize, columns: usize) -> Self {
        let (offset, stride) = (5, columns + 3);
        Self { data: vec![f32::NAN; offset + rows * stride + 7], offset, rows, columns, stride }
    }

    /// `numbers` inside, NaN around.
    pub fn holding(numbers: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(numbers.len(), rows * columns);
        let mut field = Self::poisoned(rows, columns);
        for (row, numbers) in numbers.chunks_exact(columns).enumerate() {
            let start = field.offset + row * field.stride;
            field.data[start..start + columns].copy_from_slice(numbers);
        }
        field
    }

    pub fn view(&self) -> View<'_, Cpu> {
        View {
            data: &self.data,
            offset: self.offset,
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
        }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, Cpu> {
        ViewMut {
            data: &mut self.data,
            offset: self.offset,
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
        }
    }

    /// What is inside, after a look that nothing was written around it.
    pub fn numbers(&self) -> Vec<f32> {
        let inside = |at: usize| {
            at.checked_sub(self.offset)
                .is_some_and(|at| at / self.stride < self.rows && at % self.stride < self.columns)
        };
        for (at, number) in self.data.iter().enumerate() {
            assert!(inside(at) || number.is_nan(), "number {at}, outside of the target, was overwritten");
        }
        (0..self.data.len()).filter(|&at| inside(at)).map(|at| self.data[at]).collect()
    }

    /// What was added to `before`.
    pub fn added_to(&self, before: &[f32]) -> Vec<f32> {
        self.numbers().iter().zip(before).map(|(after, before)| after - before).collect()
    }
}

/// One packed row a list of segment lengths; every token trained that can be.
pub fn rows(random: &mut Random, lengths: &[&[u32]], vocabulary: u32) -> Vec<Row> {
    let row = |(id, lengths): (usize, &&[u32])| {
        let mut start = 0;
        let mut trained = Vec::new();
        for &length in lengths.iter() {
            if length > 1 {
                trained.push(start + 1..start + length);
            }
            start += length;
        }
        Row {
            id: id as u64,
            token_ids: (0..start).map(|_| random.below(vocabulary)).collect(),
            segments: lengths.iter().map(|&length| Segment { sample_id: random.next(), length }).collect(),
            trained,
        }
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Rows of unequal length, packed and not, laid end to end, and where the backend can read them.
pub fn batch(cpu: &Cpu, rows: &[Row]) -> (PackedBatch, CpuBatch) {
    let mut packed = PackedBatch::default();
    packed.fill(rows).unwrap();
    let batch = loaded(cpu, &packed);
    (packed, batch)
}

/// A batch where the backend can read it.
pub fn loaded(cpu: &Cpu, packed: &PackedBatch) -> CpuBatch {
    let longest_span = packed.spans.iter().map(|span| span.keys).max().unwrap_or(0);
    let mut batch = cpu
        .allocate_batch(BatchRoom { tokens: packed.tokens(), longest_span, widest: 512, heads: 16 })
        .unwrap();
    cpu.load_batch(packed, &mut batch);
    batch
}

/// The same numbers in f64.
pub fn constant(numbers: &[f32], rows: usize, columns: usize) -> Tensor {
    let numbers: Vec<f64> = numbers.iter().map(|&number| f64::from(number)).collect();
    Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
}

/// The same numbers in f64, to be differentiated by.
pub fn variable(numbers: &[f32], rows: usize, columns: usize) -> Var {
    Var::from_tensor(&constant(numbers, rows, columns)).unwrap()
}

/// Gradients of everything behind `out`, where that of `out` is `dout`.
pub fn backward(out: &Tensor, dout: &[f32]) -> GradStore {
    let (rows, columns) = out.dims2().unwrap();
    (out * constant(dout, rows, columns)).unwrap().sum_all().unwrap().backward().unwrap()
}

/// The gradient of a variable; the oracle must have reached it.
pub fn gradient(gradients: &GradStore, variable: &Var) -> Tensor {
    gradients.get(variable).expect("the oracle reaches every variable").clone()
}

/// Fails where `max|got - wanted| > tolerance * max|wanted|`, where a number is not finite, and where all wanted are 0.
pub fn assert_near(what: &str, got: &[f32], wanted: &Tensor, tolerance: f64) {
    let wanted: Vec<f64> = wanted.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got.len(), wanted.len(), "{what}: lengths differ");
    let largest = wanted.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
    assert!(largest > 0.0, "{what}: an oracle of zeros proves nothing");
    for (index, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
        assert!(got.is_finite(), "{what}[{index}] is {got}");
        let relative = (f64::from(*got) - wanted).abs() / largest;
        assert!(
            relative <= tolerance,
            "{what}[{index}] is {got}, not {wanted}: {relative:.2e} of the largest, {tolerance:.0e} is allowed"
        );
    }
}
