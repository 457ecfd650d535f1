//! What a merge did to the numbers.

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// |folded - base| / |base|, Frobenius norms: how far the adapter moved it.
    pub change: f64,
    /// |stored - folded| / |folded|: how much rounding or quantising lost.
    pub loss: f64,
    /// |stored - folded| / |folded - base|: the loss beside what the adapter did; above 1 the change drowns.
    pub loss_of_change: f64,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// Tensors that the adapter changed, and all that were quantised.
    pub tensors: Vec<TensorReport>,
    /// Files of weights.
    pub shards: usize,
    /// Bytes of weights.
    pub bytes: u64,
}

impl MergeReport {
    /// Tensors that the adapter changed.
    pub fn changed(&self) -> impl Iterator<Item = &TensorReport> {
        self.tensors.iter().filter(|tensor| tensor.change > 0.0)
    }
}

/// Sums of squares, gathered piece by piece.
#[derive(Debug, Default)]
pub(super) struct Distances {
    base: f64,
    folded: f64,
    change: f64,
    loss: f64,
}

impl Distances {
    pub(super) fn add(&mut self, base: &[f32], folded: &[f32], stored: &[f32]) {
        for ((base, folded), stored) in base.iter().zip(folded).zip(stored) {
            let (base, folded, stored) = (f64::from(*base), f64::from(*folded), f64::from(*stored));
            self.base += base * base;
            self.folded += folded * folded;
            self.change += (folded - base).powi(2);
            self.loss += (stored - folded).powi(2);
        }
    }

    pub(super) fn report(&self, name: &str) -> TensorReport {
        let share = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { (part / whole).sqrt() };
        TensorReport {
            name: name.to_owned(),
            change: share(self.change, self.base),
            loss: share(self.loss, self.folded),
            loss_of_change: if self.change == 0.0 { 0.0 } else { share(self.loss, self.change) },
        }
    }
}
