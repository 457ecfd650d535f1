//! The frozen base on the card: a layer in one allocation, found again by where it lies on the host or by what is held.

use std::{collections::HashMap, sync::Arc};

use half::bf16;

use super::{
    DeviceError, Precision,
    device::Device,
    memory::{DeviceMemory, Numbers, Region, Registered, Source, padded},
};
use crate::{
    error::Result,
    model::{BaseSource, EmbeddingView, LayerWeights, Matrix},
    quant::{Nf4View, nf4::Scales},
};

/// An NF4 matrix as kernels take it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Nf4Argument {
    pub(super) codes: u64,
    /// 0 without double quantisation.
    pub(super) scales: u64,
    /// Scales of scales; the scales themselves without double quantisation.
    pub(super) nested: u64,
    /// 0 without double quantisation.
    pub(super) map: u64,
    pub(super) offset: f32,
    pub(super) block_shift: u32,
    pub(super) numbers: u64,
}

/// An NF4 matrix on the card.
pub(super) struct PackedWeight {
    pub(super) _memory: Vec<DeviceMemory>,
    pub(super) argument: Nf4Argument,
}

/// An embedding or head.
pub(super) enum Table {
    /// On the card.
    Near(DeviceMemory),
    /// In host memory, which the card reads through the bus.
    Far(Registered),
}

impl Table {
    /// Where the card reads it, and what it holds.
    pub(super) fn place(&self) -> (u64, Numbers) {
        match self {
            Self::Near(memory) => (memory.address, memory.numbers),
            Self::Far(registered) => (registered.address, registered.numbers),
        }
    }
}

/// What of a base lies on the card, by the host address of its first number or by [`HeldView::place`].
///
/// [`HeldView::place`]: crate::model::HeldView
#[derive(Default)]
pub(super) struct DeviceBase {
    pub(super) packed: HashMap<usize, PackedWeight>,
    pub(super) dense: HashMap<usize, DeviceMemory>,
    pub(super) vectors: HashMap<usize, DeviceMemory>,
    pub(super) tables: HashMap<usize, Table>,
    /// What bytes of scales stand for: nearly always one map for all matrices.
    maps: Vec<([f32; 256], DeviceMemory)>,
}

pub(super) fn key<T>(data: &[T]) -> usize {
    data.as_ptr() as usize
}

/// One allocation that parts of a base are cut from.
pub(super) struct Shelf {
    device: Arc<Device>,
    source: Source,
}

impl Shelf {
    /// Room for parts of these sizes, bytes.
    pub(super) fn new(
        device: &Arc<Device>,
        sizes: impl IntoIterator<Item = usize>,
    ) -> Result<Self, DeviceError> {
        let region = Region::new(device, sizes.into_iter().map(padded).sum())?;
        Ok(Self { device: Arc::clone(device), source: Source::Placing(region, 0) })
    }

    /// The next part.
    pub(super) fn take(&mut self, bytes: usize, numbers: Numbers) -> Result<DeviceMemory, DeviceError> {
        self.source.take(&self.device, bytes, numbers)
    }

    /// The next part, a copy of `data`.
    pub(super) fn put<T: bytemuck::Pod>(
        &mut self,
        data: &[T],
        numbers: Numbers,
    ) -> Result<DeviceMemory, DeviceError> {
        let memory = self.take(size_of_val(data), numbers)?;
        self.device.upload(data, memory.address);
        Ok(memory)
    }
}

/// What a matrix that is not quantised is kept as.
pub(super) fn dense_numbers(device: &Device) -> Numbers {
    if device.precision == Precision::Bf16 { Numbers::Bf16 } else { Numbers::F32 }
}

impl DeviceBase {
    /// Uploads a whole base, the embedding only where it is not to stay on the host. The base must stay where it is on the
    /// host for as long as the result is used.
    pub(super) fn upload<S: BaseSource + ?Sized>(
        device: &Arc<Device>,
        base: &mut S,
        embedding_stays: bool,
    ) -> Result<Self> {
        let mut this = Self::default();
        for layer in 0..base.config().layers {
            this.layer(device, &base.layer(layer)?)?;
        }
        let norm = base.final_norm();
        let mut shelf = Shelf::new(device, [size_of_val(norm)])?;
        this.vector(&mut shelf, norm)?;
        this.table(device, &base.head(), false)?;
        this.table(device, &base.embedding(), embedding_stays)?;
        device.settle()?;
        Ok(this)
    }

    fn layer(&mut self, device: &Arc<Device>, weights: &LayerWeights<'_>) -> Result<(), DeviceError> {
        let number = dense_numbers(device).bytes();
        let mut sizes: Vec<usize> = weights.norms().map(size_of_val).collect();
        for linear in weights.linears.iter().flatten() {
            sizes.extend(linear.bias.map(size_of_val));
            match &linear.weight {
                Matrix::Dense(view) => sizes.push(number * view.data().len()),
                Matrix::Nf4(view) => sizes.extend(parts(view)),
                Matrix::Held(_) | Matrix::Pieces(_) => return Err(held_elsewhere()),
            }
        }
        let mut shelf = Shelf::new(device, sizes)?;
        for norm in weights.norms() {
            self.vector(&mut shelf, norm)?;
        }
        for linear in weights.linears.iter().flatten() {
            match &linear.weight {
                Matrix::Dense(view) => self.matrix(&mut shelf, view.data())?,
                Matrix::Nf4(view) => self.pack(&mut shelf, view)?,
                Matrix::Held(_) | Matrix::Pieces(_) => return Err(held_elsewhere()),
            }
            if let Some(bias) = linear.bias {
                self.vector(&mut shelf, bias)?;
            }
        }
        Ok(())
    }

    pub(super) fn vector(&mut self, shelf: &mut Shelf, data: &[f32]) -> Result<(), DeviceError> {
        self.vectors.insert(key(data), shelf.put(data, Numbers::F32)?);
        Ok(())
    }

    /// A dense matrix; rounded once to bf16 where products round it anyway.
    fn matrix(&mut self, shelf: &mut Shelf, data: &[f32]) -> Result<(), DeviceError> {
        let memory = match dense_numbers(&shelf.device) {
            Numbers::Bf16 => {
                let narrow: Vec<bf16> = data.iter().copied().map(bf16::from_f32).collect();
                shelf.put(&narrow, Numbers::Bf16)?
            }
            Numbers::F32 => shelf.put(data, Numbers::F32)?,
        };
        self.dense.insert(key(data), memory);
        Ok(())
    }

    fn table(
        &mut self,
        device: &Arc<Device>,
        table: &EmbeddingView<'_>,
        far: bool,
    ) -> Result<(), DeviceError> {
        let key = table_key(table);
        if self.tables.contains_key(&key) {
            return Ok(());
        }
        fn place<T: bytemuck::Pod>(
            device: &Arc<Device>,
            data: &[T],
            numbers: Numbers,
            far: bool,
        ) -> Result<Table, DeviceError> {
            Ok(match far {
                true => Table::Far(Registered::new(device, bytemuck::cast_slice(data), numbers)?),
                false => Table::Near(Shelf::new(device, [size_of_val(data)])?.put(data, numbers)?),
            })
        }
        let placed = match (table.as_f32(), table.as_bf16()) {
            (Some(data), _) => place(device, data, Numbers::F32, far)?,
            (_, Some(data)) => place(device, data, Numbers::Bf16, far)?,
            (None, None) => return Err(held_elsewhere()),
        };
        self.tables.insert(key, placed);
        Ok(())
    }

    fn pack(&mut self, shelf: &mut Shelf, view: &Nf4View<'_>) -> Result<(), DeviceError> {
        let codes = shelf.put(view.codes(), Numbers::F32)?;
        let mut argument = Nf4Argument {
            codes: codes.address,
            scales: 0,
            nested: 0,
            map: 0,
            offset: 0.0,
            block_shift: view.block_size().trailing_zeros(),
            numbers: (view.rows() * view.columns()) as u64,
        };
        let mut memory = vec![codes];
        let mut put = |data: DeviceMemory| {
            let address = data.address;
            memory.push(data);
            address
        };
        match view.scales() {
            Scales::Plain(scales) => argument.nested = put(shelf.put(scales, Numbers::F32)?),
            Scales::Double { codes, nested, offset, map } => {
                argument.scales = put(shelf.put(codes, Numbers::F32)?);
                argument.nested = put(shelf.put(nested, Numbers::F32)?);
                argument.map = self.map(&shelf.device, map)?;
                argument.offset = offset;
            }
        }
        self.packed.insert(key(view.codes()), PackedWeight { _memory: memory, argument });
        Ok(())
    }

    /// Where a map of double quantisation lies on the card.
    pub(super) fn map(&mut self, device: &Arc<Device>, map: &[f32; 256]) -> Result<u64, DeviceError> {
        if let Some((_, memory)) = self.maps.iter().find(|(known, _)| known == map) {
            return Ok(memory.address);
        }
        let memory = Shelf::new(device, [size_of_val(map)])?.put(map, Numbers::F32)?;
        let address = memory.address;
        self.maps.push((*map, memory));
        Ok(address)
    }
}

/// Bytes of a matrix's codes and scales.
fn parts(view: &Nf4View<'_>) -> Vec<usize> {
    let mut parts = vec![view.codes().len()];
    match view.scales() {
        Scales::Plain(scales) => parts.push(size_of_val(scales)),
        Scales::Double { codes, nested, .. } => parts.extend([codes.len(), size_of_val(nested)]),
    }
    parts
}

fn held_elsewhere() -> DeviceError {
    DeviceError::Unsupported { what: "a base that lies on another device".to_owned() }
}

/// By what a matrix is found again.
pub(super) fn matrix_key(matrix: &Matrix<'_>) -> usize {
    match matrix {
        Matrix::Dense(view) => key(view.data()),
        Matrix::Nf4(view) => key(view.codes()),
        Matrix::Held(view) => view.place(),
        Matrix::Pieces(view) => view.place(),
    }
}

pub(super) fn table_key(table: &EmbeddingView<'_>) -> usize {
    table.place().0
}
