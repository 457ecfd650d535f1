//! The real engine.

use crate::Error;

use super::{EngineLoader, LoadRequest, StepEngine};

/// Loads peft-core's engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeftEngines;

impl EngineLoader for PeftEngines {
    fn load(&self, _: LoadRequest<'_>, _: &mut dyn FnMut(f64)) -> Result<Box<dyn StepEngine>, Error> {
        Err(Error::NoCudaEngine { device: "none".to_owned() })
    }
}
