//! The layout of checkpoints that bitsandbytes pre-quantised.
//!
//! For a weight `W` of shape `[out, in]` the file holds: `W`, the codes, U8 `[n / 2, 1]` (or the same bytes under
//! another dtype); `W.absmax`, F32, or U8 with double quantisation; `W.quant_map`, F32 `[16]`;
//! `W.nested_absmax` and `W.nested_quant_map`, F32, with double quantisation; and
//! `W.quant_state.bitsandbytes__nf4`, U8: JSON as Python writes it.

use std::ops::Range;

use safetensors::tensor::Dtype;
use serde::Deserialize;

use crate::{
    error::{Error, Result},
    model::weights::{ModelFiles, Tensor},
    quant::{
        Nf4Options,
        double::NESTED_BLOCK,
        nf4::{self, CODE_BOOK, Nf4View, Scales},
        packed::{PackedLayer, PackedParts, PackedShape, ScalesMut},
    },
};

const STATE: &str = "quant_state.bitsandbytes__";

/// What the JSON beside the codes says.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// A pre-quantised weight, checked, its bytes still in the file.
#[derive(Debug)]
pub struct StoredWeight<'a> {
    weight: Tensor<'a>,
    scales: Tensor<'a>,
    double: Option<StoredDouble<'a>>,
    shape: PackedShape,
    /// dtype that the weight had, as torch names it.
    dtype: String,
    /// JSON and code book, as they are: a base's hash covers them.
    extras: Vec<Tensor<'a>>,
}

#[derive(Debug)]
struct StoredDouble<'a> {
    nested: Tensor<'a>,
    map: Tensor<'a>,
    offset: f32,
}

/// Whether the folder holds `weight` pre-quantised, in whatever type.
pub fn is_stored(files: &ModelFiles, weight: &str) -> bool {
    ["nf4", "fp4"].iter().any(|kind| files.find(&format!("{weight}.{STATE}{kind}")).is_some())
}

impl<'a> StoredWeight<'a> {
    /// Finds and checks all parts of a pre-quantised weight that should be of `shape`.
    ///
    /// # Errors
    /// A part is missing, of the wrong shape or dtype, or not NF4 as this crate knows it.
    pub fn open(files: &'a ModelFiles, weight: &str, shape: [usize; 2]) -> Result<Self> {
        let part = |suffix: &str| files.tensor(&format!("{weight}.{suffix}"));
        if let Some(other) = files.find(&format!("{weight}.{STATE}fp4")) {
            return Err(problem(&other, "is of type fp4; only nf4 is supported"));
        }
        let json = part(&format!("{STATE}nf4"))?;
        let state = read_state(&json)?;
        let options = Nf4Options { block_size: state.blocksize, double: state.nested_blocksize.is_some() };
        if state.quant_type != "nf4" {
            return Err(problem(&json, format!("is of type {}; only nf4 is supported", state.quant_type)));
        }
        if !nf4::is_block_size(options.block_size) {
            return Err(problem(&json, format!("has block size {}", options.block_size)));
        }
        let weight = files.tensor(weight)?;
        if state.shape != shape {
            return Err(Error::WrongShape {
                origin: crate::error::Origin::Base,
                file: weight.file().to_owned(),
                tensor: weight.name().to_owned(),
                found: state.shape,
                expected: shape.to_vec(),
            });
        }
        let shape = PackedShape { rows: shape[0], columns: shape[1], options };
        let numbers = shape.rows * shape.columns;
        if weight.bytes() != nf4::code_bytes(numbers) {
            return Err(problem(&weight, format!("holds {} bytes for {numbers} numbers", weight.bytes())));
        }
        let code_book = part("quant_map")?;
        if read_table::<16>(&code_book)? != CODE_BOOK {
            return Err(problem(&code_book, "is another code book than NormalFloat's"));
        }
        let blocks = nf4::blocks(numbers, options.block_size);
        let scales = part("absmax")?;
        scales.expect_shape(&[blocks])?;
        let double = match options.double {
            false => {
                scales.expect_dtype(&[Dtype::F32], "F32")?;
                None
            }
            true => {
                scales.expect_dtype(&[Dtype::U8], "U8")?;
                Some(StoredDouble::open(
                    &json,
                    &state,
                    part("nested_absmax")?,
                    part("nested_quant_map")?,
                    blocks,
                )?)
            }
        };
        Ok(Self { weight, scales, double, shape, dtype: state.dtype, extras: vec![json, code_book] })
    }

    /// What it takes in a [`PackedLayer`].
    pub fn shape(&self) -> PackedShape {
        self.shape
    }

    /// dtype that the weight had, as torch names it: `bfloat16`.
    pub fn dtype(&self) -> &str {
        &self.dtype
    }

    /// Bytes of all its parts in the file.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|tensor| tensor.bytes()).sum()
    }

    /// All its parts.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'a>> {
        let nested = self.double.iter().flat_map(|double| [double.nested, double.map]);
        [self.weight, self.scales].into_iter().chain(nested).chain(self.extras.iter().copied())
    }

    /// Reads the bytes into matrix `index` of `layer`, which was made for [`Self::shape`].
    ///
    /// `witness` sees each part's bytes under its name.
    ///
    /// # Errors
    /// Unreadable, or a scale is infinite or not a number.
    pub fn read_into(
        &self,
        layer: &mut PackedLayer,
        index: usize,
        witness: &mut dyn FnMut(&Tensor<'_>, &[u8]),
    ) -> Result<()> {
        let parts = layer.parts_mut(index);
        self.weight.read_bytes(parts.codes, &mut |bytes| witness(&self.weight, bytes))?;
        match (parts.scales, &self.double) {
            (ScalesMut::Plain(scales), _) => {
                self.scales.read_f32(scales, &mut |bytes| witness(&self.scales, bytes))?;
            }
            (ScalesMut::Double { codes, nested }, double) => {
                self.scales.read_bytes(codes, &mut |bytes| witness(&self.scales, bytes))?;
                if let Some(double) = double {
                    double.nested.read_f32(nested, &mut |bytes| witness(&double.nested, bytes))?;
                    let mut map = [0.0; 256];
                    double.map.read_f32(&mut map, &mut |bytes| witness(&double.map, bytes))?;
                    layer.set_double(index, double.offset, &map);
                }
            }
        }
        self.read_extras(witness)
    }

    /// Reads what is the same whatever part of the weight is wanted.
    fn read_extras(&self, witness: &mut dyn FnMut(&Tensor<'_>, &[u8])) -> Result<()> {
        for extra in &self.extras {
            let mut bytes = vec![0; extra.bytes()];
            extra.read_bytes(&mut bytes, &mut |bytes| witness(extra, bytes))?;
        }
        Ok(())
    }

    /// Reads what every holder of a part of the weight needs: with double quantisation, the mean of its scales and their map.
    /// `witness` sees what is read.
    ///
    /// # Errors
    /// Unreadable, or the map is damaged.
    pub fn read_common(
        &self,
        witness: &mut dyn FnMut(&Tensor<'_>, &[u8]),
    ) -> Result<Option<(f32, [f32; 256])>> {
        self.read_extras(witness)?;
        let Some(double) = &self.double else { return Ok(None) };
        let mut map = [0.0; 256];
        double.map.read_f32(&mut map, &mut |bytes| witness(&double.map, bytes))?;
        Ok(Some((double.offset, map)))
    }

    /// Reads the codes and scales of `numbers` alone, which begin at a unit of a [`super::Cut`]. `witness` hears where in its tensor
    /// what it sees lies.
    ///
    /// # Errors
    /// Unreadable, or a scale is infinite or not a number.
    pub fn read_part(
        &self,
        numbers: Range<usize>,
        parts: PackedParts<'_>,
        witness: &mut dyn FnMut(&Tensor<'_>, usize, &[u8]),
    ) -> Result<()> {
        let first = numbers.start / self.shape.options.block_size;
        let codes = numbers.start / 2..numbers.start / 2 + parts.codes.len();
        self.weight.read_bytes_of(codes, parts.codes, &mut |at, bytes| witness(&self.weight, at, bytes))?;
        let mut floats = |tensor: &Tensor<'_>, first: usize, out: &mut [f32]| {
            let mut done = 0;
            tensor.pieces_f32_of(
                first..first + out.len(),
                &mut |at, bytes| witness(tensor, at, bytes),
                |piece| {
                    out[done..done + piece.len()].copy_from_slice(piece);
                    done += piece.len();
                },
            )
        };
        match (parts.scales, &self.double) {
            (ScalesMut::Plain(scales), _) => floats(&self.scales, first, scales),
            (ScalesMut::Double { codes, nested }, Some(double)) => {
                floats(&double.nested, first / NESTED_BLOCK, nested)?;
                let range = first..first + codes.len();
                self.scales.read_bytes_of(range, codes, &mut |at, bytes| witness(&self.scales, at, bytes))
            }
            (ScalesMut::Double { .. }, None) => Ok(()),
        }
    }
}

impl<'a> StoredDouble<'a> {
    fn open(
        json: &Tensor<'a>,
        state: &State,
        nested: Tensor<'a>,
        map: Tensor<'a>,
        blocks: usize,
    ) -> Result<Self> {
        if state.nested_blocksize != Some(NESTED_BLOCK) {
            return Err(problem(json, format!("has nested blocks of {:?}, not 256", state.nested_blocksize)));
        }
        if let Some(dtype) = &state.nested_dtype
            && dtype != "float32"
        {
            return Err(problem(json, format!("has nested scales of {dtype}, not float32")));
        }
        let offset = state.nested_offset.ok_or_else(|| problem(json, "has no nested_offset"))? as f32;
        if !offset.is_finite() {
            return Err(problem(json, "has a nested_offset beyond f32"));
        }
        nested.expect_shape(&[blocks.div_ceil(NESTED_BLOCK)])?;
        nested.expect_dtype(&[Dtype::F32], "F32")?;
        map.expect_shape(&[256])?;
        map.expect_dtype(&[Dtype::F32], "F32")?;
        Ok(Self { nested, map, offset })
    }
}

fn problem(tensor: &Tensor<'_>, problem: impl ToString) -> Error {
    Error::QuantState {
        file: tensor.file().to_owned(),
        tensor: tensor.name().to_owned(),
        problem: problem.to_string(),
    }
}

fn read_state(json: &Tensor<'_>) -> Result<State> {
    // A state is a line of JSON; whatever is longer is none.
    const LONGEST: usize = 1 << 16;
    json.expect_dtype(&[Dtype::U8], "U8")?;
    if json.bytes() > LONGEST {
        return Err(problem(json, format!("is {} bytes long", json.bytes())));
    }
    let mut bytes = vec![0; json.bytes()];
    json.read_bytes(&mut bytes, &mut |_| {})?;
    serde_json::from_slice(&bytes)
        .map_err(|error| problem(json, format!("is not as bitsandbytes writes it: {error}")))
}

fn read_table<const N: usize>(tensor: &Tensor<'_>) -> Result<[f32; N]> {
    tensor.expect_shape(&[N])?;
    tensor.expect_dtype(&[Dtype::F32], "F32")?;
    let mut table = [0.0; N];
    tensor.read_f32(&mut table, &mut |_: &[u8]| {})?;
    Ok(table)
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedTensor {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Little-endian numbers.
    pub bytes: Vec<u8>,
}

impl safetensors::View for &OwnedTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The tensors that bitsandbytes writes for a quantised weight; `dtype` is what it had, as torch names it.
pub fn to_tensors(weight: &str, view: &Nf4View<'_>, dtype: &str) -> Vec<OwnedTensor> {
    let tensor = |suffix: &str, dtype, shape: Vec<usize>, bytes| OwnedTensor {
        name: format!("{weight}{suffix}"),
        dtype,
        shape,
        bytes,
    };
    let floats = |suffix, values: &[f32]| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensor(suffix, Dtype::F32, vec![values.len()], bytes)
    };
    let mut state = format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {}, \"dtype\": \"{dtype}\", \"shape\": [{}, {}]",
        view.block_size(),
        view.rows(),
        view.columns()
    );
    let codes = view.codes();
    let mut tensors =
        vec![tensor("", Dtype::U8, vec![codes.len(), 1], codes.to_vec()), floats(".quant_map", &CODE_BOOK)];
    match view.scales() {
        Scales::Plain(scales) => tensors.push(floats(".absmax", scales)),
        Scales::Double { codes, nested, offset, map } => {
            tensors.push(tensor(".absmax", Dtype::U8, vec![codes.len()], codes.to_vec()));
            tensors.push(floats(".nested_absmax", nested));
            tensors.push(floats(".nested_quant_map", map));
            state.push_str(&format!(
                ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
                python_float(f64::from(offset))
            ));
        }
    }
    state.push('}');
    tensors.push(tensor(&format!(".{STATE}nf4"), Dtype::U8, vec![state.len()], state.into_bytes()));
    tensors
}

/// A finite number as Python's `repr` writes it.
fn python_float(value: f64) -> String {
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    // Rust writes 1.5e-5, Python 1.5e-05.
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    /// Right-hand sides printed by Python 3.12.
    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.0519866943359375, "0.0519866943359375"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (-1e-5, "-1e-05"),
            (1e16, "1e+16"),
            (1.25e-300, "1.25e-300"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }
}
