//! The integers of a reduction: what was trained, exactly.

use shanty_proto::v1::Announcement;

use crate::Error;

/// Loss travels in units of 2^-20 nats. A sum below 8.8e12 nats fits.
const LOSS_UNIT: f64 = 1.0 / 1_048_576.0;

/// What one rank, or all of them together, put into a step or an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Check {
    pub(crate) tokens: u64,
    pub(crate) rows: u64,
    pub(crate) row_hash: u64,
    /// Summed loss in units of 2^-20 nats, two's complement: sums wrap to the right value.
    loss: u64,
    /// Micro-batches whose loss is not a finite number.
    pub(crate) not_finite: u64,
    /// Ranks that were told to save a checkpoint after this step.
    pub(crate) saves: u64,
}

impl Check {
    /// The integers of one rank.
    pub(crate) fn new(tokens: u64, rows: u64, row_hash: u64, loss: f64, not_finite: u64) -> Self {
        let loss = (loss / LOSS_UNIT).round() as i64;
        Self { tokens, rows, row_hash, loss: loss.cast_unsigned(), not_finite, saves: 0 }
    }

    /// As it is reduced.
    pub(crate) fn to_words(self) -> [u64; 6] {
        [self.tokens, self.rows, self.row_hash, self.loss, self.not_finite, self.saves]
    }

    /// As it was reduced.
    pub(crate) fn from_words([tokens, rows, row_hash, loss, not_finite, saves]: [u64; 6]) -> Self {
        Self { tokens, rows, row_hash, loss, not_finite, saves }
    }

    /// Summed loss, nats.
    pub(crate) fn loss(self) -> f64 {
        self.loss.cast_signed() as f64 * LOSS_UNIT
    }

    /// Tokens, rows and row hash, as they are reported.
    pub(crate) fn as_announcement(self) -> Announcement {
        Announcement { tokens: self.tokens, rows: self.rows, row_hash: self.row_hash }
    }

    /// Compares with what the lease announced.
    pub(crate) fn compare(self, step: u64, announced: &Announcement) -> Result<(), Error> {
        if self.as_announcement() == *announced {
            return Ok(());
        }
        Err(Error::WrongSum {
            step,
            rows: announced.rows,
            tokens: announced.tokens,
            hash: announced.row_hash,
            got_rows: self.rows,
            got_tokens: self.tokens,
            got_hash: self.row_hash,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_of_ranks_add_up_whatever_their_sign() {
        let told = Check { saves: 1, ..Check::new(1, 1, 5, 6.25, 0) };
        let ranks = [told, Check::new(2, 1, u64::MAX, -0.5, 0)];
        let mut words = [0u64; 6];
        for rank in ranks {
            for (sum, word) in words.iter_mut().zip(rank.to_words()) {
                *sum = sum.wrapping_add(word);
            }
        }
        let total = Check::from_words(words);
        assert_eq!((total.tokens, total.rows, total.row_hash), (3, 2, 4));
        assert_eq!(total.saves, 1, "one that was told is enough, and all hear of it");
        assert!((total.loss() - 5.75).abs() < 1e-12, "both are multiples of 2^-20: {}", total.loss());
    }

    #[test]
    fn any_difference_from_the_announcement_is_an_error_that_says_both() {
        let check = Check::new(10, 2, 77, 1.0, 0);
        let announced = check.as_announcement();
        assert!(check.compare(4, &announced).is_ok());
        for other in [
            Announcement { tokens: 11, ..announced },
            Announcement { rows: 3, ..announced },
            Announcement { row_hash: 78, ..announced },
        ] {
            let error = check.compare(4, &other).unwrap_err();
            assert!(error.to_string().starts_with("step 4 reduced 2 rows, 10 trained tokens"), "{error}");
        }
    }
}
