//! Every GPU kernel compiles for every architecture we name, on a machine without a GPU.
//!
//! Needs NVRTC: from the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` and its library's path in `SHANTY_NVRTC`.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use shanty_peft_core::backend::cuda::{
    DeviceError, NVRTC_VARIABLE, Precision,
    compile::{AttentionTiles, Unit},
};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];
/// Shared memory that a block may take on the smallest card of the Ampere generation or later, bytes.
const SMALLEST_SHARED: usize = 99 << 10;

#[test]
fn kernels_compile_for_every_architecture() {
    let mut units = vec![("general".to_owned(), Unit::general())];
    for (head_dim, precision) in [
        (8, Precision::Tf32),
        (64, Precision::F32),
        (64, Precision::Bf16),
        (128, Precision::Tf32),
        (128, Precision::Bf16),
        (256, Precision::Bf16),
    ] {
        let tiles = AttentionTiles::choose(head_dim, 227 << 10, precision).unwrap();
        units.push((format!("attention {head_dim} {precision:?}"), Unit::attention(head_dim, tiles)));
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
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                let tiles = AttentionTiles::choose(head_dim, shared, precision).unwrap();
                assert!(tiles.backward_bytes(head_dim).max(tiles.forward_bytes(head_dim)) <= shared);
            }
        }
    }
}
