//! What a job's files must be: every check that looks at the disk, and none that reads tensors or rows.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{error::Error, job::JobSpec, loaded::Loaded, paths::HUB};

/// Files and folders that are not there, or are not what the job needs.
///
/// To be called on the machine that holds them. Writes nothing that stays.
pub(crate) fn check(job: &Loaded<JobSpec>) -> Vec<Error> {
    let mut errors = Vec::new();
    base_model(job, &mut errors);
    for (key, path) in job.value.data.train.paths() {
        data(job, &key, path, &mut errors);
    }
    if let Some(eval) = &job.value.data.eval {
        data(job, "data.eval", eval, &mut errors);
    }
    let checkpoint = &job.value.checkpoint;
    if let Some(store) = checkpoint.store.as_ref().filter(|_| !checkpoint.is_remote()) {
        writable(job, "checkpoint.store", store, &mut errors);
    }
    if let Some(folder) = &checkpoint.run_folder {
        writable(job, "checkpoint.run_folder", folder, &mut errors);
    }
    errors
}

fn base_model(job: &Loaded<JobSpec>, errors: &mut Vec<Error>) {
    let folder = &job.value.base.model;
    if folder.as_os_str().to_string_lossy().starts_with(HUB) {
        // What the hub holds is seen when it is asked.
        return;
    }
    let mut refuse = |reason: String, hint: &str| {
        errors.push(Error::BaseModel {
            path: folder.clone(),
            reason,
            hint: hint.to_owned(),
            place: job.locate("base.model"),
        });
    };
    let layout =
        "name a folder in Hugging Face layout (config.json, *.safetensors, tokenizer.json) or a GGUF file";
    match fs::metadata(folder) {
        Err(error) => return refuse(in_words(&error), "paths in the job file count from its folder"),
        // What is inside is looked at by whoever reads it: it says more than a missing file would.
        Ok(found) if found.is_file() && is_gguf(folder) => return,
        Ok(found) if !found.is_dir() => {
            return refuse("it is neither a folder nor a GGUF file".to_owned(), layout);
        }
        Ok(_) => {}
    }
    let config = match fs::read_to_string(folder.join("config.json")) {
        Ok(config) => config,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return refuse("it has no config.json".to_owned(), layout);
        }
        Err(error) => return refuse(format!("config.json: {}", in_words(&error)), layout),
    };
    let config: serde_json::Value = match serde_json::from_str(&config) {
        Ok(config) => config,
        Err(error) => return refuse(format!("config.json is no JSON: {error}"), "fetch the file again"),
    };
    if !folder.join("tokenizer.json").is_file() {
        return refuse("it has no tokenizer.json".to_owned(), layout);
    }
    if !has_weights(folder) {
        return refuse("it has no *.safetensors".to_owned(), layout);
    }
    let max_length = job.value.data.max_length;
    if let Some(context) = context_of(&config)
        && max_length as u64 > context
    {
        let place = job.locate("data.max_length");
        errors.push(Error::ContextExceeded { max_length, context, place });
    }
}

/// Whether a file begins as GGUF does.
fn is_gguf(file: &Path) -> bool {
    let mut magic = [0; 4];
    let read = fs::File::open(file).and_then(|mut file| io::Read::read_exact(&mut file, &mut magic));
    read.is_ok() && &magic == b"GGUF"
}

fn has_weights(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"))
}

/// The longest row that a model was made for, tokens; none where its config does not say.
pub(crate) fn context_of(config: &serde_json::Value) -> Option<u64> {
    const NAMES: [&str; 4] = ["max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"];
    let inner = config.get("text_config");
    NAMES.iter().find_map(|name| {
        let value = config.get(name).or_else(|| inner?.get(name))?;
        value.as_u64().filter(|context| *context > 0)
    })
}

fn data(job: &Loaded<JobSpec>, key: &str, pattern: &str, errors: &mut Vec<Error>) {
    let mut refuse = |reason: String, hint: &str| {
        errors.push(Error::Data {
            key: key.to_owned(),
            pattern: pattern.to_owned(),
            reason,
            hint: hint.to_owned(),
            place: job.locate(key),
        });
    };
    if pattern.contains("://") {
        // What a store holds is seen when it is asked.
        return;
    }
    let is_glob = pattern.contains(['*', '?', '[']) && !Path::new(pattern).exists();
    if !is_glob {
        match fs::metadata(pattern) {
            Err(error) => refuse(in_words(&error), "paths in the job file count from its folder"),
            Ok(found) if found.is_dir() => {
                refuse("it is a folder".to_owned(), "name its files with a glob, such as `data/*.jsonl`");
            }
            Ok(_) => {}
        }
        return;
    }
    let matched = glob::glob(pattern).map(|paths| paths.flatten().any(|path| path.is_file()));
    if !matches!(matched, Ok(true)) {
        refuse("no file matches the glob".to_owned(), "globs in the job file count from its folder");
    }
}

/// Whether a folder, or the nearest folder above it that is there, can be written to.
fn writable(job: &Loaded<JobSpec>, key: &str, folder: &Path, errors: &mut Vec<Error>) {
    let nearest: Option<PathBuf> = folder.ancestors().find(|path| path.exists()).map(Path::to_owned);
    let reason = match nearest {
        None => "no folder above it is there".to_owned(),
        Some(path) if !path.is_dir() => format!("`{}` is a file, not a folder", path.display()),
        Some(path) => match probe(&path) {
            Ok(()) => return,
            Err(error) => in_words(&error),
        },
    };
    errors.push(Error::Unwritable {
        key: key.to_owned(),
        path: folder.to_owned(),
        reason,
        place: job.locate(key),
    });
}

/// Rights alone do not tell (read-only mounts, full disks, quotas): only a write does.
fn probe(folder: &Path) -> io::Result<()> {
    let path = folder.join(format!(".shanty-probe-{}", std::process::id()));
    fs::write(&path, b"probe")?;
    fs::remove_file(&path)
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file or folder".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_is_found_under_its_usual_names() {
        let context = |text: &str| context_of(&serde_json::from_str(text).expect("JSON"));
        assert_eq!(context(r#"{"max_position_embeddings": 512}"#), Some(512));
        assert_eq!(context(r#"{"n_positions": 1024}"#), Some(1024));
        assert_eq!(context(r#"{"text_config": {"max_position_embeddings": 8192}}"#), Some(8192));
        assert_eq!(context(r#"{"max_position_embeddings": "many"}"#), None);
        assert_eq!(context("[]"), None);
    }
}
