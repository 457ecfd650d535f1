//! What the layer loop asks a base for.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::{
    error::Result,
    model::{
        config::{ModelConfig, Norm, Projection},
        sharded::ShardedBase,
    },
    quant::{Nf4Pieces, Nf4View},
};

/// Elements copied or dequantised as one task. Fixed, so that work splits alike whatever the thread count.
const CHUNK: usize = 1 << 16;

/// A row-major matrix of f32.
#[derive(Debug, Clone, Copy)]
pub struct DenseView<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
}

impl<'a> DenseView<'a> {
    /// A view of `rows * columns` numbers.
    ///
    /// # Panics
    /// If `data` is of another length: a defect of the caller.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a dense view covers its matrix");
        Self { data, rows, columns }
    }

    /// All numbers, row after row.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }
}

/// Frozen numbers that lie on a device and nowhere else. A device finds them again by the address of this value, which
/// stays where it is as long as its base lives.
pub trait Held: std::fmt::Debug + Send + Sync {
    /// Fetches numbers as f32 from flat index `first` on, as many as `out` holds. What fails on the device is told by the
    /// next call that waits for it.
    fn fetch(&self, first: usize, out: &mut [f32]);
}

/// By what a device finds held numbers again.
fn place_of(held: &dyn Held) -> usize {
    std::ptr::from_ref(held).cast::<()>() as usize
}

/// A matrix that lies on a device.
#[derive(Debug, Clone, Copy)]
pub struct HeldView<'a> {
    held: &'a dyn Held,
    rows: usize,
    columns: usize,
}

impl<'a> HeldView<'a> {
    /// A view of `rows * columns` held numbers.
    pub fn new(held: &'a dyn Held, rows: usize, columns: usize) -> Self {
        Self { held, rows, columns }
    }

    /// By what the device finds it again.
    pub(crate) fn place(&self) -> usize {
        place_of(self.held)
    }
}

/// A frozen weight, row-major `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// As f32.
    Dense(DenseView<'a>),
    /// In 4-bit NormalFloat.
    Nf4(Nf4View<'a>),
    /// In 4-bit NormalFloat, gathered from several members.
    Pieces(Nf4Pieces<'a>),
    /// On a device.
    Held(HeldView<'a>),
}

impl<'a> Matrix<'a> {
    /// Outputs.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(view) => view.rows,
            Self::Nf4(view) => view.rows(),
            Self::Pieces(pieces) => pieces.shape().rows,
            Self::Held(view) => view.rows,
        }
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        match self {
            Self::Dense(view) => view.columns,
            Self::Nf4(view) => view.columns(),
            Self::Pieces(pieces) => pieces.shape().columns,
            Self::Held(view) => view.columns,
        }
    }

    /// The numbers themselves, where they are there as f32: no copy needed.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        match self {
            Self::Dense(view) => Some(view.data),
            Self::Nf4(_) | Self::Pieces(_) | Self::Held(_) => None,
        }
    }

    /// Writes the whole matrix as f32, row after row; bit-equal to bitsandbytes where it is NF4.
    ///
    /// # Panics
    /// If `out` is not of `rows * columns`: a defect of the caller.
    pub fn write_f32(&self, out: &mut [f32]) {
        self.write_rows_f32(0..self.rows(), out);
    }

    /// Writes the rows of `rows` as f32: for products made in slices.
    ///
    /// # Panics
    /// If `out` is not of `rows.len() * columns`, or `rows` ends behind the matrix: a defect of the caller.
    pub fn write_rows_f32(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.columns(), "the output holds the rows asked for");
        match self {
            Self::Dense(view) => {
                let source = &view.data[rows.start * view.columns..rows.end * view.columns];
                out.par_chunks_mut(CHUNK)
                    .zip(source.par_chunks(CHUNK))
                    .for_each(|(out, source)| out.copy_from_slice(source));
            }
            Self::Nf4(view) => view.write_f32(rows.start * view.columns(), out),
            Self::Pieces(pieces) => pieces.write_f32(rows.start * self.columns(), out),
            Self::Held(view) => view.held.fetch(rows.start * view.columns, out),
        }
    }
}

/// A frozen linear layer: y = x Wᵀ + b.
#[derive(Debug, Clone, Copy)]
pub struct LinearWeights<'a> {
    /// W, `[out, in]`.
    pub weight: Matrix<'a>,
    /// b, `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// The frozen weights of one decoder layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerWeights<'a> {
    /// Scale of the norm ahead of attention, `[hidden]`.
    pub input_norm: &'a [f32],
    /// Scale of the norm of each head's queries, `[head_dim]`, where there is one.
    pub query_norm: Option<&'a [f32]>,
    /// Scale of the norm of each head's keys, `[head_dim]`, where there is one.
    pub key_norm: Option<&'a [f32]>,
    /// Scale of the norm of attention's output, `[hidden]`, where there is one.
    pub attention_output_norm: Option<&'a [f32]>,
    /// Scale of the norm ahead of the MLP, `[hidden]`.
    pub mlp_norm: &'a [f32],
    /// Scale of the norm of the MLP's output, `[hidden]`, where there is one.
    pub mlp_output_norm: Option<&'a [f32]>,
    /// The linear layers by [`Projection::index`]; none where another holds it too.
    pub linears: [Option<LinearWeights<'a>>; 7],
}

impl<'a> LayerWeights<'a> {
    /// The scales of all norms that there are.
    pub fn norms(&self) -> impl Iterator<Item = &'a [f32]> {
        let some = [self.query_norm, self.key_norm, self.attention_output_norm, self.mlp_output_norm];
        [self.input_norm, self.mlp_norm].into_iter().chain(some.into_iter().flatten())
    }

    /// The linear layer of `projection`, or the one that holds it too.
    ///
    /// # Panics
    /// If the configuration has no such projection: a defect of the caller.
    pub fn linear(&self, projection: Projection) -> &LinearWeights<'a> {
        self.linears[projection.index()].as_ref().expect("a base has every projection of its configuration")
    }

    /// A layer of norms by [`Norm::index`], empty where there is none, and linear layers each by `linear`.
    pub fn of(
        config: &ModelConfig,
        norms: &'a [Vec<f32>; Norm::ALL.len()],
        linear: impl FnMut(Projection) -> LinearWeights<'a>,
    ) -> Self {
        let norm = |norm: Norm| norms[norm.index()].as_slice();
        let some = |of: Norm| Some(norm(of)).filter(|weight| !weight.is_empty());
        Self {
            input_norm: norm(Norm::AttentionInput),
            query_norm: some(Norm::Query),
            key_norm: some(Norm::Key),
            attention_output_norm: some(Norm::AttentionOutput),
            mlp_norm: norm(Norm::MlpInput),
            mlp_output_norm: some(Norm::MlpOutput),
            linears: Self::by_projection(config, linear),
        }
    }

    /// [`LayerWeights::linears`] of a model, each by `linear`.
    pub fn by_projection(
        config: &ModelConfig,
        mut linear: impl FnMut(Projection) -> LinearWeights<'a>,
    ) -> [Option<LinearWeights<'a>>; 7] {
        let mut all = [None; 7];
        for projection in config.projections() {
            all[projection.index()] = Some(linear(*projection));
        }
        all
    }
}

/// How an embedding's numbers are kept.
#[derive(Debug, Clone, Copy)]
enum EmbeddingData<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Held { held: &'a dyn Held, rows: usize, bytes: u64 },
}

/// An embedding or output head, `[vocabulary, hidden]`, kept as stored: bf16 or f32.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingView<'a> {
    data: EmbeddingData<'a>,
    columns: usize,
}

impl<'a> EmbeddingView<'a> {
    /// A view of rows of `columns` f32 numbers.
    pub fn from_f32(data: &'a [f32], columns: usize) -> Self {
        debug_assert!(columns > 0 && data.len().is_multiple_of(columns));
        Self { data: EmbeddingData::F32(data), columns }
    }

    /// A view of rows of `columns` bf16 numbers.
    pub fn from_bf16(data: &'a [bf16], columns: usize) -> Self {
        debug_assert!(columns > 0 && data.len().is_multiple_of(columns));
        Self { data: EmbeddingData::Bf16(data), columns }
    }

    /// A view of `rows` rows of `columns` numbers that lie on a device and take `bytes` bytes there.
    pub fn from_held(held: &'a dyn Held, rows: usize, columns: usize, bytes: u64) -> Self {
        Self { data: EmbeddingData::Held { held, rows, bytes }, columns }
    }

    /// Size of the vocabulary.
    pub fn rows(&self) -> usize {
        match self.data {
            EmbeddingData::F32(data) => data.len() / self.columns,
            EmbeddingData::Bf16(data) => data.len() / self.columns,
            EmbeddingData::Held { rows, .. } => rows,
        }
    }

    /// The hidden size.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// By what a device finds it again, which is where it lies in memory, and its bytes.
    pub(crate) fn place(&self) -> (usize, u64) {
        match self.data {
            EmbeddingData::Held { held, bytes, .. } => (place_of(held), bytes),
            EmbeddingData::F32(data) => (data.as_ptr() as usize, size_of_val(data) as u64),
            EmbeddingData::Bf16(data) => (data.as_ptr() as usize, size_of_val(data) as u64),
        }
    }

    /// The numbers themselves, where they are kept as f32.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        match self.data {
            EmbeddingData::F32(data) => Some(data),
            EmbeddingData::Bf16(_) | EmbeddingData::Held { .. } => None,
        }
    }

    /// The numbers themselves, where they are kept as bf16.
    pub fn as_bf16(&self) -> Option<&'a [bf16]> {
        match self.data {
            EmbeddingData::F32(_) | EmbeddingData::Held { .. } => None,
            EmbeddingData::Bf16(data) => Some(data),
        }
    }

    /// Writes the row of one token, widened to f32; `out` is `[hidden]`.
    ///
    /// # Panics
    /// If `id` is not below [`Self::rows`]: ids are checked where they enter.
    pub fn gather_row(&self, id: usize, out: &mut [f32]) {
        let range = id * self.columns..(id + 1) * self.columns;
        match self.data {
            EmbeddingData::F32(data) => out.copy_from_slice(&data[range]),
            EmbeddingData::Bf16(data) => widen(&data[range], out),
            EmbeddingData::Held { held, .. } => held.fetch(range.start, out),
        }
    }

    /// Writes the rows of `rows`, widened to f32; `out` is `[rows.len(), hidden]`.
    ///
    /// # Panics
    /// If `rows` ends behind the vocabulary or `out` is of another length: a defect of the caller.
    pub fn rows_f32(&self, rows: Range<usize>, out: &mut [f32]) {
        let range = rows.start * self.columns..rows.end * self.columns;
        assert_eq!(out.len(), range.len(), "the output holds the rows asked for");
        match self.data {
            EmbeddingData::F32(data) => out
                .par_chunks_mut(CHUNK)
                .zip(data[range].par_chunks(CHUNK))
                .for_each(|(out, source)| out.copy_from_slice(source)),
            EmbeddingData::Bf16(data) => out
                .par_chunks_mut(CHUNK)
                .zip(data[range].par_chunks(CHUNK))
                .for_each(|(out, source)| widen(source, out)),
            EmbeddingData::Held { held, .. } => held.fetch(range.start, out),
        }
    }
}

/// bf16 to f32, which is exact.
fn widen(source: &[bf16], out: &mut [f32]) {
    assert_eq!(source.len(), out.len(), "as many numbers out as in");
    for (out, value) in out.iter_mut().zip(source) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

/// Where frozen weights come from, layer by layer: memory here, other members of a shard group elsewhere.
pub trait BaseSource {
    /// What the decoder is made of.
    fn config(&self) -> &ModelConfig;

    /// Says that `layer` is wanted next; a source that fetches begins to.
    fn prefetch(&mut self, layer: usize);

    /// The weights of `layer`, from 0.
    ///
    /// # Errors
    /// Where they cannot be fetched.
    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>>;

    /// The token embedding, `[vocabulary, hidden]`.
    fn embedding(&self) -> EmbeddingView<'_>;

    /// Scale of the norm behind the last layer, `[hidden]`.
    fn final_norm(&self) -> &[f32];

    /// The output head, `[vocabulary, hidden]`; the embedding itself where they are tied.
    fn head(&self) -> EmbeddingView<'_>;

    /// The base itself where several members share it.
    fn sharded(&mut self) -> Option<&mut ShardedBase> {
        None
    }
}
