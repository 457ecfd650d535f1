//! The base on the card: dequantised matrices, with and without a branch added, embedding and head.

use shanty_peft_core::{
    backend::{
        Backend, LowRank, View, ViewMut,
        cpu::Cpu,
        cuda::{Cuda, Precision},
    },
    bench::{RandomBase, Shape},
    model::{BaseSource, Matrix, Projection},
};

use crate::{
    Report,
    operations::{get, load, numbers, packed, poisoned},
};

/// `W + s B A`, where the card adds it while it dequantises; every number to the rounding of bf16.
fn merged(report: &mut Report, cuda: &Cuda, matrix: Matrix<'_>, rank: usize, block_size: usize) {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    let mut expected = vec![0.0; rows * columns];
    matrix.write_f32(&mut expected);
    let narrow = |x: &f32| half::bf16::from_f32(*x).to_f32();
    let noise = numbers("branch", rank * (rows + columns));
    let (a, b) = noise.split_at(rank * columns);
    for (at, expected) in expected.iter_mut().enumerate() {
        let (row, column) = (at / columns, at % columns);
        let product = (0..rank).map(|r| narrow(&b[row * rank + r]) * narrow(&a[r * columns + column]));
        *expected += 0.125 * product.sum::<f32>();
    }
    let mut place = None;
    let parameters = cuda.lend(&noise, &mut place).unwrap();
    let a = View::<Cuda>::at(parameters, 0, rank, columns);
    let b = View::<Cuda>::at(parameters, rank * columns, rows, rank);
    let mut scratch = poisoned(cuda, rows * columns);
    let (view, merged) = cuda.frozen_updated(&matrix, &LowRank { scale: 0.125, a, b }, &mut scratch);
    if merged {
        let got = cuda.read(view).unwrap();
        let name = format!("nf4 {rows} x {columns} blocks of {block_size} and rank {rank}");
        report.compare(name, &got, &expected, 3e-3);
    }
    let wanted = cuda.precision() == Precision::Bf16 && columns.is_multiple_of(64);
    report.note("merged where it should be", f64::from(u8::from(merged != wanted)), 0.0);
}

/// The base's matrices: dequantised bit for bit, embedding and head.
pub(crate) fn frozen(report: &mut Report, cpu: &Cpu) {
    for shape in [[512, 1024, 1536], [72, 40, 100]] {
        for block_size in [64, 4096] {
            let [hidden, intermediate, vocabulary] = shape;
            let shape = Shape { hidden, intermediate, layers: 1, vocabulary, heads: 4 };
            let mut base = RandomBase::new(shape, block_size).unwrap();
            for precision in [Precision::F32, Precision::Bf16] {
                let mut cuda = Cuda::new(0, precision).unwrap();
                cuda.hold(&mut base, block_size > 64).unwrap();
                let weights = base.layer(0).unwrap();
                for projection in [Projection::Q, Projection::Gate, Projection::Down] {
                    let linear = weights.linear(projection);
                    let (rows, columns) = (linear.weight.rows(), linear.weight.columns());
                    let mut expected = vec![0.0; rows * columns];
                    linear.weight.write_f32(&mut expected);
                    let mut scratch = poisoned(&cuda, rows * columns);
                    let view = cuda.frozen(&linear.weight, &mut scratch);
                    let got = cuda.read(view).unwrap();
                    if precision == Precision::Bf16 {
                        expected.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
                    }
                    let same = got.iter().zip(&expected).filter(|(a, b)| a.to_bits() == b.to_bits()).count();
                    let name = format!("nf4 {rows} x {columns} blocks of {block_size}, bits, {precision:?}");
                    report.note(name, (expected.len() - same) as f64, 0.0);
                }
                for (projection, rank) in [(Projection::Q, 16), (Projection::Down, 8), (Projection::Gate, 40)]
                {
                    merged(report, &cuda, weights.linear(projection).weight, rank, block_size);
                }
                let batch = packed(&[50, 9], vocabulary as u32);
                let table = base.embedding();
                let mut all = Vec::new();
                {
                    let loaded = load(cpu, &batch, 1, 1);
                    let mut out = poisoned(cpu, 59 * hidden);
                    cpu.gather_embedding(&loaded, &table, ViewMut::<Cpu>::new(&mut out, 59, hidden));
                    all.push(out);
                    let loaded = load(&cuda, &batch, 1, 1);
                    let mut out = poisoned(&cuda, 59 * hidden);
                    cuda.gather_embedding(&loaded, &table, ViewMut::<Cuda>::new(&mut out, 59, hidden));
                    all.push(get(&cuda, &out, 59, hidden));
                }
                report.compare(format!("embedding {hidden} {precision:?}"), &all[1], &all[0], 0.0);
                let weights = base.layer(0).unwrap();
                let norm = cuda.read(cuda.frozen_vector(weights.input_norm)).unwrap();
                report.compare(
                    format!("norm weights {hidden} {precision:?}"),
                    &norm,
                    weights.input_norm,
                    0.0,
                );
                let mut scratch = poisoned(&cuda, 30 * hidden);
                let table = base.head();
                let view = cuda.frozen_rows(&table, 7, 30, &mut scratch);
                let got = cuda.read(view).unwrap();
                let mut expected = vec![0.0; 30 * hidden];
                table.rows_f32(7..37, &mut expected);
                report.compare(format!("head rows {hidden} {precision:?}"), &got, &expected, 0.0);
            }
        }
    }
}
