//! Relative paths: those of a file count from its folder, those of a variable or a flag from the current folder.

use std::{
    env,
    path::{Component, Path, PathBuf},
};

use crate::{
    job::{JobSpec, is_url},
    layers::folder_of,
    loaded::Sources,
};

/// Makes every path of a job absolute, and names the store where it is not named.
pub(crate) fn resolve_job(spec: &mut JobSpec, sources: &Sources) {
    let folder = |key: &str| folder_of(&sources.locate_named(key), &sources.path);
    spec.base.model = model_reference(&folder("base.model"), &spec.base.model);
    let data = folder("data.train");
    spec.data.train.map_paths(|path| absolute_pattern(&data, path));
    if let Some(eval) = &mut spec.data.eval {
        *eval = absolute_pattern(&folder("data.eval"), eval);
    }
    let here = |path: &Path| absolute(Path::new(""), path);
    spec.checkpoint.store = Some(match &spec.checkpoint.store {
        Some(store) if is_url(store) => store.clone(),
        Some(store) => absolute(&folder("checkpoint.store"), store),
        None => here(&Path::new("runs").join(&spec.name)),
    });
    spec.checkpoint.run_folder = match &spec.checkpoint.run_folder {
        Some(named) => Some(absolute(&folder("checkpoint.run_folder"), named)),
        None if spec.checkpoint.is_remote() => Some(here(&Path::new("runs").join(&spec.name))),
        None => None,
    };
}

/// `path`, seen from `folder`, as an absolute path without `.` and, where that changes nothing, without `..`.
pub(crate) fn absolute(folder: &Path, path: &Path) -> PathBuf {
    let joined = env::current_dir().unwrap_or_default().join(folder).join(path);
    let tidy = without_dots(&joined);
    // Behind a symbolic link `a/../b` is not `b`.
    match (joined.canonicalize(), tidy.canonicalize()) {
        (Ok(real), Ok(tidied)) if real != tidied => joined,
        (Ok(_), Err(_)) => joined,
        _ => tidy,
    }
}

/// What the name of a model on the Hugging Face hub begins with, once it is known to be one.
pub const HUB: &str = "hf://";

/// A model as it is named in a file or on the command line: `hf://org/name`, with `@revision` perhaps, for a model of the
/// hub; the absolute path of a folder or file for all else.
///
/// `org/name` is of the hub if it can be a name there and if neither it nor a folder `org` lies in `folder`: whoever
/// writes `models/tiny` beside a folder `models` means a path.
pub fn model_reference(folder: &Path, model: &Path) -> PathBuf {
    let Some(name) = model.to_str() else { return absolute(folder, model) };
    if name.starts_with(HUB) {
        return model.to_owned();
    }
    match name.split_once('/') {
        Some((org, _)) if is_hub_name(name) && !absolute(folder, Path::new(org)).exists() => {
            PathBuf::from(format!("{HUB}{name}"))
        }
        _ => absolute(folder, model),
    }
}

/// Words that the hub keeps for itself, so that `models/tiny` is a folder that is missing, and nobody's model.
const NO_ORGANISATIONS: [&str; 6] = ["models", "datasets", "spaces", "docs", "api", "settings"];

/// Whether a text is `org/name` or `org/name@revision` as the hub allows it.
fn is_hub_name(text: &str) -> bool {
    let (id, revision) = text.split_once('@').map_or((text, None), |(id, revision)| (id, Some(revision)));
    let part = |part: &str| {
        let good = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
        let ends = |letter: char| matches!(letter, '-' | '.');
        (1..=96).contains(&part.len())
            && part.chars().all(good)
            && !part.starts_with(ends)
            && !part.ends_with(ends)
    };
    // A name that ends like a file is one.
    let is_file = id.ends_with(".gguf") || id.ends_with(".safetensors");
    let parts: Vec<&str> = id.split('/').collect();
    parts.len() == 2
        && !NO_ORGANISATIONS.contains(&parts[0])
        && !is_file
        && parts.iter().all(|inner| part(inner))
        && revision.is_none_or(|revision| !revision.is_empty())
}

/// The same for data: a path, a glob, or a URL, which stays as it is.
pub(crate) fn absolute_pattern(folder: &Path, pattern: &str) -> String {
    if pattern.contains("://") || pattern.is_empty() {
        return pattern.to_owned();
    }
    // A name that exists is taken as it is, also with brackets in it.
    let named = absolute(folder, Path::new(pattern));
    if named.exists() {
        return named.to_string_lossy().into_owned();
    }
    let first_glob = Path::new(pattern)
        .components()
        .position(|part| part.as_os_str().to_string_lossy().contains(['*', '?', '[']));
    let Some(first_glob) = first_glob else {
        return named.to_string_lossy().into_owned();
    };
    let parts: Vec<Component<'_>> = Path::new(pattern).components().collect();
    let plain: PathBuf = parts[..first_glob].iter().collect();
    let rest: PathBuf = parts[first_glob..].iter().collect();
    let prefix = absolute(folder, &plain);
    // A bracket in the folder's own name is no glob.
    let prefix = glob::Pattern::escape(&prefix.to_string_lossy());
    Path::new(&prefix).join(rest).to_string_lossy().into_owned()
}

fn without_dots(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                tidy.pop();
            }
            other => tidy.push(other),
        }
    }
    tidy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_go_and_globs_stay() {
        assert_eq!(absolute(Path::new("/jobs/a"), Path::new("../model")), Path::new("/jobs/model"));
        assert_eq!(absolute(Path::new("/jobs"), Path::new("/m")), Path::new("/m"));
        assert_eq!(absolute_pattern(Path::new("/jobs/a"), "../d/*.jsonl"), "/jobs/d/*.jsonl");
        assert_eq!(absolute_pattern(Path::new("/jo[b]s"), "d/*.jsonl"), "/jo[[]b[]]s/d/*.jsonl");
        assert_eq!(absolute_pattern(Path::new("/jobs"), "s3://bucket/*.jsonl"), "s3://bucket/*.jsonl");
    }

    #[test]
    fn models_of_the_hub_are_told_from_paths() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("models")).expect("create");
        let reference = |model: &str| model_reference(folder.path(), Path::new(model));
        let hub = ["org/name", "org/name@main", "Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1", "a_b/c.d"];
        for model in hub {
            assert_eq!(reference(model), Path::new(&format!("{HUB}{model}")));
        }
        assert_eq!(reference("hf://org/name"), Path::new("hf://org/name"));
        let paths = [
            "models/tiny",
            "tiny",
            "./org/name",
            "../org/name",
            "/org/name",
            "a/b/c",
            "org/n.gguf",
            "o/-n",
            "org/",
        ];
        for model in paths {
            assert_eq!(reference(model), absolute(folder.path(), Path::new(model)), "{model}");
        }
    }

    #[test]
    fn a_file_with_brackets_in_its_name_is_no_glob() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("d[1]");
        std::fs::create_dir(&path).expect("create");
        std::fs::write(path.join("a[2].jsonl"), "").expect("write");
        let named = absolute_pattern(&path, "a[2].jsonl");
        assert_eq!(Path::new(&named), path.join("a[2].jsonl"));
    }

    #[cfg(unix)]
    #[test]
    fn a_step_up_behind_a_symbolic_link_is_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let real = folder.path().join("real/inner");
        std::fs::create_dir_all(&real).expect("create");
        std::fs::create_dir(folder.path().join("real/model")).expect("create");
        std::os::unix::fs::symlink(&real, folder.path().join("link")).expect("link");
        let path = absolute(folder.path(), Path::new("link/../model"));
        assert!(path.is_dir(), "{} leads nowhere", path.display());
    }
}
