//! What goes wrong with a GPU, with the codes `SH080x`.

use shanty_diagnostic::Kind;

/// What goes wrong with a GPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No driver: no GPU can be used.
    #[error(
        "device `cuda` was asked for, but there is no NVIDIA driver: libcuda was not found or does not start"
    )]
    NoDriver,
    /// A library of the CUDA toolkit is missing.
    #[error("CUDA library `{library}` was not found; looked in the loader's path and in: {}", looked_in.join(", "))]
    NoLibrary {
        /// The library.
        library: &'static str,
        /// Folders that were searched besides.
        looked_in: Vec<String>,
    },
    /// The number of the GPU is too high.
    #[error("there is no GPU {index}: the driver shows {count}")]
    NoSuchDevice {
        /// The number asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The card is too old.
    #[error("`{card}` has compute capability {major}.{minor}, needed is 8.0 or later")]
    TooOld {
        /// The card's name.
        card: String,
        /// Its compute capability.
        major: i32,
        /// After the dot.
        minor: i32,
    },
    /// A kernel does not compile.
    #[error("GPU kernels failed to compile for {architecture}: {log}")]
    Compile {
        /// The architecture.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// A call of CUDA failed.
    #[error("GPU operation `{operation}` failed: {reason}")]
    Call {
        /// What was called.
        operation: &'static str,
        /// What CUDA says.
        reason: String,
    },
    /// Memory of the card is short.
    #[error("failed to reserve {bytes} bytes of GPU memory: {free} are free")]
    OutOfMemory {
        /// How much was asked for.
        bytes: usize,
        /// How much is free.
        free: usize,
    },
    /// A step does not fit the card's memory, or what of it may be taken.
    #[error(
        "a step of {tokens} tokens needs {needed} bytes of GPU memory, {limit} may be taken: {base} for the base, \
         {activations} for activations and scratch, the rest for adapter and optimizer"
    )]
    PlanTooLarge {
        /// Bytes of the plan.
        needed: u64,
        /// Bytes that may be taken.
        limit: u64,
        /// Of them, the base's.
        base: u64,
        /// Of them, activations' and scratch's.
        activations: u64,
        /// Tokens of a micro-batch.
        tokens: usize,
    },
    /// The base alone does not fit the card's memory, or what of it may be taken.
    #[error("the base alone needs {needed} bytes of GPU memory, {limit} may be taken")]
    BaseTooLarge {
        /// Bytes of the base, less what can stay with the host.
        needed: u64,
        /// Bytes that may be taken.
        limit: u64,
    },
    /// Memory of the host that the card reads directly is short.
    #[error("failed to pin {bytes} bytes of host memory")]
    HostMemory {
        /// How much was asked for.
        bytes: usize,
    },
    /// The model's shape is none that the kernels serve.
    #[error("the GPU engine does not serve {what}")]
    Unsupported {
        /// What is not served.
        what: String,
    },
}

impl DeviceError {
    /// The code, one of those with a page in `docs/errors/`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoDriver => "SH0801",
            Self::NoLibrary { .. } => "SH0802",
            Self::NoSuchDevice { .. } => "SH0803",
            Self::TooOld { .. } => "SH0804",
            Self::Compile { .. } => "SH0805",
            Self::Call { .. } => "SH0806",
            Self::OutOfMemory { .. } => "SH0807",
            Self::Unsupported { .. } => "SH0808",
            Self::PlanTooLarge { .. } => "SH0810",
            Self::HostMemory { .. } => "SH0811",
            Self::BaseTooLarge { .. } => "SH0830",
        }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Compile { .. } => Kind::Internal,
            Self::Call { .. } | Self::OutOfMemory { .. } | Self::HostMemory { .. } => Kind::Transient,
            _ => Kind::User,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoDriver => "install the NVIDIA driver, or use `--device cpu`",
            Self::NoLibrary { .. } => {
                "install the CUDA toolkit 12 or 13, or `pip install nvidia-cuda-nvrtc nvidia-cublas`, and set \
                 SHANTY_CUDA_LIBRARIES to the folder if it is in an unusual place"
            }
            Self::NoSuchDevice { .. } => "see `nvidia-smi -L` and CUDA_VISIBLE_DEVICES",
            Self::TooOld { .. } => "use a card of the Ampere generation or later, or `--device cpu`",
            Self::Compile { .. } => "please report this with the driver's and the toolkit's version",
            Self::Call { .. } => "see `nvidia-smi` and the system log for the card's state, then start again",
            Self::OutOfMemory { .. } => {
                "set train.micro_batch_size = 1 and train.recompute = \"layers\", or lower data.max_length"
            }
            Self::PlanTooLarge { .. } => {
                "lower data.max_length, train.micro_batch_size or adapter.r, raise train.memory, free the card of other programs \
                 (`nvidia-smi`), or use a smaller base"
            }
            Self::BaseTooLarge { .. } => {
                "keep the base in 4 bits (base.quantization = \"nf4\"), share it among several cards (base.shard), raise train.memory, \
                 free the card of other programs (`nvidia-smi`), or use a smaller base"
            }
            Self::HostMemory { .. } => {
                "free memory of the host or raise its limit of locked memory (`ulimit -l`); a higher train.memory keeps more \
                 on the card"
            }
            Self::Unsupported { .. } => "use `--device cpu`",
        }
        .to_owned()
    }
}
