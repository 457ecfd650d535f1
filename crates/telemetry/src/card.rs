//! What a card says of itself, by NVIDIA's management library, which is loaded where there is one.

use std::ffi::OsStr;

use nvml_wrapper::{
    Device, Nvml,
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    error::NvmlError,
};

/// Names of the library: a machine that runs but does not build has the first alone.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// What a card says; a value that it does not know is absent.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Share of the last moments in which it computed, 0 to 1.
    pub utilization: Option<f64>,
    /// Memory that is taken, by whomever.
    pub memory_used_bytes: Option<u64>,
    /// Memory that it has.
    pub memory_size_bytes: Option<u64>,
    /// How warm it is.
    pub temperature_celsius: Option<f64>,
    /// What it draws.
    pub power_watts: Option<f64>,
    /// Memory errors that could not be corrected, since the driver was loaded.
    pub uncorrected_errors: Option<u64>,
    /// Memory errors that were corrected, since the driver was loaded.
    pub corrected_errors: Option<u64>,
    /// Times that the link to it had to send again.
    pub link_replays: Option<u64>,
}

/// A card that can be asked.
#[derive(Debug)]
pub struct Card {
    nvml: Nvml,
    which: Which,
}

/// How a card is named.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    Index(u32),
    Uuid(String),
}

impl Card {
    /// The card that CUDA counts as `index`.
    ///
    /// # Errors
    /// Why it cannot be asked, in words: no library, no driver, no such card.
    pub fn open(index: u32) -> Result<Self, String> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let which = which(index, visible.as_deref())
            .ok_or_else(|| format!("CUDA_VISIBLE_DEVICES hides card {index}"))?;
        let mut reason = String::new();
        for library in LIBRARIES {
            match Nvml::builder().lib_path(OsStr::new(library)).init() {
                Ok(nvml) => {
                    let card = Self { nvml, which };
                    card.device().map_err(|error| format!("NVML does not know the card: {error}"))?;
                    return Ok(card);
                }
                Err(error) => reason = error.to_string(),
            }
        }
        Err(format!("NVML cannot be used: {reason}"))
    }

    fn device(&self) -> Result<Device<'_>, NvmlError> {
        match &self.which {
            Which::Index(index) => self.nvml.device_by_index(*index),
            Which::Uuid(uuid) => self.nvml.device_by_uuid(uuid.as_str()),
        }
    }

    /// What it says now.
    ///
    /// # Errors
    /// Why it says nothing, in words: it fell off the bus, perhaps.
    pub fn ask(&self) -> Result<Facts, String> {
        let device = self.device().map_err(|error| format!("the card does not answer: {error}"))?;
        let memory = device.memory_info().ok();
        let errors = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
        Ok(Facts {
            name: device.name().map_err(|error| format!("the card does not answer: {error}"))?,
            utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            memory_used_bytes: memory.as_ref().map(|memory| memory.used),
            memory_size_bytes: memory.as_ref().map(|memory| memory.total),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
            power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            uncorrected_errors: errors(MemoryError::Uncorrected),
            corrected_errors: errors(MemoryError::Corrected),
            link_replays: device.pcie_replay_counter().ok().map(u64::from),
        })
    }
}

/// The management library counts all cards, CUDA those that the environment lets it see, in the order that it names. With
/// plain numbers both count alike where the host's cards are of one kind, or with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
fn which(index: u32, visible: Option<&str>) -> Option<Which> {
    let Some(visible) = visible.filter(|visible| !visible.trim().is_empty()) else {
        return Some(Which::Index(index));
    };
    let named = visible.split(',').map(str::trim).nth(usize::try_from(index).ok()?)?;
    match named.parse() {
        Ok(number) => Some(Which::Index(number)),
        Err(_) if named.starts_with("GPU-") || named.starts_with("MIG-") => {
            Some(Which::Uuid(named.to_owned()))
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_counts_the_cards_that_it_may_see() {
        assert_eq!(which(1, None), Some(Which::Index(1)));
        assert_eq!(which(1, Some("")), Some(Which::Index(1)));
        assert_eq!(which(0, Some("3, 5")), Some(Which::Index(3)));
        assert_eq!(which(1, Some("3, 5")), Some(Which::Index(5)));
        assert_eq!(which(2, Some("3, 5")), None);
        assert_eq!(which(0, Some("GPU-8f6c")), Some(Which::Uuid("GPU-8f6c".to_owned())));
    }

    /// Where there is a card, it answers, and with figures that can be; where there is none, the reason is in words. With
    /// `SHANTY_REQUIRE_GPU` set, as on a machine with cards, it must answer.
    #[test]
    fn a_card_answers_or_the_reason_is_told() {
        match Card::open(0) {
            Ok(card) => {
                let facts = card.ask().expect("a card that was opened answers");
                println!("{facts:?}");
                assert!(!facts.name.is_empty());
                let size = facts.memory_size_bytes.expect("a card has memory");
                assert!(size > 1 << 30 && facts.memory_used_bytes <= Some(size), "{facts:?}");
                assert!(facts.utilization.is_some_and(|share| (0.0..=1.0).contains(&share)), "{facts:?}");
                assert!(facts.temperature_celsius.is_some_and(|it| (5.0..120.0).contains(&it)), "{facts:?}");
                assert!(facts.power_watts.is_some_and(|watts| (1.0..2000.0).contains(&watts)), "{facts:?}");
                assert!(facts.uncorrected_errors.is_some(), "a data centre's card counts errors: {facts:?}");
            }
            Err(reason) => {
                assert!(std::env::var_os("SHANTY_REQUIRE_GPU").is_none(), "{reason}");
                assert!(reason.contains("NVML") || reason.contains("card"), "{reason}");
                println!("skipped: {reason}");
            }
        }
    }
}
