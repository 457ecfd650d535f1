//! Forty random faults on real processes: the short form of `cargo xtask chaos`, which plays a thousand and, as root, cuts
//! links and fills disks too.

use std::time::Duration;

use shanty_chaos::Fault;
use shanty_testkit::{
    TinyJob,
    chaos::{Options, run},
};

use crate::support::fresh_seed;

/// Sums of other crews are taken in another order.
const LOSS_TOLERANCE: f64 = 1e-3;

#[test]
fn forty_faults_lose_no_step_and_train_no_row_twice() {
    let job = TinyJob {
        lines: 160,
        steps: 400,
        global_batch_size: 12,
        every_steps: 50,
        learning_rate: 1e-3,
        workers: (1, 3),
        ..TinyJob::default()
    };
    let (seed, batch) = (job.seed, job.global_batch_size as u64);
    let options = Options {
        shanty: env!("CARGO_BIN_EXE_shanty").into(),
        faults: 40,
        pause: Duration::from_millis(900),
        kinds: vec![(Fault::Kill, 5), (Fault::Stop, 2), (Fault::Slow, 1), (Fault::Coordinator, 2)],
        workers: 3,
        job,
        seed: fresh_seed(),
        sea: false,
    };
    let folder = tempfile::tempdir().unwrap();
    let belongs = |rows: u64, step: u64| {
        shanty_data::order::step_rows(seed, rows, batch, step).expect("rows and a batch")
    };
    let told = std::sync::Mutex::new(Vec::new());
    let say = |text: &str| told.lock().unwrap().push(text.to_owned());
    let report = run(&options, folder.path(), &belongs, &say).unwrap_or_else(|error| {
        panic!("seed {}: {error:#}\n{}", options.seed, told.lock().unwrap().join("\n"))
    });
    let lost = (report.steps_lost, report.duplicates, report.omissions);
    assert_eq!(lost, (0, 0, 0), "seed {}: {report:?}", options.seed);
    assert!(report.faults >= 40, "{report:?}");
    assert!(report.loss_difference <= LOSS_TOLERANCE, "seed {}: {report:?}", options.seed);
}
