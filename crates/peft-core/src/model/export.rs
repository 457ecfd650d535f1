//! Writes a base in NF4 as transformers with bitsandbytes saves it.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::{
    error::{Error, Origin, Result},
    model::{
        BaseSource, ModelConfig, ResidentBase,
        base::Matrix,
        config::config_text,
        weights::{ModelFiles, SINGLE_FILE},
    },
    quant::{
        Nf4Options,
        bitsandbytes::{self, OwnedTensor, StoredWeight},
    },
};

/// Quantises the base in `source`, a folder or a GGUF file, and writes `config.json` and `model.safetensors` into `target`.
///
/// transformers opens the folder as one that was saved with `BitsAndBytesConfig(load_in_4bit=True,
/// bnb_4bit_quant_type="nf4")`. Tensors other than the decoder's linear weights keep their bytes; what was pre-quantised
/// stays as it is. Tokenizer files are the caller's.
///
/// # Errors
/// `source` cannot be loaded, or `target` cannot be written.
pub fn save_nf4(source: &Path, target: &Path, options: Nf4Options) -> Result<()> {
    let base = ResidentBase::load(source, Some(options), &mut |_| {})?;
    let files = ModelFiles::open(source)?;
    let mut tensors = Vec::new();
    let mut done = std::collections::BTreeSet::new();
    let mut dtype = None;
    for layer in 0..base.config().layers {
        for &projection in base.config().projections() {
            let name = format!("{}.weight", projection.module(layer));
            let Matrix::Nf4(view) = base.weights(layer).linear(projection).weight else { continue };
            let original = if bitsandbytes::is_stored(&files, &name) {
                let stored = StoredWeight::open(&files, &name, base.config().shape(projection))?;
                done.extend(stored.tensors().map(|tensor| tensor.name().to_owned()));
                stored.dtype().to_owned()
            } else {
                torch_name(files.tensor(&name)?.dtype()).to_owned()
            };
            tensors.extend(bitsandbytes::to_tensors(&name, &view, &original));
            dtype.get_or_insert(original);
            done.insert(name);
        }
    }
    for name in files.names().filter(|name| !done.contains(*name)) {
        let tensor = files.tensor(name)?;
        let (dtype, bytes) = match tensor.is_plain() {
            true => {
                let mut bytes = vec![0; tensor.bytes()];
                tensor.read_bytes(&mut bytes, &mut |_| {})?;
                (tensor.dtype(), bytes)
            }
            false => {
                let mut numbers = vec![0.0; tensor.elements()];
                tensor.read_f32(&mut numbers, &mut |_| {})?;
                (Dtype::F32, numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
            }
        };
        let shape = tensor.shape().to_vec();
        tensors.push(OwnedTensor { name: name.to_owned(), dtype, shape, bytes });
    }
    write(target, &tensors, &config(source, dtype.as_deref().unwrap_or("float32"), options.double)?)
}

/// As torch names it.
pub(crate) fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

/// `config.json` of `source` with the settings that transformers saves beside NF4 weights.
fn config(source: &Path, dtype: &str, double: bool) -> Result<String> {
    let (text, file) = config_text(source)?;
    // Checked by loading: a JSON object of a known family.
    let stored_nf4 = ModelConfig::from_json(&text, &file)?.stored_nf4;
    let parsed: Result<BTreeMap<String, Value>, _> = serde_json::from_slice(&text);
    let mut json = parsed.map_err(|source| Error::Json { origin: Origin::Base, file, source })?;
    if !stored_nf4 {
        let settings = nf4_settings(dtype, double);
        json.insert("quantization_config".to_owned(), settings);
    }
    Ok(format!("{:#}\n", json!(json)))
}

/// What transformers saves beside NF4 weights; `dtype` is what products are computed in, as torch names it.
pub(crate) fn nf4_settings(dtype: &str, double: bool) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes"
    })
}

fn write(target: &Path, tensors: &[OwnedTensor], config: &str) -> Result<()> {
    let unwritable =
        |file: &Path, source: io::Error| Error::Write { origin: Origin::Base, file: file.to_owned(), source };
    fs::create_dir_all(target).map_err(|source| unwritable(target, source))?;
    let path = target.join(SINGLE_FILE);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    // Written beside and renamed by the library.
    safetensors::serialize_to_file(views, Some(metadata), &path)
        .map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => source,
            other => io::Error::other(other),
        })
        // The library's temporary file is its owner's alone; a model is not.
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
        .map_err(|source| unwritable(&path, source))?;
    let path = target.join("config.json");
    fs::write(&path, config).map_err(|source| unwritable(&path, source))
}
