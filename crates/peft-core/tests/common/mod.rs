//! Reference numbers, read with the safetensors crate alone: independent of the code under test.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{SafeTensors, tensor::Dtype};

/// A file or folder below the reference numbers.
pub fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/reference").join(path)
}

/// `case.json` of a case.
pub fn case(path: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(reference(path).join("case.json")).unwrap()).unwrap()
}

/// A tensor of a reference file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => self
                .bytes
                .chunks(2)
                .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            other => panic!("{other:?} is no float"),
        }
    }

    pub fn i64(&self) -> Vec<i64> {
        assert_eq!(self.dtype, Dtype::I64);
        self.bytes.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

/// All tensors of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, Stored> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let stored =
                Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
            (name.to_owned(), stored)
        })
        .collect()
}

/// Expected tensors of a case.
pub fn expected(path: &str) -> BTreeMap<String, Stored> {
    tensors(&reference(path).join("expected.safetensors"))
}

/// Asserts equal bits; tells 0 from -0.
pub fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.to_bits(), expected.to_bits(), "{what}[{index}]: {found} instead of {expected}");
    }
}

/// max |found - expected| / max |expected|.
pub fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(f64::from(value.abs())));
    let error = found.iter().zip(expected).fold(0.0_f64, |error, (found, expected)| {
        error.max((f64::from(*found) - f64::from(*expected)).abs())
    });
    error / largest
}

/// Copies a folder of files.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
