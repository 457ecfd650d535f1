//! Rows by what became of them: a watermark and a few exceptions, never an entry a row.

use shanty_data::order::Order;
use shanty_proto::Step;

/// Rows by what became of them, in the lineage of the adapter as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ledger {
    /// Rows of steps that workers may be working on.
    pub leased: u64,
    /// Rows of committed steps.
    pub committed: u64,
    /// Rows that moved to another worker.
    pub requeued: u64,
    /// Rows of steps that were passed over.
    pub skipped: u64,
    /// Rows trained again after a return to a checkpoint.
    pub recomputed: u64,
    /// Rows that count twice in the adapter, by what members reported.
    pub duplicates: u64,
    /// Rows of steps that nobody may work on yet.
    pub remaining: u64,
}

/// Rows of steps 1 to `step`.
pub fn rows_through(order: &Order, step: Step) -> u64 {
    let epochs = step.0 / order.steps_per_epoch();
    let within = step.0 % order.steps_per_epoch();
    // Only an epoch's last step is short, and that one is counted with its epoch.
    epochs * order.rows() + within * order.global_batch_size()
}

/// Rows of the steps after `from`, up to and including `to`.
pub fn rows_between(order: &Order, from: Step, to: Step) -> u64 {
    rows_through(order, to).saturating_sub(rows_through(order, from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_over_short_batches() {
        let order = Order::new(1, 10, 4).unwrap();
        let mut sum = 0;
        for step in 0..12 {
            sum += order.rows_in_step(step);
            assert_eq!(rows_through(&order, Step(step)), sum, "step {step}");
        }
        assert_eq!(rows_between(&order, Step(2), Step(4)), 2 + 4);
        assert_eq!(rows_between(&order, Step(4), Step(2)), 0);
    }
}
