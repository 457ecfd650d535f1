//! The frozen base on the card: every matrix, vector and table uploaded once, found again by where it lies on the host.

use std::{collections::HashMap, sync::Arc};

use half::bf16;

use super::{
    DeviceError, Precision,
    device::Device,
    memory::{DeviceMemory, Numbers, Registered, Source},
};
use crate::{
    error::Result,
    model::{BaseSource, EmbeddingView, Matrix},
    quant::{Nf4View, nf4::Scales},
};

/// An NF4 matrix as kernels take it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Nf4Argument {
    codes: u64,
    scales: u64,
    nested: u64,
    map: u64,
    offset: f32,
    block_shift: u32,
    pub(super) numbers: u64,
}

/// An NF4 matrix on the card.
pub(super) struct PackedWeight {
    _memory: Vec<DeviceMemory>,
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

/// What of a base lies on the card, by the host address of its first number.
#[derive(Default)]
pub(super) struct DeviceBase {
    pub(super) packed: HashMap<usize, PackedWeight>,
    pub(super) dense: HashMap<usize, DeviceMemory>,
    pub(super) vectors: HashMap<usize, DeviceMemory>,
    pub(super) tables: HashMap<usize, Table>,
}

pub(super) fn key<T>(data: &[T]) -> usize {
    data.as_ptr() as usize
}

fn put<T: bytemuck::Pod>(
    device: &Arc<Device>,
    data: &[T],
    numbers: Numbers,
) -> Result<DeviceMemory, DeviceError> {
    let memory = Source::Single.take(device, size_of_val(data), numbers)?;
    device.upload(data, memory.address);
    Ok(memory)
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
            let weights = base.layer(layer)?;
            for norm in weights.norms() {
                this.vector(device, norm)?;
            }
            for linear in weights.linears.iter().flatten() {
                match &linear.weight {
                    Matrix::Nf4(view) => this.pack(device, view)?,
                    Matrix::Dense(view) => this.matrix(device, view.data())?,
                    Matrix::Pieces(_) => {
                        return Err(DeviceError::Unsupported { what: "a shared base".to_owned() }.into());
                    }
                }
                if let Some(bias) = linear.bias {
                    this.vector(device, bias)?;
                }
            }
        }
        this.vector(device, base.final_norm())?;
        this.table(device, &base.head(), false)?;
        this.table(device, &base.embedding(), embedding_stays)?;
        device.settle()?;
        Ok(this)
    }

    fn vector(&mut self, device: &Arc<Device>, data: &[f32]) -> Result<(), DeviceError> {
        self.vectors.insert(key(data), put(device, data, Numbers::F32)?);
        Ok(())
    }

    /// A dense matrix; rounded once to bf16 where products round it anyway.
    fn matrix(&mut self, device: &Arc<Device>, data: &[f32]) -> Result<(), DeviceError> {
        let memory = if device.precision == Precision::Bf16 {
            let narrow: Vec<bf16> = data.iter().copied().map(bf16::from_f32).collect();
            put(device, &narrow, Numbers::Bf16)?
        } else {
            put(device, data, Numbers::F32)?
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
                false => Table::Near(put(device, data, numbers)?),
            })
        }
        let placed = match (table.as_f32(), table.as_bf16()) {
            (Some(data), _) => place(device, data, Numbers::F32, far)?,
            (_, Some(data)) => place(device, data, Numbers::Bf16, far)?,
            (None, None) => {
                return Err(DeviceError::Unsupported { what: "the embedding's dtype".to_owned() });
            }
        };
        self.tables.insert(key, placed);
        Ok(())
    }

    fn pack(&mut self, device: &Arc<Device>, view: &Nf4View<'_>) -> Result<(), DeviceError> {
        let codes = put(device, view.codes(), Numbers::F32)?;
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
            Scales::Plain(scales) => argument.nested = put(self::put(device, scales, Numbers::F32)?),
            Scales::Double { codes, nested, offset, map } => {
                argument.scales = put(self::put(device, codes, Numbers::F32)?);
                argument.nested = put(self::put(device, nested, Numbers::F32)?);
                argument.map = put(self::put(device, map.as_slice(), Numbers::F32)?);
                argument.offset = offset;
            }
        }
        self.packed.insert(key(view.codes()), PackedWeight { _memory: memory, argument });
        Ok(())
    }
}

pub(super) fn table_key(table: &EmbeddingView<'_>) -> usize {
    table.as_f32().map(key).or_else(|| table.as_bf16().map(key)).unwrap_or(0)
}
