//! The number of workers changes who computes, not what is computed.

use shanty_testkit::{TinyJob, adapter};

use crate::support::Place;

/// Relative difference of a step's losses: f32 sums in another order differ by about 1e-6 on this model; DESIGN allows
/// 1e-4.
const LOSS_TOLERANCE: f64 = 1e-4;
/// Largest difference of two adapter weights after 16 steps; AdamW's sign-like first steps amplify what rounding does to
/// gradients near 0.
const WEIGHT_TOLERANCE: f32 = 1e-3;

#[test]
fn one_two_and_three_workers_train_the_same_adapter() {
    let run = |workers| {
        let place = Place::new(TinyJob { steps: 16, ..TinyJob::default() }).unwrap();
        let finished = place.run(workers).unwrap();
        place.check_exactly_once().unwrap();
        (place, finished)
    };
    let (one_place, one) = run(1);
    for workers in [2, 3] {
        let (place, finished) = run(workers);
        assert_eq!(finished.losses().len(), 16);
        for (step, loss) in finished.losses() {
            let expected = one.losses()[&step];
            let difference = ((loss - expected) / expected).abs();
            assert!(
                difference <= LOSS_TOLERANCE,
                "step {step} on {workers} workers: {loss}, alone {expected}"
            );
        }
        let difference = adapter::largest_difference(
            &one_place.adapter(&one).unwrap(),
            &place.adapter(&finished).unwrap(),
        )
        .unwrap();
        assert!(difference <= WEIGHT_TOLERANCE, "weights on {workers} workers differ by {difference}");
    }
}
