//! The reference pages, made from the declarations.

use std::fmt::Write;

use serde_json::Value;

use crate::{
    env_vars::ENVIRONMENT_VARIABLES,
    job::JobSpec,
    load::JOB_REQUIRED,
    service::{CoordinatorFile, WorkerFile},
    shape::{Describe, Field, Shape},
};

const GENERATED: &str = "<!-- Made by `cargo xtask docs` from the source. Change it there. -->\n";

/// The smallest job file: the required keys with their examples.
pub fn smallest_job() -> String {
    let mut text = String::new();
    let mut open = "";
    for (key, example) in JOB_REQUIRED {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        if table != open {
            let _ = writeln!(text, "\n[{table}]");
            open = table;
        }
        let _ = writeln!(text, "{name} = {example}");
    }
    text
}

/// `docs/reference/job.md`.
pub fn job_page() -> String {
    let defaults = toml::from_str::<JobSpec>(&smallest_job()).expect("the smallest job is a job");
    let defaults = serde_json::to_value(defaults).expect("a job can be written as JSON");
    let mut page = format!("{GENERATED}# The job file\n\n");
    page.push_str(
        "A TOML file that says what to fine-tune, on what, and how. Unknown keys are errors.\n\n\
         Relative paths count from the folder of the file. Every key can be set from outside: by an environment \
         variable\n(`SHANTY_JOB__TRAIN__STEPS=5`), and above that by a flag (`--set train.steps=5`). Lists and tables are \
         written as in TOML\n(`--set 'cluster.workers={ min = 1, max = 4 }'`). Relative paths given there count from the \
         current folder.\n\nThe smallest job file:\n\n",
    );
    let _ = write!(page, "```toml\n{}```\n", smallest_job());
    let required: Vec<&str> = JOB_REQUIRED.iter().map(|(key, _)| *key).collect();
    sections(&mut page, &JobSpec::shape(), "", &defaults, &required);
    page
}

/// `docs/reference/services.md`.
pub fn services_page() -> String {
    let mut page = format!("{GENERATED}# The services' files\n\n");
    page.push_str(
        "TOML files, both optional: `shanty coordinator --config FILE`, `shanty worker --config FILE`. Environment \
         variables and\nflags win over the file, as with the job file; relative paths in a file count from its folder.\n",
    );
    let coordinator = serde_json::to_value(CoordinatorFile::default()).expect("it can be written as JSON");
    let _ = write!(page, "\n## Coordinator\n\nVariables: `SHANTY_COORDINATOR__LISTEN` and so on.\n");
    key_table(&mut page, &CoordinatorFile::shape(), "", &coordinator, &[]);
    let worker = serde_json::to_value(WorkerFile::default()).expect("it can be written as JSON");
    let _ = write!(page, "\n## Worker\n\nVariables: `SHANTY_WORKER__THREADS` and so on.\n");
    key_table(&mut page, &WorkerFile::shape(), "", &worker, &[]);
    page
}

/// `docs/reference/environment.md`.
pub fn environment_page() -> String {
    let mut page = format!("{GENERATED}# Environment variables\n\n| variable | what it does |\n|---|---|\n");
    for variable in ENVIRONMENT_VARIABLES {
        let _ = writeln!(page, "| `{}` | {} |", variable.name, cell(variable.doc));
    }
    page
}

/// One section a table: first the keys that hold a value, then the tables in it.
fn sections(page: &mut String, shape: &Shape, parent: &str, defaults: &Value, required: &[&str]) {
    if parent.is_empty() {
        let _ = write!(page, "\n## Top of the file\n");
    }
    key_table(page, shape, parent, defaults, required);
    for field in shape.fields() {
        if !is_section(field) {
            continue;
        }
        let _ = write!(page, "\n## `[{}]`\n\n{}\n", field.key, paragraph(field.doc));
        sections(page, &field.shape, field.key, &defaults[field.key], required);
    }
}

fn is_section(field: &Field) -> bool {
    // Tables of tables stand in the file as inline tables, and in the page as rows of their parent.
    matches!(field.shape, Shape::Table(_))
        && field.shape.fields().iter().any(|inner| inner.key != "min" && inner.key != "max")
}

fn key_table(page: &mut String, shape: &Shape, parent: &str, defaults: &Value, required: &[&str]) {
    let mut rows = Vec::new();
    for field in shape.fields().iter().filter(|field| !is_section(field)) {
        if let Shape::Table(inner) = &field.shape {
            for key in &inner.fields {
                let name = format!("{}.{}", field.key, key.key);
                rows.push((name, key, &defaults[field.key][key.key]));
            }
        } else {
            rows.push((field.key.to_owned(), field, &defaults[field.key]));
        }
    }
    page.push_str("\n| key | type | default | what it is |\n|---|---|---|---|\n");
    let mut words = String::new();
    for (name, field, default) in rows {
        let key = crate::shape::join_key(parent, &name);
        let default = if required.contains(&key.as_str()) {
            "**required**".to_owned()
        } else if default.is_null() {
            "none".to_owned()
        } else {
            format!("`{default}`")
        };
        let _ = writeln!(page, "| `{name}` | {} | {default} | {} |", type_of(&field.shape), cell(field.doc));
        if let Shape::TextOrTables(table) = &field.shape {
            let _ = write!(words, "\nEach table of `{name}`: {}\n\n", paragraph(table.doc));
            for inner in &table.fields {
                let _ = writeln!(
                    words,
                    "- `{}` ({}): {}",
                    inner.key,
                    type_of(&inner.shape),
                    paragraph(inner.doc)
                );
            }
        }
        if !field.shape.words().is_empty() {
            let _ = write!(words, "\n`{name}`:\n");
            for word in field.shape.words() {
                let _ = writeln!(words, "- `{}`: {}", word.word, paragraph(word.doc));
            }
        }
    }
    page.push_str(&words);
}

fn type_of(shape: &Shape) -> String {
    match shape {
        Shape::Table(_) => "table".to_owned(),
        Shape::Integer { .. } => "whole number".to_owned(),
        Shape::Number => "number".to_owned(),
        Shape::Boolean => "`true`, `false`".to_owned(),
        Shape::Text => "text".to_owned(),
        Shape::Path => "path".to_owned(),
        Shape::Words(words) => crate::shape::quoted(words.iter().map(|word| word.word.as_str())),
        Shape::WordsOrInteger { words, .. } => {
            format!("{}, whole number", crate::shape::quoted(words.iter().map(|word| word.word.as_str())))
        }
        Shape::Numbers(length) => format!("list of {length} numbers"),
        Shape::TextOrList => "text or list of texts".to_owned(),
        Shape::TextOrTables(_) => "text or list of tables".to_owned(),
        Shape::Integers { .. } => "list of whole numbers".to_owned(),
        Shape::NumbersByName => "table of names and numbers".to_owned(),
    }
}

fn paragraph(doc: &str) -> String {
    doc.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

fn cell(doc: &str) -> String {
    paragraph(doc).replace('|', "\\|")
}
