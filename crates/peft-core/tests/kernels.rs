//! Every GPU kernel compiles for every architecture we name, on a machine without a GPU.
//!
//! Needs NVRTC: from the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` and its library's path in `SHANTY_NVRTC`.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]
#![allow(clippy::print_stderr, reason = "a test that is skipped says so")]

use shanty_peft_core::backend::cuda::{
    DeviceError, NVRTC_VARIABLE, Precision,
    compile::{AttentionTiles, HopperTiles, Unit},
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

/// Heads that attention has kernels for on Hopper, without a soft cap and with one.
fn hopper_tiles() -> impl Iterator<Item = HopperTiles> {
    let all = [64, 96, 128, 256].into_iter().flat_map(|head_dim| [(head_dim, false), (head_dim, true)]);
    all.map(|(head_dim, soft_cap)| HopperTiles::choose(head_dim, soft_cap).unwrap())
}

/// A spilled register of the loops that attention spends its time in costs a trip to memory each time; products that
/// the compiler puts one after the other, where the source lets them run beside other work, cost a third of the speed.
#[test]
fn attention_on_hopper_spills_nothing_and_its_products_overlap() {
    for tiles in hopper_tiles() {
        for unit in [Unit::attention_hopper_forward(tiles), Unit::attention_hopper_backward(tiles)] {
            let report = match unit.report("sm_90a") {
                Ok(report) => report,
                Err(DeviceError::NoLibrary { .. }) if std::env::var_os(NVRTC_VARIABLE).is_none() => {
                    eprintln!("SKIPPED: no libnvrtc here; set {NVRTC_VARIABLE} to one");
                    return;
                }
                Err(error) => panic!("{tiles:?}: {error}"),
            };
            assert!(!report.contains("serialized"), "{tiles:?}: {report}");
            let spills: Vec<&str> = report.lines().filter(|line| line.contains("spill stores")).collect();
            assert!(!spills.is_empty(), "{tiles:?}: no kernel is reported: {report}");
            for line in spills {
                assert!(line.contains(" 0 bytes spill stores"), "{tiles:?}: {line}");
            }
        }
    }
}

const HOT: [&str; 10] = [
    "nf4_bf16",
    "nf4_merged",
    "swiglu_bf16",
    "swiglu_backward_bf16",
    "rms_norm_bf16",
    "rms_norm_backward_bf16",
    "rope_bf16",
    "cross_entropy_bf16",
    "adamw",
    "copy_bf16_bf16",
];

/// What is not hot is not asked.
#[test]
fn hot_kernels_spill_nothing() {
    for architecture in ARCHITECTURES {
        let report = match Unit::general().report(architecture) {
            Ok(report) => report,
            Err(DeviceError::NoLibrary { .. }) if std::env::var_os(NVRTC_VARIABLE).is_none() => {
                eprintln!("SKIPPED: no libnvrtc here; set {NVRTC_VARIABLE} to one");
                return;
            }
            Err(error) => panic!("{architecture}: {error}"),
        };
        let lines: Vec<&str> = report.lines().collect();
        for kernel in HOT {
            let named = format!("'{kernel}'");
            let at = lines.iter().position(|line| line.contains(&named));
            let at = at.unwrap_or_else(|| panic!("{architecture}: no report of {kernel}: {report}"));
            let spills = lines[at..].iter().find(|line| line.contains("spill stores")).unwrap();
            assert!(spills.contains(" 0 bytes spill stores"), "{architecture}, {kernel}: {spills}");
        }
    }
}

#[test]
fn attention_on_hopper_fits_its_shared_memory() {
    for tiles in hopper_tiles() {
        let bytes = [tiles.forward_bytes(), tiles.keys_bytes(), tiles.queries_bytes()];
        assert!(bytes.into_iter().all(|bytes| bytes <= 227 << 10), "{tiles:?}: {bytes:?}");
    }
}
