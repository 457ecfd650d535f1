//! Matrix products on the card.

use super::{
    Cuda, Numbers,
    device::{Operand, Product},
    matrix,
};
use crate::backend::{View, ViewMut};

impl Cuda {
    /// [`crate::backend::Backend::gemm`] of two factors, each with whether it is transposed.
    pub(super) fn multiply(
        &self,
        alpha: f32,
        [(a, transpose_a), (b, transpose_b)]: [(View<'_, Self>, bool); 2],
        beta: f32,
        c: ViewMut<'_, Self>,
    ) {
        let (rows, inner) = if transpose_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
        let (b_inner, columns) = if transpose_b { (b.columns, b.rows) } else { (b.rows, b.columns) };
        assert!(
            rows == c.rows && columns == c.columns && inner == b_inner,
            "a product's operands and target do not fit each other"
        );
        if rows == 0 || columns == 0 {
            return;
        }
        let into = c.data.numbers;
        let narrow = [a.data.numbers, b.data.numbers, into].contains(&Numbers::Bf16);
        let plain = |view: View<'_, Self>, transposed| Operand {
            address: matrix(view).address,
            stride: view.stride,
            transposed,
        };
        let (a, b, numbers) = if narrow {
            (self.rounded(0, a, transpose_a), self.rounded(1, b, transpose_b), Numbers::Bf16)
        } else {
            (plain(a, transpose_a), plain(b, transpose_b), Numbers::F32)
        };
        let c = plain(c.view(), false);
        self.device.product(&Product { a, b, c, rows, columns, inner, alpha, beta, numbers, into });
    }
}
