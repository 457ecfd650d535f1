//! The global norm of a gradient, and clipping to it.

use rayon::prelude::*;

/// Numbers summed as one; fixed, so that the sum has one order whatever the thread count.
const CHUNK: usize = 1 << 12;

/// The Euclidean norm of `gradients`, summed in f64 in a fixed order: all ranks that hold the same bits get the same bits.
///
/// Infinite or not a number where the gradient is.
pub fn global_norm(gradients: &[f32]) -> f64 {
    const LANES: usize = 8;
    let sums: Vec<f64> = gradients
        .par_chunks(CHUNK)
        .map(|chunk| {
            let (groups, rest) = chunk.as_chunks::<LANES>();
            let mut lanes = [0.0; LANES];
            for group in groups {
                for (sum, value) in lanes.iter_mut().zip(group) {
                    *sum += f64::from(*value) * f64::from(*value);
                }
            }
            let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
            lanes.iter().sum::<f64>() + rest
        })
        .collect();
    sums.iter().sum::<f64>().sqrt()
}

/// What a gradient of norm `norm` is multiplied by so that its norm is at most `max_norm`: as
/// `torch.nn.utils.clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)). With `max_norm` 0 it is 1.
///
/// None where the norm is infinite or not a number: such a gradient must not be applied.
pub fn clip_factor(norm: f64, max_norm: f64) -> Option<f64> {
    if !norm.is_finite() {
        return None;
    }
    Some(if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_does_not_depend_on_threads() {
        let values: Vec<f32> = (0..100_003).map(|i| (i as f32 * 0.37).sin()).collect();
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm(&values))
        };
        let one = with(1);
        for threads in [2, 3, 7] {
            assert_eq!(one.to_bits(), with(threads).to_bits());
        }
        let plain = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        // 1e5 f64 additions of positive numbers: at most 1e5 · 2^-53 relative.
        assert!((one - plain).abs() <= 1e-11 * plain);
    }

    #[test]
    fn clipping_is_torchs() {
        assert_eq!(clip_factor(0.5, 1.0), Some(1.0));
        assert_eq!(clip_factor(4.0, 1.0), Some(1.0 / (4.0 + 1e-6)));
        assert_eq!(clip_factor(0.0, 1.0), Some(1.0));
        assert_eq!(clip_factor(1e9, 0.0), Some(1.0));
        assert_eq!(clip_factor(f64::NAN, 1.0), None);
        assert_eq!(clip_factor(f64::INFINITY, 0.0), None);
        assert!(global_norm(&[1.0, f32::NAN]).is_nan());
        assert_eq!(global_norm(&[]), 0.0);
        // Squares that f32 cannot hold.
        assert_eq!(
            global_norm(&[3e30, 4e30]),
            (f64::from(3e30_f32).powi(2) + f64::from(4e30_f32).powi(2)).sqrt()
        );
    }
}
