//! What every implementation checks before it starts: the caller's own arguments.

use crate::error::{Error, Result};

pub(crate) fn same_length(input: &[f32], output: &[f32]) -> Result<()> {
    if input.len() == output.len() {
        return Ok(());
    }
    let reason = format!("input has {} elements, output has {}", input.len(), output.len());
    Err(Error::Argument { operation: "all_reduce_f32", reason })
}

pub(crate) fn gathered_length(input: &[u8], output: &[u8], world_size: u32) -> Result<()> {
    if input.len().checked_mul(world_size as usize) == Some(output.len()) {
        return Ok(());
    }
    let reason = format!(
        "input has {} bytes at each of {world_size} ranks, output has room for {}",
        input.len(),
        output.len()
    );
    Err(Error::Argument { operation: "all_gather", reason })
}

pub(crate) fn root(root: u32, world_size: u32) -> Result<()> {
    if root < world_size {
        return Ok(());
    }
    let reason = format!("root is rank {root}, the world has {world_size} ranks");
    Err(Error::Argument { operation: "broadcast", reason })
}
