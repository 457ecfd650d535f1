//! Updates of low rank, added to a matrix while it is dequantised.

use super::{Cuda, DeviceBuffer, Numbers, base::matrix_key, launch};
use crate::{
    backend::{LowRank, View},
    model::Matrix,
};

/// Rows and columns that a block takes, as in `kernels/nf4.cu`.
const ROWS: usize = 256;
const COLUMNS: usize = 128;
/// The largest rank whose tile fits shared memory on every card.
const LARGEST_RANK: usize = 128;

impl Cuda {
    /// Writes `matrix` and `update` together to `scratch`; false, and nothing is done, where the kernel takes no such shapes.
    pub(super) fn merge(
        &self,
        matrix: &Matrix<'_>,
        update: &LowRank<'_, Self>,
        scratch: &DeviceBuffer,
    ) -> bool {
        let Some(packed) = self.base.packed.get(&matrix_key(matrix)) else { return false };
        let (rows, columns, rank) = (matrix.rows(), matrix.columns(), update.a.rows);
        let rounded = |view: View<'_, Self>| match view.data.rounded {
            0 => None,
            address => Some(address + 2 * view.offset as u64),
        };
        let (Some(a), Some(b)) = (rounded(update.a), rounded(update.b)) else { return false };
        let fits = columns.is_multiple_of(64)
            && rank.is_multiple_of(2)
            && (1..=LARGEST_RANK).contains(&rank)
            && update.a.stride == columns
            && update.b.stride == rank
            && b.is_multiple_of(4)
            && scratch.numbers == Numbers::Bf16;
        if !fits {
            return false;
        }
        let grid = [columns.div_ceil(COLUMNS), rows.div_ceil(ROWS), 1];
        let shared = 2 * COLUMNS * (rank.next_multiple_of(16) + 2);
        launch!(
            at self.device,
            self.device.function("nf4_merged"),
            "nf4_merged",
            grid,
            [256, 1],
            shared,
            packed.argument,
            rows as u32,
            columns as u32,
            a,
            b,
            rank as u32,
            update.scale,
            scratch.address
        );
        true
    }
}
