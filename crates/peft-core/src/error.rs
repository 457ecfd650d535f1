//! What goes wrong in this crate, with the code that `shanty explain` knows.
//!
//! `SH03xx`: the base model's folder. `SH04xx`: the adapter, its settings and its folder.

use std::{io, path::PathBuf};

use shanty_diagnostic::{Diagnose, Diagnostic, Kind};

use crate::{backend::cuda::DeviceError, engine::StepError, use_error::UseError};

mod hint;
mod origin;

pub use origin::Origin;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What goes wrong with bases and adapters.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing or cannot be read.
    #[error("failed to read `{}`: {source}", file.display())]
    Read {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A JSON file is not JSON, or not of the form that is needed.
    #[error("failed to parse `{}`: {source}", file.display())]
    Json {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// Why and where.
        source: serde_json::Error,
    },
    /// A key of `config.json` is absent, of the wrong type, or holds an impossible value.
    #[error("`{key}` in `{}` {problem}", file.display())]
    ModelConfig {
        /// The `config.json`.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it; reads on from "`key` in `file` …".
        problem: String,
    },
    /// No decoder family of that name.
    #[error("model type `{found}` in `{}` is not supported; there is: {}", file.display(), known.join(", "))]
    UnknownFamily {
        /// The `config.json`.
        file: PathBuf,
        /// Its `model_type`.
        found: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// The family is known, but not with this option.
    #[error("`{key}` = {value} in `{}` is not supported yet", file.display())]
    UnsupportedModelOption {
        /// The `config.json`.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
    },
    /// A safetensors file is cut short, or its header does not hold together.
    #[error("`{}` is damaged: {problem}", file.display())]
    DamagedTensors {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// What does not hold together.
        problem: String,
    },
    /// A GGUF file does not hold together.
    #[error("the GGUF file `{}` is damaged: {problem}", file.display())]
    DamagedGguf {
        /// The file.
        file: PathBuf,
        /// What does not hold together.
        problem: String,
    },
    /// A GGUF file is of an architecture that is not known.
    #[error("the GGUF file `{}` is of the architecture `{found}`, which is not supported", file.display())]
    GgufArchitecture {
        /// The file.
        file: PathBuf,
        /// Its `general.architecture`; empty where there is none.
        found: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// A setting of a GGUF file is missing, wrong or not supported.
    #[error("`{key}` in the GGUF file `{}` {problem}", file.display())]
    GgufSetting {
        /// The file.
        file: PathBuf,
        /// The key of its metadata, or the tensor.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// The base lacks a tensor that its configuration calls for.
    #[error("tensor `{tensor}` is missing from `{}`", folder.display())]
    MissingTensor {
        /// The model's folder or file.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than its configuration says.
    #[error("tensor `{tensor}` in `{}` has shape {found:?}, expected {expected:?}", file.display())]
    WrongShape {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by configuration.
        expected: Vec<usize>,
    },
    /// A tensor holds numbers of a kind that cannot stand there.
    #[error("tensor `{tensor}` in `{}` has dtype {found}, expected {expected}", file.display())]
    WrongDtype {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Dtype in the file.
        found: String,
        /// What may stand there.
        expected: &'static str,
    },
    /// The weights are there in PyTorch's own format alone.
    #[error("`{}` holds weights as PyTorch pickles only, no safetensors", folder.display())]
    OnlyPickles {
        /// Base or adapter.
        origin: Origin,
        /// The folder.
        folder: PathBuf,
    },
    /// The index of a sharded model does not agree with the files.
    #[error("index `{}`: {problem}", file.display())]
    Index {
        /// The `model.safetensors.index.json`.
        file: PathBuf,
        /// What does not agree.
        problem: String,
    },
    /// A pre-quantised tensor that is not NF4 as bitsandbytes writes it.
    #[error("quantised tensor `{tensor}` in `{}` {problem}", file.display())]
    QuantState {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it; reads on from "quantised tensor …".
        problem: String,
    },
    /// A weight is infinite or not a number.
    #[error("tensor `{tensor}` in `{}` holds a value that is infinite or not a number", file.display())]
    NonFinite {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A base without quantised matrices is to be shared.
    #[error("the base `{}` has no matrix in 4 bits, and only those can be shared by several workers", folder.display())]
    ShardNeedsNf4 {
        /// The base.
        folder: PathBuf,
    },
    /// A base in a GGUF file is to be shared.
    #[error("the base `{}` is a GGUF file, which cannot be read in parts", file.display())]
    ShardOfGguf {
        /// The file.
        file: PathBuf,
    },
    /// A base is to be shared by members that compute on cards.
    #[error("a base can be shared by workers on processors; on cards it is not supported yet")]
    ShardOnCard,
    /// A layer of a shared base is wanted outside of a group, or before the group has agreed on it.
    #[error("layer {layer} of a shared base is wanted, but {problem}")]
    NotGathered {
        /// The layer, from 0.
        layer: usize,
        /// Why it cannot be had.
        problem: String,
    },
    /// A block size that bitsandbytes does not know.
    #[error("quantisation block size {block_size} is not a power of two from 32 to 4096")]
    BlockSize {
        /// The block size asked for.
        block_size: usize,
    },
    /// A key of the adapter's settings is absent, of the wrong type, or holds an impossible value.
    #[error("adapter setting `{key}` {problem}")]
    AdapterSetting {
        /// The `adapter_config.json`, where the setting came from one.
        file: Option<PathBuf>,
        /// The key.
        key: String,
        /// What is wrong with it; reads on from "adapter setting `key` …".
        problem: String,
    },
    /// A PEFT method that there is not (yet).
    #[error("adapter method `{found}` is not supported yet; there is: {}", known.join(", "))]
    UnsupportedMethod {
        /// The `adapter_config.json`.
        file: Option<PathBuf>,
        /// Its `peft_type`.
        found: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// A PEFT option that would change the numbers and is not there (yet).
    #[error("adapter option `{key}` = {value} is not supported yet")]
    UnsupportedOption {
        /// The `adapter_config.json`.
        file: Option<PathBuf>,
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
    },
    /// The network that an adapter is trained through cannot compute.
    #[error("the network of the adapter failed: {reason}")]
    Network {
        /// Why.
        reason: String,
    },
    /// `target_modules` matches nothing.
    #[error("target_modules {pattern} matches no module of the model")]
    NoTarget {
        /// The list or expression, as JSON.
        pattern: String,
        /// Last parts of the names of all linear modules.
        available: Vec<String>,
        /// The name that was perhaps meant.
        nearest: Option<String>,
    },
    /// `exclude_modules`, `layers_to_transform` and `modules_to_save` leave nothing of what `target_modules` matches.
    #[error(
        "nothing is trained: `target_modules` {pattern} matches {matched} modules, and none of them is left"
    )]
    NothingLeft {
        /// The list or expression, as JSON.
        pattern: String,
        /// Modules that it matches.
        matched: usize,
    },
    /// A name in `modules_to_save` matches no module.
    #[error("`modules_to_save` names `{name}`, which the base does not have")]
    NoModuleToSave {
        /// The name.
        name: String,
        /// Last parts of the names of all modules with weights.
        available: Vec<String>,
    },
    /// A start that is computed from the base was not prepared.
    #[error("the start \"{start}\" is computed from the base once, before training, and is not there")]
    StartMissing {
        /// PEFT's word for it.
        start: &'static str,
    },
    /// A prepared start belongs to other settings or another base.
    #[error("the start in `{}` was computed for another base or other settings", folder.display())]
    StartOfAnother {
        /// Where it lies.
        folder: PathBuf,
    },
    /// A start that changes the base cannot be had with the base as it is stored.
    #[error("the start \"{start}\" needs the base's weights as they were before they were quantised")]
    StartNeedsWeights {
        /// PEFT's word for it.
        start: &'static str,
    },
    /// `target_modules` matches something that cannot carry the adapter.
    #[error("target_modules {pattern} matches `{module}`, which is {what}")]
    WrongTarget {
        /// The list or expression, as JSON.
        pattern: String,
        /// The module.
        module: String,
        /// What it is.
        what: &'static str,
    },
    /// `target_modules` is not a regular expression.
    #[error("target_modules {pattern:?} is not a usable regular expression: {problem}")]
    TargetPattern {
        /// The expression.
        pattern: String,
        /// What the parser, or the matcher, says.
        problem: String,
    },
    /// The adapter's file lacks tensors.
    #[error("`{}` lacks {} that its configuration calls for: {}", file.display(), count(tensors.len()), listed(tensors))]
    MissingAdapterTensors {
        /// The `adapter_model.safetensors`.
        file: PathBuf,
        /// Names, sorted.
        tensors: Vec<String>,
    },
    /// The adapter's file holds tensors that have no place.
    #[error("`{}` holds {} with no place in the model: {}", file.display(), count(tensors.len()), listed(tensors))]
    UnexpectedAdapterTensors {
        /// The `adapter_model.safetensors`.
        file: PathBuf,
        /// Names, sorted.
        tensors: Vec<String>,
    },
    /// Names in the adapter's file do not begin as PEFT's do.
    #[error("tensor names in `{}` do not begin with `base_model.model.`: {}", file.display(), listed(tensors))]
    AdapterPrefix {
        /// The `adapter_model.safetensors`.
        file: PathBuf,
        /// Names, sorted.
        tensors: Vec<String>,
    },
    /// Writing failed.
    #[error("failed to write `{}`: {source}", file.display())]
    Write {
        /// Base or adapter.
        origin: Origin,
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two buffers that must be of one length are not: a defect of the caller.
    #[error("{what} has {found} elements, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length it should have.
        expected: usize,
    },
    /// An adapter cannot be used, combined, merged or exported as asked.
    #[error(transparent)]
    Use(#[from] UseError),
    /// A pass over rows failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// A GPU.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// "1 tensor", "12 tensors".
fn count(tensors: usize) -> String {
    if tensors == 1 { "1 tensor".to_owned() } else { format!("{tensors} tensors") }
}

/// The first few names, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

impl Error {
    /// The code, one of those with a page in `docs/errors/`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Read { origin, .. } => origin.code("SH0301", "SH0401"),
            Self::Json { origin, .. } => origin.code("SH0302", "SH0402"),
            Self::ModelConfig { .. } => "SH0303",
            Self::UnknownFamily { .. } => "SH0304",
            Self::UnsupportedModelOption { .. } => "SH0305",
            Self::DamagedTensors { origin, .. } => origin.code("SH0306", "SH0410"),
            Self::DamagedGguf { .. } => "SH0320",
            Self::GgufArchitecture { .. } => "SH0321",
            Self::GgufSetting { .. } => "SH0322",
            Self::MissingTensor { .. } => "SH0307",
            Self::WrongShape { origin, .. } => origin.code("SH0308", "SH0411"),
            Self::WrongDtype { origin, .. } => origin.code("SH0309", "SH0412"),
            Self::OnlyPickles { origin, .. } => origin.code("SH0315", "SH0417"),
            Self::Index { .. } => "SH0310",
            Self::QuantState { .. } => "SH0311",
            Self::NonFinite { origin, .. } => origin.code("SH0312", "SH0416"),
            Self::BlockSize { .. } => "SH0313",
            Self::ShardNeedsNf4 { .. } => "SH0360",
            Self::ShardOfGguf { .. } => "SH0361",
            Self::ShardOnCard => "SH0362",
            Self::NotGathered { .. } => "SH0363",
            Self::AdapterSetting { .. } => "SH0403",
            Self::UnsupportedMethod { .. } => "SH0404",
            Self::UnsupportedOption { .. } => "SH0405",
            Self::NoTarget { .. } => "SH0406",
            Self::WrongTarget { .. } => "SH0407",
            Self::NothingLeft { .. } => "SH0420",
            Self::NoModuleToSave { .. } => "SH0422",
            Self::StartMissing { .. } => "SH0423",
            Self::StartOfAnother { .. } => "SH0424",
            Self::StartNeedsWeights { .. } => "SH0425",
            Self::TargetPattern { .. } => "SH0408",
            Self::MissingAdapterTensors { .. } => "SH0413",
            Self::UnexpectedAdapterTensors { .. } => "SH0414",
            Self::AdapterPrefix { .. } => "SH0415",
            Self::Write { origin, .. } => origin.code("SH0314", "SH0409"),
            Self::Length { .. } => "SH0399",
            Self::Network { .. } => "SH0440",
            Self::Use(error) => error.code(),
            Self::Step(error) => error.code(),
            Self::Device(error) => error.code(),
        }
    }

    fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::Read { file, .. }
            | Self::Json { file, .. }
            | Self::ModelConfig { file, .. }
            | Self::UnknownFamily { file, .. }
            | Self::UnsupportedModelOption { file, .. }
            | Self::DamagedTensors { file, .. }
            | Self::DamagedGguf { file, .. }
            | Self::GgufArchitecture { file, .. }
            | Self::GgufSetting { file, .. }
            | Self::WrongShape { file, .. }
            | Self::WrongDtype { file, .. }
            | Self::Index { file, .. }
            | Self::QuantState { file, .. }
            | Self::NonFinite { file, .. }
            | Self::MissingAdapterTensors { file, .. }
            | Self::UnexpectedAdapterTensors { file, .. }
            | Self::AdapterPrefix { file, .. }
            | Self::Write { file, .. } => Some(file),
            Self::ShardOfGguf { file } => Some(file),
            Self::MissingTensor { folder, .. }
            | Self::OnlyPickles { folder, .. }
            | Self::ShardNeedsNf4 { folder } => Some(folder),
            Self::AdapterSetting { file, .. }
            | Self::UnsupportedMethod { file, .. }
            | Self::UnsupportedOption { file, .. } => file.as_ref(),
            Self::Use(error) => error.file(),
            _ => None,
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } => match source.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::UnexpectedEof => Kind::User,
                _ => Kind::Transient,
            },
            Self::NotGathered { .. } => Kind::Transient,
            Self::Length { .. } | Self::Network { .. } => Kind::Internal,
            Self::Use(error) => error.kind(),
            Self::Step(error) => error.kind(),
            Self::Device(error) => error.kind(),
            _ => Kind::User,
        }
    }
}

impl Diagnose for Error {
    fn diagnostic(&self) -> Diagnostic {
        let mut diagnostic = Diagnostic::new(self.code(), self).kind(self.kind());
        if let Some(file) = self.file() {
            diagnostic = diagnostic.in_file(file);
        }
        if let Self::Json { source, .. } = self
            && source.line() > 0
        {
            diagnostic = diagnostic.at_line(source.line()).at_column(source.column().max(1), 1);
        }
        match self.hint() {
            Some(hint) => diagnostic.hint(hint),
            None => diagnostic,
        }
    }
}
