//! The large products of a step.

use super::Sizes;
use crate::{backend::PlannedProduct, model::ModelConfig};

/// All products of activations and frozen matrices in a step that fills its room: forward and input's gradient of every
/// projection, and the head's of a chunk of rows.
pub fn products(config: &ModelConfig, sizes: &Sizes) -> Vec<PlannedProduct> {
    let mut all = Vec::new();
    let mut add = |rows: usize, [output, input]: [usize; 2], sums: &[bool]| {
        for &adds in sums {
            let forward = PlannedProduct { rows, columns: output, inner: input, transpose_b: true, adds };
            let backward = PlannedProduct { columns: input, inner: output, transpose_b: false, ..forward };
            for product in [forward, backward] {
                if !all.contains(&product) {
                    all.push(product);
                }
            }
        }
    };
    for projection in config.projections() {
        add(sizes.tokens, config.shape(*projection), &[false, true]);
    }
    add(sizes.head_rows, [config.vocabulary_size, config.hidden_size], &[false]);
    all
}
