//! NF4 against bitsandbytes' own numbers.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use common::{assert_bits, case, expected, reference, tensors};
use half::bf16;
use proptest::prelude::*;
use shanty_peft_core::quant::{
    double::{self, DYNAMIC_MAP},
    nf4::{self, CODE_BOOK, Nf4View, Scales},
};

const CASES: [&str; 7] = [
    "nf4/bf16_260x72",
    "nf4/bf16_48x80",
    "nf4/bf16_64x72_traps",
    "nf4/f32_40x40_block128",
    "nf4/f32_64x64",
    "nf4/f32_7x33",
    "nf4/f32_96x64_traps",
];

struct Case {
    name: &'static str,
    rows: usize,
    columns: usize,
    block_size: usize,
    tensors: std::collections::BTreeMap<String, common::Stored>,
}

fn cases() -> impl Iterator<Item = Case> {
    CASES.iter().map(|name| {
        let json = case(name);
        let size = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
        Case {
            name,
            rows: size(&json["shape"][0]),
            columns: size(&json["shape"][1]),
            block_size: size(&json["blocksize"]),
            tensors: expected(name),
        }
    })
}

fn to_bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect()
}

#[test]
fn every_reference_case_is_covered() {
    let folders = std::fs::read_dir(reference("nf4")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut found: Vec<_> = folders.map(|name| format!("nf4/{}", name.to_string_lossy())).collect();
    found.retain(|name| !name.contains("checkpoint"));
    found.sort();
    assert_eq!(found, CASES);
}

#[test]
fn codes_and_scales_equal_bitsandbytes() {
    for case in cases() {
        let weight = case.tensors["weight"].f32();
        let mut codes = vec![0; nf4::code_bytes(weight.len())];
        let mut scales = vec![0.0; nf4::blocks(weight.len(), case.block_size)];
        assert!(nf4::quantise(&weight, case.block_size, &mut codes, &mut scales));
        assert_bits(&scales, &case.tensors["absmax"].f32(), case.name);
        assert_eq!(codes, case.tensors["codes"].bytes, "{}", case.name);
        assert_bits(&CODE_BOOK, &case.tensors["quant_map"].f32(), case.name);
    }
}

#[test]
fn dequantised_numbers_equal_bitsandbytes() {
    for case in cases() {
        let scales = case.tensors["absmax"].f32();
        let codes = &case.tensors["codes"].bytes;
        let view = Nf4View::new(case.rows, case.columns, case.block_size, codes, Scales::Plain(&scales));
        let mut out = vec![f32::NAN; case.rows * case.columns];
        view.write_f32(0, &mut out);
        assert_bits(&out, &case.tensors["dequantised_f32"].f32(), case.name);
        assert_bits(&to_bf16(&out), &case.tensors["dequantised_bf16"].f32(), case.name);
    }
}

#[test]
fn doubly_quantised_numbers_equal_bitsandbytes() {
    for case in cases() {
        let tensor = |name: &str| case.tensors[&format!("double.{name}")].f32();
        assert_bits(&DYNAMIC_MAP, &tensor("nested_quant_map"), case.name);
        let nested = tensor("nested_absmax");
        let scales = Scales::Double {
            codes: &case.tensors["double.absmax"].bytes,
            nested: &nested,
            offset: tensor("nested_offset")[0],
            map: &DYNAMIC_MAP,
        };
        let restored: Vec<_> = (0..scales.len()).map(|block| scales.get(block)).collect();
        assert_bits(&restored, &tensor("absmax_restored_f32"), case.name);
        let codes = &case.tensors["codes"].bytes;
        let view = Nf4View::new(case.rows, case.columns, case.block_size, codes, scales);
        let mut out = vec![f32::NAN; case.rows * case.columns];
        view.write_f32(0, &mut out);
        assert_bits(&out, &tensor("dequantised_f32"), case.name);
        assert_bits(&to_bf16(&out), &tensor("dequantised_bf16"), case.name);
    }
}

/// The case files allow 2 units in the last place of the offset (its sum has no fixed order) and, next to a
/// midpoint, a byte that differs by 1.
#[test]
fn double_quantisation_stays_within_what_the_cases_state() {
    let (mut bytes, mut differing) = (0, 0);
    for case in cases() {
        let quantised = double::quantise(&case.tensors["absmax"].f32());
        let offset = case.tensors["double.nested_offset"].f32()[0];
        assert!(quantised.offset.to_bits().abs_diff(offset.to_bits()) <= 2, "{}", case.name);
        let nested = case.tensors["double.nested_absmax"].f32();
        assert!(common::relative(&quantised.nested, &nested) < 1e-6, "{}", case.name);
        let expected = &case.tensors["double.absmax"].bytes;
        assert_eq!(quantised.codes.len(), expected.len());
        for (found, expected) in quantised.codes.iter().zip(expected) {
            assert!(found.abs_diff(*expected) <= 1, "{}: {found} instead of {expected}", case.name);
            differing += usize::from(found != expected);
        }
        bytes += expected.len();
    }
    assert!(differing * 100 <= bytes, "{differing} of {bytes} bytes differ: not rare");
}

#[test]
fn a_number_that_is_none_is_noticed() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.5; 200];
        values[130] = bad;
        let (mut codes, mut scales) = (vec![0; 100], vec![0.0; 4]);
        assert!(!nf4::quantise(&values, 64, &mut codes, &mut scales), "{bad}");
    }
}

#[test]
fn stored_checkpoints_hold_our_map() {
    let model = tensors(&reference("training/base_nf4/model.safetensors"));
    let maps: Vec<_> = model.iter().filter(|(name, _)| name.ends_with("nested_quant_map")).collect();
    assert_eq!(maps.len(), 14);
    for (name, map) in maps {
        assert_bits(&map.f32(), &DYNAMIC_MAP, name);
    }
}

/// A weight as plain as can be: one number after the other.
fn plain_quantise(values: &[f32], block_size: usize) -> (Vec<u8>, Vec<f32>) {
    let mut scales = Vec::new();
    let mut nibbles = Vec::new();
    for block in values.chunks(block_size) {
        let scale = block.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        for value in block {
            let scaled = if scale == 0.0 { 0.0 } else { value * (1.0 / scale) };
            nibbles.push(nf4::MIDPOINTS.iter().filter(|midpoint| scaled > **midpoint).count() as u8);
        }
        scales.push(scale);
    }
    nibbles.resize(nibbles.len().next_multiple_of(2), 7);
    (nibbles.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(), scales)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn parallel_quantisation_equals_the_plain_one(
        values in prop::collection::vec(prop_oneof![Just(0.0), -2.0_f32..2.0, -1e-30_f32..1e-30], 1..3000),
        block in 5_u32..13,
    ) {
        let block_size = 1 << block;
        let mut codes = vec![0; nf4::code_bytes(values.len())];
        let mut scales = vec![0.0; nf4::blocks(values.len(), block_size)];
        prop_assert!(nf4::quantise(&values, block_size, &mut codes, &mut scales));
        let (plain_codes, plain_scales) = plain_quantise(&values, block_size);
        prop_assert_eq!(codes, plain_codes);
        prop_assert_eq!(scales, plain_scales);
    }

    /// Any stretch of the matrix is the same stretch of the whole.
    #[test]
    fn a_stretch_equals_its_part_of_the_whole(
        rows in 1_usize..40, columns in 1_usize..900, start in 0.0_f64..1.0, length in 0.0_f64..1.0, seed in any::<u32>(),
    ) {
        let numbers = rows * columns;
        let codes: Vec<u8> = (0..nf4::code_bytes(numbers) as u32).map(|i| (i ^ seed).wrapping_mul(0x9E37_79B9) as u8).collect();
        let scales: Vec<f32> = (0..nf4::blocks(numbers, 64)).map(|i| 0.5 + i as f32).collect();
        let view = Nf4View::new(rows, columns, 64, &codes, Scales::Plain(&scales));
        let mut whole = vec![f32::NAN; numbers];
        view.write_f32(0, &mut whole);
        for (index, value) in whole.iter().enumerate() {
            let nibble = if index % 2 == 0 { codes[index / 2] >> 4 } else { codes[index / 2] & 15 };
            prop_assert_eq!(*value, CODE_BOOK[usize::from(nibble)] * scales[index / 64]);
        }
        let start = (start * numbers as f64) as usize;
        let length = (length * (numbers - start) as f64) as usize;
        let mut part = vec![f32::NAN; length];
        view.write_f32(start, &mut part);
        prop_assert_eq!(&part[..], &whole[start..start + length]);
    }

    /// Every number comes back within half of the widest gap of the code book (0.1520) of its block's scale.
    #[test]
    fn quantised_numbers_come_back_near(values in prop::collection::vec(-3.0_f32..3.0, 1..1000)) {
        let mut codes = vec![0; nf4::code_bytes(values.len())];
        let mut scales = vec![0.0; nf4::blocks(values.len(), 64)];
        prop_assert!(nf4::quantise(&values, 64, &mut codes, &mut scales));
        let view = Nf4View::new(1, values.len(), 64, &codes, Scales::Plain(&scales));
        let mut out = vec![0.0; values.len()];
        view.write_f32(0, &mut out);
        for (index, (out, value)) in out.iter().zip(&values).enumerate() {
            prop_assert!((out - value).abs() <= 0.1520 * scales[index / 64]);
        }
    }
}
