//! How fast NF4 weights, dropout masks and updates are made here, beside a plain copy of memory.
//!
//! `cargo run --release -p shanty-peft-core --example quant_speed`

#![expect(clippy::print_stdout, reason = "its output is its purpose")]

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;
use shanty_peft_core::{
    optim::{AdamW, AdamWOptions, global_norm},
    quant::{
        double::{self, DYNAMIC_MAP},
        nf4::{self, Nf4View, Scales},
    },
    random::{DropoutKey, dropout_scales},
};

const ROWS: usize = 4096;
const COLUMNS: usize = 4096;

/// Best of a few runs, in billions of numbers a second.
fn measure(what: &str, numbers: usize, mut work: impl FnMut()) {
    work();
    let seconds = (0..7)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    println!("{what:<28} {:>7.2} G numbers/s  {:>8.2} ms", numbers as f64 / seconds / 1e9, seconds * 1e3);
}

fn main() {
    let numbers = ROWS * COLUMNS;
    println!("{ROWS} x {COLUMNS}, {} threads", rayon::current_num_threads());
    let weights: Vec<f32> = (0..numbers).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
    let mut out = vec![0.0_f32; numbers];
    measure("copy f32", numbers, || {
        out.par_chunks_mut(1 << 14)
            .zip(weights.par_chunks(1 << 14))
            .for_each(|(out, from)| out.copy_from_slice(from));
        black_box(&out);
    });
    let mut codes = vec![0; nf4::code_bytes(numbers)];
    let mut scales = vec![0.0; nf4::blocks(numbers, 64)];
    measure("NF4 quantise", numbers, || {
        assert!(nf4::quantise(&weights, 64, &mut codes, &mut scales), "weights are finite");
    });
    let quantised = double::quantise(&scales);
    let nested = Scales::Double {
        codes: &quantised.codes,
        nested: &quantised.nested,
        offset: quantised.offset,
        map: &DYNAMIC_MAP,
    };
    for (what, scales) in [("NF4 to f32", Scales::Plain(&scales)), ("NF4 doubly quantised to f32", nested)] {
        let view = Nf4View::new(ROWS, COLUMNS, 64, &codes, scales);
        measure(what, numbers, || {
            view.write_f32(0, &mut out);
            black_box(&out);
        });
    }
    measure("dropout mask, one thread", numbers, || {
        let key = DropoutKey { seed: 1, step: 2, module: 3 };
        for (token, row) in out.chunks_mut(COLUMNS).enumerate() {
            dropout_scales(key, 4, token as u32, 0.05, row);
        }
        black_box(&out);
    });
    measure("global norm", numbers, || {
        black_box(global_norm(&weights));
    });
    let mut optimizer = AdamW::new(AdamWOptions::default(), numbers);
    let mut parameters = weights.clone();
    measure("AdamW update", numbers, || {
        optimizer.update(&mut parameters, &weights, 0.5, 1e-4).expect("all buffers are of one length");
    });
}
