//! The backward pass of branches of low rank: one pass over a gradient for both its products.

use super::{
    Cuda, MatrixArgument, Numbers, attention::allow_shared, device::Operand, launch, matrix, target,
};
use crate::{
    backend::{View, ViewMut},
    plan::WORKSPACE,
};

/// As in `kernels/low_rank.cu`: columns and rows of a tile, tiles in flight, warps of a block.
const COLUMNS: usize = 512;
const ROWS: usize = 32;
const STAGES: usize = 4;
const WARPS: usize = 8;
/// Rows below which a slice of the work is not worth its launch.
const FEWEST_ROWS: usize = 512;

/// How the work on `columns` columns is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Split {
    /// Blocks side by side.
    column_blocks: usize,
    /// Blocks one below the other.
    row_blocks: usize,
    /// Rows of a block.
    stretch: usize,
    /// Rows of one launch: their sums fit the workspace.
    slice: usize,
}

impl Split {
    fn of(rows: usize, columns: usize, rank: usize, multiprocessors: usize) -> Option<Self> {
        let column_blocks = columns.div_ceil(COLUMNS);
        let most = (multiprocessors / column_blocks).max(1);
        let room = WORKSPACE.checked_sub(4 * rank * columns * most)?;
        let slice = (room / (4 * rank * column_blocks) / ROWS * ROWS).min(rows);
        if slice < FEWEST_ROWS.min(rows) || slice == 0 {
            return None;
        }
        let stretch = slice.div_ceil(most).next_multiple_of(ROWS);
        Some(Self { column_blocks, row_blocks: slice.div_ceil(stretch), stretch, slice })
    }
}

impl Cuda {
    /// `dp = scale dy B` and `db += scale dyᵀ p`; false, and nothing is done, where the kernel takes no such matrices.
    pub(super) fn low_rank_slopes(
        &self,
        scale: f32,
        dy: View<'_, Self>,
        b: View<'_, Self>,
        p: View<'_, Self>,
        dp: &ViewMut<'_, Self>,
        db: &ViewMut<'_, Self>,
    ) -> bool {
        let name = match dp.columns {
            8 => "low_rank_slopes_8",
            16 => "low_rank_slopes_16",
            32 => "low_rank_slopes_32",
            _ => return false,
        };
        let rank = dp.columns;
        let by_eights = |view: View<'_, Self>| {
            let MatrixArgument { address, stride, .. } = matrix(view);
            view.data.numbers == Numbers::Bf16 && address.is_multiple_of(16) && stride.is_multiple_of(8)
        };
        let fits = by_eights(dy)
            && by_eights(p)
            && by_eights(dp.view())
            && db.data.numbers == Numbers::F32
            && dy.columns.is_multiple_of(8)
            && b.stride == rank
            && (b.data.numbers == Numbers::Bf16 || b.data.rounded != 0);
        // Tiles of dy and of p, and the sums of the warps.
        let shared = 2 * STAGES * ROWS * (COLUMNS + 8 + rank + 8) + 4 * WARPS * ROWS * rank;
        let split = Split::of(dy.rows, dy.columns, rank, self.device.multiprocessors);
        let Some(split) = split.filter(|_| fits && shared <= self.device.shared_bytes) else { return false };
        let kernel = self.device.function(name);
        if kernel.is_null() {
            return true;
        }
        // SAFETY: the kernel's module stays loaded.
        self.device.attempt(|| unsafe { allow_shared(kernel, shared) });
        let Operand { address: b, .. } = self.rounded(0, b, false);
        let (dy, p, dp, db) = (matrix(dy), matrix(p), target(dp), target(db));
        let dp_parts = self.device.workspace;
        for start in (0..dy.rows as usize).step_by(split.slice) {
            let rows = split.slice.min(dy.rows as usize - start);
            let row_blocks = rows.div_ceil(split.stretch);
            let part = |whole: MatrixArgument| MatrixArgument {
                address: whole.address + 2 * start as u64 * whole.stride,
                rows: rows as u32,
                ..whole
            };
            let db_parts = dp_parts + (4 * rank * split.column_blocks * rows) as u64;
            launch!(
                at self.device,
                kernel,
                name,
                [split.column_blocks, row_blocks, 1],
                [32 * WARPS, 1],
                shared,
                part(dy),
                b,
                part(p),
                split.stretch as u32,
                dp_parts,
                db_parts
            );
            launch!(
                self.device,
                "low_rank_sum",
                [2 * self.device.multiprocessors, 1, 1],
                [256, 1],
                dp_parts,
                split.column_blocks as u32,
                db_parts,
                row_blocks as u32,
                scale,
                part(dp),
                db
            );
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{ROWS, Split, WORKSPACE};

    #[test]
    fn every_slice_fits_the_workspace_and_every_row_is_in_a_block() {
        for rows in [1, 31, 700, 8192, 100_000] {
            for columns in [8, 512, 4096, 14_336, 128_256] {
                for rank in [8, 16, 32] {
                    let Some(split) = Split::of(rows, columns, rank, 132) else {
                        assert!(columns > 100_000, "{rows} x {columns}, {rank}");
                        continue;
                    };
                    let sums = split.column_blocks * split.slice + split.row_blocks * columns;
                    assert!(4 * rank * sums <= WORKSPACE, "{split:?}");
                    assert!(split.row_blocks * split.stretch >= split.slice.min(rows), "{split:?}");
                    assert!(split.stretch.is_multiple_of(ROWS), "{split:?}");
                }
            }
        }
    }
}
