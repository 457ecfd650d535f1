//! Kernels: their source, compiled for the card at hand and kept on disk.

use std::{
    env,
    ffi::{CStr, CString},
    fs,
    path::PathBuf,
};

use cudarc::nvrtc::{result, sys};

use super::{DeviceError, Precision, libraries};

const COMMON: &str = include_str!("kernels/common.cu");
const ELEMENTWISE: &str = include_str!("kernels/elementwise.cu");
const ROWS: &str = include_str!("kernels/rows.cu");
const VECTORS: &str = include_str!("kernels/vectors.cu");
const VIRTUAL_TOKENS: &str = include_str!("kernels/virtual_tokens.cu");
const NF4: &str = include_str!("kernels/nf4.cu");
const QUANTISE: &str = include_str!("kernels/quantise.cu");
const LOW_RANK: &str = include_str!("kernels/low_rank.cu");
const OPTIMIZER: &str = include_str!("kernels/optimizer.cu");
const ATTENTION: &str = include_str!("kernels/attention.cu");
const HOPPER: &str = include_str!("kernels/hopper.cu");
const ATTENTION_HOPPER: &str = include_str!("kernels/attention_hopper.cu");
const ATTENTION_HOPPER_FORWARD: &str = include_str!("kernels/attention_hopper_forward.cu");
const ATTENTION_HOPPER_TURNED: &str = include_str!("kernels/attention_hopper_turned.cu");
const ATTENTION_HOPPER_DKV: &str = include_str!("kernels/attention_hopper_dkv.cu");
const ATTENTION_HOPPER_DKV_WIDE: &str = include_str!("kernels/attention_hopper_dkv_wide.cu");
const ATTENTION_HOPPER_DQ: &str = include_str!("kernels/attention_hopper_dq.cu");

/// Kernels that are compiled together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    source: String,
    options: Vec<String>,
}

/// How attention splits its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionTiles {
    /// Warps of a block; each owns 16 rows.
    pub warps: usize,
    /// Columns of a tile of scores.
    pub tile: usize,
    /// How products are computed. Bf16 keeps half the bytes in shared memory.
    pub precision: Precision,
    /// The engine's precision: bf16 keeps activations as bf16.
    pub stored: Precision,
}

impl AttentionTiles {
    /// The largest tiles whose blocks fit `shared` bytes of shared memory.
    pub fn choose(head_dim: usize, shared: usize, precision: Precision) -> Option<Self> {
        // Products of bf16 take 16 features at a time.
        let halves = precision == Precision::Bf16 && head_dim.is_multiple_of(16);
        let stored = precision;
        let precision = if precision == Precision::Bf16 && !halves { Precision::Tf32 } else { precision };
        let all = [(4, 32), (2, 32), (2, 16), (1, 16)];
        let all = all.map(|(warps, tile)| Self { warps, tile, precision, stored });
        // Wide heads keep more numbers a row: fewer rows a block.
        let fit =
            |tiles: &Self| tiles.backward_bytes(head_dim) <= shared && (head_dim <= 128 || tiles.warps <= 2);
        all.into_iter().find(fit)
    }

    /// Bytes of a number in shared memory, and numbers that pad a row.
    fn number(&self) -> (usize, usize) {
        if self.precision == Precision::Bf16 { (2, 8) } else { (4, 4) }
    }

    /// Rows of a block.
    pub fn rows(&self) -> usize {
        16 * self.warps
    }

    /// Shared memory of the forward kernel, bytes.
    pub fn forward_bytes(&self, head_dim: usize) -> usize {
        let (bytes, pad) = self.number();
        bytes * ((self.rows() + 2 * self.tile) * (head_dim + pad) + self.rows() * (self.tile + pad))
    }

    /// Shared memory of the larger backward kernel, bytes.
    pub fn backward_bytes(&self, head_dim: usize) -> usize {
        let (bytes, pad) = self.number();
        let tiles = 2 * (self.rows() + self.tile) * (head_dim + pad);
        bytes * (tiles + self.rows() * (self.tile + pad)) + 8 * self.tile
    }
}

/// A kernel's tiles: rows that are loaded at once, and how many such loads may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// Rows of a tile.
    pub rows: usize,
    /// Tiles in shared memory.
    pub stages: usize,
}

/// How attention for Hopper splits its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HopperTiles {
    /// Features of a head: 64, 96, 128 or 256.
    pub head_dim: usize,
    /// Whether scores are bounded by a hyperbolic tangent.
    pub soft_cap: bool,
    /// Keys of a block of the kernel that sums their gradients.
    pub key_rows: usize,
    /// Keys of the forward kernel.
    pub forward: Ring,
    /// Queries of the kernel for the gradients of keys and values.
    pub keys: Ring,
    /// Keys of the kernel for the gradients of queries.
    pub queries: Ring,
}

impl HopperTiles {
    /// Queries of a block, and keys that a list of tiles counts in.
    pub const ROWS: usize = 128;

    /// The tiles for heads of `head_dim` features; none where there is no kernel for them.
    pub fn choose(head_dim: usize, soft_cap: bool) -> Option<Self> {
        let ring = |rows, stages| Ring { rows, stages };
        // The slopes of a cap take registers, too: fewer queries at once.
        let dkv_rows = if soft_cap { 32 } else { 64 };
        let (key_rows, forward, keys, queries) = match head_dim {
            64 if !soft_cap => (128, ring(128, 3), ring(96, 3), ring(96, 3)),
            64 | 96 | 128 => (128, ring(128, 2), ring(dkv_rows, 4), ring(64, 4)),
            256 => (64, ring(64, 2), ring(dkv_rows, 2), ring(32, 2)),
            _ => return None,
        };
        Some(Self { head_dim, soft_cap, key_rows, forward, keys, queries })
    }

    /// Rows of a head in shared memory, bytes.
    fn bytes(&self, rows: usize) -> usize {
        2 * self.head_dim * rows
    }

    /// Shared memory of the forward kernel, bytes: queries, rings of keys and values, barriers, and the way
    /// to a multiple of 1024.
    pub fn forward_bytes(&self) -> usize {
        self.bytes(Self::ROWS) + 2 * self.bytes(self.forward.stages * self.forward.rows) + 1536
    }

    /// Shared memory of the kernel for keys and values, bytes: as above, with two statistics a query.
    pub fn keys_bytes(&self) -> usize {
        let queries = self.keys.stages * self.keys.rows;
        2 * self.bytes(self.key_rows) + 2 * self.bytes(queries) + 8 * queries + 1536
    }

    /// Shared memory of the kernel for queries, bytes.
    pub fn queries_bytes(&self) -> usize {
        2 * self.bytes(Self::ROWS) + 2 * self.bytes(self.queries.stages * self.queries.rows) + 1536
    }

    fn options(&self) -> Vec<String> {
        let mut options = vec![
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DBLOCK={}", self.forward.rows),
            format!("-DSTAGES={}", self.forward.stages),
            format!("-DDKV_BLOCK={}", self.keys.rows),
            format!("-DDKV_STAGES={}", self.keys.stages),
            format!("-DDQ_BLOCK={}", self.queries.rows),
            format!("-DDQ_STAGES={}", self.queries.stages),
            "-DPING_PONG".to_owned(),
        ];
        if self.soft_cap {
            options.push("-DSOFT_CAP".to_owned());
        }
        options
    }
}

impl Unit {
    /// Everything but attention.
    pub fn general() -> Self {
        let parts = [COMMON, ELEMENTWISE, ROWS, VECTORS, VIRTUAL_TOKENS, NF4, QUANTISE, LOW_RANK, OPTIMIZER];
        Self { source: parts.concat(), options: Vec::new() }
    }

    /// Attention for heads of `head_dim` features.
    pub fn attention(head_dim: usize, tiles: AttentionTiles) -> Self {
        let mut options = vec![
            format!("-DHEAD_DIM={head_dim}"),
            format!("-DWARPS={}", tiles.warps),
            format!("-DTILE={}", tiles.tile),
        ];
        match tiles.precision {
            Precision::F32 => options.push("-DEXACT".to_owned()),
            Precision::Tf32 => {}
            Precision::Bf16 => options.push("-DHALVES".to_owned()),
        }
        if tiles.stored == Precision::Bf16 {
            options.push("-DSTORED_BF16".to_owned());
        }
        Self { source: [COMMON, ATTENTION].concat(), options }
    }

    /// Attention for Hopper, forward; compiles for `sm_90a` alone.
    pub fn attention_hopper_forward(tiles: HopperTiles) -> Self {
        let source = [COMMON, HOPPER, ATTENTION_HOPPER, ATTENTION_HOPPER_FORWARD].concat();
        Self { source, options: tiles.options() }
    }

    /// As [`Unit::attention_hopper_forward`], backward.
    pub fn attention_hopper_backward(tiles: HopperTiles) -> Self {
        let dkv = if tiles.head_dim > 128 { ATTENTION_HOPPER_DKV_WIDE } else { ATTENTION_HOPPER_DKV };
        let parts = [COMMON, HOPPER, ATTENTION_HOPPER, ATTENTION_HOPPER_TURNED, dkv, ATTENTION_HOPPER_DQ];
        Self { source: parts.concat(), options: tiles.options() }
    }

    /// Machine code for an architecture such as `sm_90`.
    ///
    /// # Errors
    /// Where the compiler is missing, or refuses.
    pub fn compile(&self, architecture: &str) -> Result<Vec<u8>, DeviceError> {
        self.build(architecture, &[]).map(|(code, _)| code)
    }

    /// What the assembler says of each kernel: registers, bytes spilled to memory, products that run one by one.
    ///
    /// # Errors
    /// As [`Unit::compile`].
    pub fn report(&self, architecture: &str) -> Result<String, DeviceError> {
        self.build(architecture, &["--ptxas-options=-v"]).map(|(_, log)| log)
    }

    fn build(&self, architecture: &str, more: &[&str]) -> Result<(Vec<u8>, String), DeviceError> {
        libraries::nvrtc()?;
        let failed = |log: String| DeviceError::Compile { architecture: architecture.to_owned(), log };
        let source = CString::new(self.source.as_str()).map_err(|error| failed(error.to_string()))?;
        let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
        options.extend(self.options.iter().cloned());
        options.extend(more.iter().map(|&option| option.to_owned()));
        let program = result::create_program(&source, None).map_err(|error| failed(format!("{error:?}")))?;
        // SAFETY: the program was just made, is used by this thread alone and destroyed once, at the end.
        unsafe {
            let compiled = result::compile_program(program, &options);
            let log = result::get_program_log(program).unwrap_or_default();
            let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
            let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned());
            let code = match compiled {
                Ok(()) => machine_code(program)
                    .map(|code| (code, log.unwrap_or_default()))
                    .map_err(|error| failed(format!("{error:?}"))),
                Err(error) => Err(failed(log.unwrap_or_else(|_| format!("{error:?}")))),
            };
            // The code is already copied; that the program cannot be destroyed changes nothing.
            let _ = result::destroy_program(program);
            code
        }
    }

    /// As [`Unit::compile`], from the cache on disk where it was compiled before.
    pub(super) fn load(&self, architecture: &str) -> Result<Vec<u8>, DeviceError> {
        let Some(file) = self.cache_file(architecture) else { return self.compile(architecture) };
        if let Ok(code) = fs::read(&file)
            && code.starts_with(b"\x7fELF")
        {
            return Ok(code);
        }
        let code = self.compile(architecture)?;
        // A cache that cannot be written costs time at the next start, no more.
        if let Some(folder) = file.parent()
            && fs::create_dir_all(folder).is_ok()
        {
            let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
            if fs::write(&temporary, &code).is_ok() {
                let _ = fs::rename(&temporary, &file);
            }
        }
        Ok(code)
    }

    /// Named by all that the code depends on but the compiler's version: a newer compiler changes speed, not sense.
    fn cache_file(&self, architecture: &str) -> Option<PathBuf> {
        let cache = env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
        let mut hasher = blake3::Hasher::new();
        for part in [architecture, env!("CARGO_PKG_VERSION"), &self.source, &self.options.join(" ")] {
            hasher.update(part.as_bytes()).update(b"\n");
        }
        Some(cache.join("shanty/kernels").join(format!("{}.cubin", hasher.finalize().to_hex())))
    }
}

// SAFETY: callers hand in a program that was compiled and is not destroyed yet.
unsafe fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the program is compiled; the buffer has the size that the library asked for.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut code = vec![0_u8; size];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
        Ok(code)
    }
}
