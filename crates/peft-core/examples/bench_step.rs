//! Times training steps: `cargo run --release -p shanty-peft-core --example bench_step -- BASE [rows length threads nf4|none never|layers dropout steps]`.

#![allow(clippy::print_stdout, reason = "its output is what it is for")]

use shanty_peft_core::{
    bench::{StepBenchOptions, step},
    plan::Recompute,
    quant::Nf4Options,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text =
        |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.to_owned());
    let number = |index: usize, default: &str| text(index, default).parse().expect("a number");
    let options = StepBenchOptions {
        base: text(0, "examples/tiny-llama-14m").into(),
        rows: number(1, "8"),
        micro_batch_rows: None,
        length: number(2, "256"),
        threads: number(3, "2"),
        quantization: (text(4, "none") == "nf4").then(Nf4Options::default),
        recompute: if text(5, "never") == "layers" { Recompute::Layers } else { Recompute::Never },
        dropout: text(6, "0").parse().expect("a number"),
        r: 16,
        steps: number(7, "8"),
    };
    let bench = step(&options).expect("the step runs");
    println!(
        "{:.0} tokens/s, step {:.3} s, peak {:.0} MiB, products at {:.0} GFLOP/s, floor {:.0} %, loss {:.3}",
        bench.tokens_per_second,
        bench.step_seconds,
        bench.peak_memory_bytes as f64 / 1048576.0,
        bench.product_gigaflops,
        100.0 * bench.floor_fraction,
        bench.loss
    );
    println!("{:?}", bench.plan);
    for spent in &bench.profile {
        let seconds = spent.time.as_secs_f64() / options.steps as f64;
        println!(
            "{:>20} {:>7.1} ms {:>6} calls {:>7.1} GFLOP/s",
            format!("{:?}", spent.operation),
            1e3 * seconds,
            spent.calls as usize / options.steps,
            spent.flops as f64 / options.steps as f64 / seconds / 1e9
        );
    }
}
