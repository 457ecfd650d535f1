//! Bases loaded straight onto the card beside those that the CPU loads: every number's bits, and the hash.

use std::{fs, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use shanty_diagnostic::Diagnose as _;
use shanty_peft_core::{
    backend::cuda::{Cuda, Precision},
    bench::{Shape, write_random},
    model::{BaseSource, ResidentBase},
    quant::Nf4Options,
};

use crate::{Report, operations::numbers};

/// Numbers of which the bits differ.
fn differing(got: &[f32], expected: &[f32]) -> f64 {
    let all = got.iter().zip(expected);
    (all.filter(|(a, b)| a.to_bits() != b.to_bits()).count() + got.len().abs_diff(expected.len())) as f64
}

/// Loads a folder both ways and compares all that a pass reads.
fn compare(report: &mut Report, name: &str, folder: &Path, nf4: Option<Nf4Options>, precision: Precision) {
    let mut expected = ResidentBase::load(folder, nf4, &mut |_| {}).unwrap();
    for stays in [false, true] {
        let mut cuda = Cuda::new(0, precision).unwrap();
        let mut read = (0, 1);
        let loaded = cuda.load_folder(folder, nf4, stays, 0, &mut |progress| {
            read = (progress.done_bytes, progress.total_bytes);
        });
        let (mut base, hash) = loaded.unwrap();
        let name = format!("load {name} {precision:?}, embedding stays {stays}");
        let unlike = hash != expected.content_hash() || read.0 != read.1;
        report.note(format!("{name}: hash, bytes read"), f64::from(u8::from(unlike)), 0.0);
        let mut wrong = differing(base.final_norm(), expected.final_norm());
        for (got, expected) in [(base.embedding(), expected.embedding()), (base.head(), expected.head())] {
            let (mut a, mut b) = (vec![f32::NAN; got.rows() * got.columns()], Vec::new());
            b.resize(expected.rows() * expected.columns(), 0.0);
            got.rows_f32(0..got.rows(), &mut a);
            expected.rows_f32(0..expected.rows(), &mut b);
            wrong += differing(&a, &b);
        }
        for layer in 0..expected.config().layers {
            let projections = expected.config().projections().to_vec();
            let (got, expected) = (base.layer(layer).unwrap(), expected.layer(layer).unwrap());
            for (got, expected) in got.norms().zip(expected.norms()) {
                wrong += differing(got, expected);
            }
            for projection in projections {
                let (got, expected) = (got.linear(projection), expected.linear(projection));
                let count = expected.weight.rows() * expected.weight.columns();
                let (mut a, mut b) = (vec![f32::NAN; count], vec![0.0; count]);
                got.weight.write_f32(&mut a);
                expected.weight.write_f32(&mut b);
                // What is not quantised is rounded to bf16 where products round it anyway.
                if precision == Precision::Bf16 && expected.weight.as_f32().is_some() {
                    b.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
                }
                wrong += differing(&a, &b);
                // Some rows in the middle: what is fetched begins inside a block of scales.
                let (first, last) = (got.weight.rows() / 3, got.weight.rows() / 3 * 2 + 1);
                let (from, to) = (first * got.weight.columns(), last * got.weight.columns());
                got.weight.write_rows_f32(first..last, &mut a[from..to]);
                wrong += differing(&a, &b);
                wrong += differing(got.bias.unwrap_or_default(), expected.bias.unwrap_or_default());
            }
        }
        report.note(format!("{name}: bits"), wrong, 0.0);
    }
}

/// Writes the tiny Llama's tensors anew, as `dtype` and with numbers that stand out.
fn rewrite(from: &Path, to: &Path, dtype: Dtype, broken: bool) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let file = fs::read(from.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut all = Vec::new();
    for (name, tensor) in tensors.tensors() {
        let count: usize = tensor.shape().iter().product();
        let mut numbers = numbers(&name, count);
        // Blocks of zeros, blocks of tiny and of large numbers.
        for (at, number) in numbers.iter_mut().enumerate() {
            match at / 64 % 7 {
                0 => *number = 0.0,
                1 => *number *= 1e-3,
                2 => *number *= 300.0,
                _ => {}
            }
        }
        if broken && name.contains("down_proj") {
            numbers[count / 2] = f32::NAN;
        }
        let bytes: Vec<u8> = match dtype {
            Dtype::BF16 => numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        all.push((name, tensor.shape().to_vec(), bytes));
    }
    let views = all
        .iter()
        .map(|(name, shape, bytes)| (name.clone(), TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

pub(crate) fn check(report: &mut Report, repository: &Path) {
    let reference = repository.join("crates/testkit/fixtures/reference");
    let double = Some(Nf4Options::default());
    let plain = Some(Nf4Options { block_size: 32, double: false });
    let large = Some(Nf4Options { block_size: 4096, double: true });
    let temporary = std::env::temp_dir().join(format!("shanty-loading-{}", std::process::id()));
    for (name, dtype) in [("bf16", Dtype::BF16), ("f16", Dtype::F16), ("f32", Dtype::F32)] {
        let folder = temporary.join(name);
        rewrite(&reference.join("models/llama"), &folder, dtype, false);
        for (how, nf4) in [("double", double), ("plain", plain), ("large", large), ("no", None)] {
            compare(report, &format!("{name}, {how} NF4"), &folder, nf4, Precision::Bf16);
        }
        compare(report, &format!("{name}, no NF4"), &folder, None, Precision::F32);
    }
    let folder = temporary.join("broken");
    rewrite(&reference.join("models/llama"), &folder, Dtype::BF16, true);
    let mut cuda = Cuda::new(0, Precision::Bf16).unwrap();
    let code = |nf4: Option<Nf4Options>, cuda: &mut Cuda| {
        let card = cuda.load_folder(&folder, nf4, false, 0, &mut |_| {}).map(drop).unwrap_err();
        let cpu = ResidentBase::load(&folder, nf4, &mut |_| {}).map(drop).unwrap_err();
        (card.to_string(), cpu.to_string(), card.diagnostic().code == cpu.diagnostic().code)
    };
    for nf4 in [double, None] {
        let (card, cpu, same) = code(nf4, &mut cuda);
        println!("a number that is none: {card}");
        // Each names a tensor that is broken; which of them is read first differs.
        let wrong = !same || !card.contains("down_proj") || !cpu.contains("down_proj");
        report.note("a number that is none is told as on the CPU", f64::from(u8::from(wrong)), 0.0);
    }
    for model in ["llama_tied", "qwen2", "phi3", "gemma2"] {
        compare(report, model, &reference.join("models").join(model), double, Precision::Bf16);
    }
    compare(report, "pre-quantised", &reference.join("training/base_nf4"), double, Precision::Bf16);
    compare(report, "pre-quantised, widened", &reference.join("training/base_nf4"), None, Precision::F32);
    compare(report, "the tiny base", &repository.join("examples/tiny-llama-14m"), double, Precision::Bf16);
    // Matrices of several slots, and of a length that fills none.
    let folder = temporary.join("random");
    let shape = Shape { hidden: 1032, intermediate: 5000, layers: 2, vocabulary: 9001, heads: 4 };
    write_random(&folder, shape).unwrap();
    compare(report, "several slots", &folder, double, Precision::Bf16);
    let _ = fs::remove_dir_all(&temporary);
}
