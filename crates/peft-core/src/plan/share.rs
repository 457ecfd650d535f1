//! Whether every worker holds the whole base, or several share one.
//!
//! A base that fits is not shared: its workers then exchange the adapter's gradient alone, which any network carries. One that does not fit is
//! shared by as few as can hold it.

use serde::Serialize;

/// What a worker would take with the base in so many parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ShareOption {
    /// Workers that share a base; 1: each has its own.
    pub parts: usize,
    /// Bytes of a worker, all told.
    pub worker_bytes: u64,
}

/// In how many parts a base is to be held, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShareChoice {
    /// Workers that share a base; 1: each has its own.
    pub parts: usize,
    /// Why, in words.
    pub reason: String,
    /// What a worker may take, bytes.
    pub limit_bytes: u64,
    /// What was weighed, in order.
    pub options: Vec<ShareOption>,
}

impl ShareChoice {
    /// Weighs what a worker would take with the base in 1, 2, … parts, and takes the first that fits. Numbers of parts that leave some of
    /// `workers` over come last; none is more than `workers`. `takes` gives a worker's bytes, or why the base cannot be shared.
    ///
    /// # Errors
    /// As `takes` of one part.
    pub fn make<E: std::fmt::Display>(
        workers: usize,
        limit_bytes: u64,
        takes: impl Fn(usize) -> Result<u64, E>,
    ) -> Result<Self, E> {
        let whole = takes(1)?;
        let mut options = vec![ShareOption { parts: 1, worker_bytes: whole }];
        let choice = |parts, reason, options| Ok(Self { parts, reason, limit_bytes, options });
        let of = |bytes: u64| gigabytes(bytes);
        if whole <= limit_bytes {
            let reason = format!("a worker takes {} of {}: the whole base fits", of(whole), of(limit_bytes));
            return choice(1, reason, options);
        }
        let too_much = format!("with the whole base a worker takes {} of {}", of(whole), of(limit_bytes));
        let divides = |parts: &usize| workers.is_multiple_of(*parts);
        let mut candidates: Vec<usize> = (2..=workers).collect();
        candidates.sort_by_key(|parts| (!divides(parts), *parts));
        for parts in candidates {
            match takes(parts) {
                Ok(worker_bytes) => options.push(ShareOption { parts, worker_bytes }),
                Err(error) => {
                    return choice(1, format!("{too_much}, and it cannot be shared: {error}"), options);
                }
            }
            if let Some(last) = options.last().filter(|last| last.worker_bytes <= limit_bytes) {
                let reason = format!(
                    "{too_much}; where {parts} workers share one, each takes {}",
                    of(last.worker_bytes)
                );
                return choice(parts, reason, options);
            }
        }
        let Some(least) = options.iter().skip(1).min_by_key(|option| option.worker_bytes).copied() else {
            return choice(1, format!("{too_much}, and there is no other worker to share it with"), options);
        };
        let reason = format!(
            "{too_much}; it does not fit either where {} workers share one, which takes least: {} each",
            least.parts,
            of(least.worker_bytes)
        );
        choice(least.parts, reason, options)
    }
}

fn gigabytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes < 1e9 { format!("{:.1} MB", bytes / 1e6) } else { format!("{:.2} GB", bytes / 1e9) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 of everything else, 120 of base.
    fn takes(parts: usize) -> Result<u64, &'static str> {
        Ok(10 + 120 / parts as u64)
    }

    #[test]
    fn what_fits_is_replicated_and_what_does_not_is_shared_by_as_few_as_can() {
        let parts = |workers, limit| ShareChoice::make(workers, limit, takes).unwrap().parts;
        assert_eq!(parts(8, 130), 1);
        assert_eq!(parts(8, 129), 2);
        assert_eq!(parts(8, 60), 4, "three of eight would leave two over");
        assert_eq!(parts(3, 60), 3);
        assert_eq!(parts(5, 60), 5, "of five only five leave none over");
        assert_eq!(parts(4, 39), 4, "nothing fits: the least");
    }

    #[test]
    fn the_reason_names_what_it_weighed() {
        let choice = ShareChoice::make(4, 60, takes).unwrap();
        assert_eq!(choice.options.iter().map(|option| option.parts).collect::<Vec<_>>(), [1, 2, 4]);
        assert!(choice.reason.contains("4 workers share"), "{}", choice.reason);
        let alone = ShareChoice::make(1, 60, takes).unwrap();
        assert!(alone.parts == 1 && alone.reason.contains("no other worker"), "{}", alone.reason);
        let never = |parts: usize| if parts == 1 { Ok(100) } else { Err("it is a GGUF file") };
        let choice = ShareChoice::make(4, 60, never).unwrap();
        assert!(choice.parts == 1 && choice.reason.contains("GGUF"), "{}", choice.reason);
    }
}
