//! Numbers on their way to the card and back: batches, parameters, gradients, the frozen base.

use half::bf16;
use rayon::prelude::*;

use super::{
    Cuda, CudaBatch, DeviceBuffer, DeviceError, DeviceMemory, Numbers, THREADS, attention::TileLists,
    base::matrix_key, kernel, launch, matrix, outgoing::Outgoing,
};
use crate::{
    backend::{Backend, BatchRoom, Ready, View, ViewMut},
    batch::PackedBatch,
    engine::GradientSink,
    error::Result,
    model::Matrix,
};

/// Numbers copied or added as one task.
const CHUNK: usize = 1 << 16;

impl Cuda {
    /// [`Backend::allocate_batch`].
    pub(super) fn batch(&self, room: BatchRoom) -> Result<CudaBatch> {
        let reserve = |bytes: usize| self.take(bytes * room.tokens, Numbers::F32);
        let tiles = TileLists::allocate(self, room)?;
        // Six arrays and two lists.
        let outgoing =
            Outgoing::new(&self.device, (4 + 4 + 8 + 16 + 4 + 4) * room.tokens + tiles.bytes(), 8)?;
        Ok(CudaBatch {
            ids: reserve(4)?,
            positions: reserve(4)?,
            samples: reserve(8)?,
            spans: reserve(16)?,
            predicting: reserve(4)?,
            targets: reserve(4)?,
            statistics: reserve(8 * room.heads)?,
            tiles,
            outgoing,
            span_count: 0,
            longest_queries: 0,
            longest_keys: 0,
        })
    }

    /// [`Backend::load_batch`].
    pub(super) fn load(&self, from: &PackedBatch, into: &mut CudaBatch) {
        let device = &*self.device;
        let CudaBatch { outgoing, ids, positions, samples, predicting, targets, .. } = into;
        outgoing.begin(device);
        outgoing.send(device, &from.token_ids, ids.address);
        outgoing.send(device, &from.positions, positions.address);
        outgoing.send(device, &from.sample_ids, samples.address);
        outgoing.send(device, &from.predicting, predicting.address);
        outgoing.send(device, &from.targets, targets.address);
        let spans: Vec<[u32; 4]> = from
            .spans
            .iter()
            .map(|span| {
                [span.query_start, span.queries, span.key_start, span.keys].map(|number| number as u32)
            })
            .collect();
        outgoing.send(device, &spans, into.spans.address);
        into.tiles.load(self, outgoing, &from.spans);
        outgoing.end(device);
        into.span_count = spans.len();
        into.longest_queries = from.spans.iter().map(|span| span.queries).max().unwrap_or(0);
        into.longest_keys = from.spans.iter().map(|span| span.keys).max().unwrap_or(0);
    }

    /// [`Backend::lend`].
    pub(super) fn lend_parameters<'a>(
        &self,
        host: &'a [f32],
        place: &'a mut Option<DeviceMemory>,
    ) -> Result<&'a DeviceBuffer> {
        let length = host.len();
        if place.as_ref().is_none_or(|memory| memory.bytes < 4 * length) {
            *place = None;
            *place = Some(self.allocate_parameters(length)?);
        }
        let memory = place.as_mut().ok_or(DeviceError::OutOfMemory { bytes: 6 * length, free: 0 })?;
        let memory = &mut *memory;
        self.with_staging(length, |staging| {
            staging.par_chunks_mut(CHUNK).zip(host.par_chunks(CHUNK)).for_each(|(staging, host)| {
                staging.copy_from_slice(host);
            });
            self.upload(staging, memory);
            // The staging is used again before the copy out of it need be over.
            self.settle()
        })?;
        Ok(memory)
    }

    /// [`Backend::with_gradient`].
    pub(super) fn gather_gradient<R>(
        &self,
        host: &mut [f32],
        place: &mut Option<DeviceMemory>,
        sink: &mut dyn GradientSink,
        work: impl FnOnce(&mut DeviceBuffer, &mut Ready<'_, Self>) -> Result<R>,
    ) -> Result<R> {
        let memory = self.reserved(host.len(), place)?;
        self.fill(0.0, ViewMut::<Self>::new(&mut *memory, 1, host.len()));
        let mut ranges = Vec::new();
        let result = work(&mut *memory, &mut |range, _| ranges.push(range))?;
        let address = memory.address;
        self.with_staging(host.len(), |staging| {
            self.device.download(address, staging);
            self.settle()?;
            host.par_chunks_mut(CHUNK).zip(staging.par_chunks(CHUNK)).for_each(|(host, new)| {
                host.iter_mut().zip(new).for_each(|(host, new)| *host += new);
            });
            Ok(())
        })?;
        for range in ranges {
            sink.ready(range, host);
        }
        Ok(result)
    }

    /// [`Backend::download`].
    pub(super) fn download_rows(&self, from: View<'_, Self>, into: &mut [f32]) {
        let start = matrix(from).address;
        let (runs, length) = if from.stride == from.columns {
            (1, from.rows * from.columns)
        } else {
            (from.rows, from.columns)
        };
        let mut narrow = Vec::new();
        for (run, into) in into.chunks_exact_mut(length.max(1)).enumerate().take(runs) {
            let address = start + (from.data.numbers.bytes() * run * from.stride) as u64;
            match from.data.numbers {
                Numbers::F32 => self.device.download(address, into),
                Numbers::Bf16 => {
                    narrow.resize(length, bf16::ZERO);
                    self.device.download(address, &mut narrow);
                    into.iter_mut().zip(&narrow).for_each(|(into, from)| *into = from.to_f32());
                }
            }
        }
    }

    /// [`Backend::frozen`].
    pub(super) fn dequantised<'a>(
        &'a self,
        matrix: &Matrix<'a>,
        scratch: &'a mut DeviceBuffer,
    ) -> View<'a, Self> {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        let key = matrix_key(matrix);
        if let Some(memory) = self.base.dense.get(&key) {
            return View::new(&memory.buffer, rows, columns);
        }
        match self.base.packed.get(&key) {
            Some(packed) => {
                let argument = packed.argument;
                let blocks = (argument.numbers as usize / 8).div_ceil(THREADS).clamp(1, 132 * 32);
                let name = kernel!("nf4", scratch.numbers);
                launch!(self.device, name, [blocks, 1, 1], [THREADS, 1], argument, scratch.address);
            }
            None => self.missing("a matrix"),
        }
        View::new(scratch, rows, columns)
    }
}
