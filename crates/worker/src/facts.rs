//! What device and process say of themselves, measured on a thread of its own: a card may take its time to answer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use shanty_proto::v1::DeviceFacts;
use shanty_telemetry::{card::Card, process};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How often they are measured, and told.
const EVERY: Duration = Duration::from_secs(2);

/// The newest measurement that was not told yet.
#[derive(Debug)]
pub(crate) struct Facts {
    newest: Arc<Mutex<Option<DeviceFacts>>>,
    _stop: DropGuard,
}

impl Facts {
    /// Measures `device` (`cpu`, `cuda:0`, …) and this process until it is dropped.
    pub(crate) fn of(device: &str) -> Self {
        let newest = Arc::new(Mutex::new(None));
        let stop = CancellationToken::new();
        let (device, sink, stopped) = (device.to_owned(), Arc::clone(&newest), stop.clone());
        tokio::spawn(async move {
            let opened = tokio::task::spawn_blocking(move || open(&device)).await;
            let Ok(card) = opened.map(Arc::new) else { return };
            loop {
                let asked = Arc::clone(&card);
                let Ok(facts) = tokio::task::spawn_blocking(move || measure(&asked)).await else { return };
                *sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(facts);
                tokio::select! {
                    () = tokio::time::sleep(EVERY) => {}
                    () = stopped.cancelled() => return,
                }
            }
        });
        Self { newest, _stop: stop.drop_guard() }
    }

    /// The newest measurement, once.
    pub(crate) fn take(&self) -> Option<DeviceFacts> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The card of a device, or why there is nothing to ask.
fn open(device: &str) -> Result<Card, String> {
    match device.strip_prefix("cuda:").map(str::parse) {
        None => Err("no card: it computes on the CPU".to_owned()),
        Some(Ok(index)) => Card::open(index),
        Some(Err(_)) => Err(format!("`{device}` names no card")),
    }
}

fn measure(card: &Result<Card, String>) -> DeviceFacts {
    let usage = process::usage();
    let own = DeviceFacts {
        resident_bytes: usage.resident_bytes,
        cpu_seconds: usage.cpu_seconds,
        ..DeviceFacts::default()
    };
    match card.as_ref().map_err(Clone::clone).and_then(Card::ask) {
        Err(absent) => DeviceFacts { absent, ..own },
        Ok(facts) => DeviceFacts {
            name: facts.name,
            utilization: facts.utilization,
            memory_used_bytes: facts.memory_used_bytes,
            memory_size_bytes: facts.memory_size_bytes,
            temperature_celsius: facts.temperature_celsius,
            power_watts: facts.power_watts,
            uncorrected_errors: facts.uncorrected_errors,
            corrected_errors: facts.corrected_errors,
            link_replays: facts.link_replays,
            ..own
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_on_the_cpu_says_that_it_has_no_card_and_what_it_takes() {
        let facts = measure(&open("cpu"));
        assert_eq!(facts.absent, "no card: it computes on the CPU");
        assert!(facts.name.is_empty() && facts.utilization.is_none());
        assert!(facts.resident_bytes > 0, "{facts:?}");
    }

    #[test]
    fn a_card_that_cannot_be_asked_is_said_to_be() {
        let facts = measure(&open("cuda:977"));
        assert!(!facts.absent.is_empty(), "{facts:?}");
    }
}
