//! Every GPU kernel compiles for every architecture we name, on a machine without a GPU.
//!
//! Needs NVRTC: from the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` and its library's path in `SHANTY_NVRTC`.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use shanty_peft_core::backend::cuda::{
    DeviceError, NVRTC_VARIABLE,
    compile::{AttentionTiles, Unit},
};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];
/// Shared memory that a block may take on the smallest card of the Ampere generation or later, bytes.
const SMALLEST_SHARED: usize = 99 << 10;

#[test]
fn kernels_compile_for_every_architecture() {
    let mut units = vec![("general".to_owned(), Unit::general())];
    for head_dim in [8, 64, 128, 256] {
        let tiles = AttentionTiles::choose(head_dim, 227 << 10).unwrap();
        for exact in if head_dim == 64 { vec![false, true] } else { vec![false] } {
            units.push((
                format!("attention {head_dim}, exact {exact}"),
                Unit::attention(head_dim, tiles, exact),
            ));
        }
    }
    for architecture in ARCHITECTURES {
        for (name, unit) in &units {
            match unit.compile(architecture) {
                Ok(code) => {
                    assert!(code.starts_with(b"\x7fELF"), "{name} for {architecture} is no machine code")
                }
                Err(DeviceError::NoLibrary { .. }) if std::env::var_os(NVRTC_VARIABLE).is_none() => {
                    eprintln!("SKIPPED: no libnvrtc here; set {NVRTC_VARIABLE} to one");
                    return;
                }
                Err(error) => panic!("{name} for {architecture}: {error}"),
            }
        }
    }
}

#[test]
fn attention_fits_the_shared_memory_of_every_card_it_is_compiled_for() {
    for head_dim in (8..=256).step_by(8) {
        for shared in [SMALLEST_SHARED, 163 << 10, 227 << 10] {
            let tiles = AttentionTiles::choose(head_dim, shared).unwrap();
            assert!(tiles.backward_bytes(head_dim).max(tiles.forward_bytes(head_dim)) <= shared);
        }
    }
}
