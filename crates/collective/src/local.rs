//! A generation whose members are threads of one process.

use std::time::Duration;

use crate::{AbortHandle, Collective, HopHook, Result};

/// One member of a generation inside this process.
pub struct LocalCollective {}

/// Makes the members of a generation, by rank.
pub fn group(world_size: u32) -> Vec<LocalCollective> {
    let _ = world_size;
    unimplemented!()
}

impl Collective for LocalCollective {
    fn rank(&self) -> u32 {
        unimplemented!()
    }
    fn world_size(&self) -> u32 {
        unimplemented!()
    }
    fn all_reduce_f32(&mut self, _: &[f32], _: &mut [f32]) -> Result<()> {
        unimplemented!()
    }
    fn all_reduce_u64(&mut self, _: &mut [u64]) -> Result<()> {
        unimplemented!()
    }
    fn all_gather(&mut self, _: &[u8], _: &mut [u8]) -> Result<()> {
        unimplemented!()
    }
    fn broadcast(&mut self, _: u32, _: &mut [u8]) -> Result<()> {
        unimplemented!()
    }
    fn abort_handle(&self) -> AbortHandle {
        unimplemented!()
    }
    fn set_hop_hook(&mut self, _: Option<HopHook>) {
        unimplemented!()
    }
    fn set_call_deadline(&mut self, _: Option<Duration>) {
        unimplemented!()
    }
}
