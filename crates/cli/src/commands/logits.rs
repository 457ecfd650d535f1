//! `shanty logits`: raw logits in a file, for comparing with other programs.

use std::path::PathBuf;

use serde_json::json;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    flags::AdapterFlag,
    model::{BaseQuantization, Model, ModelOptions},
    ui::Ui,
};

/// Write the logits of given token ids to a safetensors file
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty logits --model models/tiny --ids '[[1, 2, 3]]' --out logits.safetensors
  shanty logits --model models/tiny --adapter runs/pirate/adapter --quantization none --ids '[[1, 2]]' --out l.st

The file holds `logits`, f32, [batch, tokens, vocabulary].")]
pub(crate) struct Args {
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The adapter's folder, as shanty or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<AdapterFlag>,
    /// Use the adapter although it was trained on another base
    #[arg(long)]
    force: bool,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t = BaseQuantization::None)]
    quantization: BaseQuantization,
    /// Rows of token ids, a JSON list of equally long lists
    #[arg(long, value_name = "JSON")]
    ids: String,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let rows = read_ids(&args.ids)?;
    let tokens = rows[0].len();
    let options = ModelOptions {
        base: args.model,
        nf4: args.quantization.nf4(),
        adapters: args.adapter.into_iter().collect(),
        force: args.force,
        threads: args.threads.map_or(0, usize::from),
        max_length: Some(tokens.max(2)),
    };
    let mut model = Model::load(&options, ui)?;
    let vocabulary = model.vocabulary();
    let beyond = rows.iter().flatten().find(|id| **id as usize >= vocabulary);
    if let Some(id) = beyond {
        let reason = format!("{id} is not below the vocabulary of {vocabulary}");
        return Err(Error::Ids { reason }.into());
    }
    let logits = model.logits(model.first(), &rows)?;
    let shape = [rows.len(), tokens, vocabulary];
    write(&args.out, &shape, &logits)?;
    ui.data(&json!({ "out": args.out, "shape": shape }), |_| {
        format!("{} holds logits {shape:?}", args.out.display())
    })?;
    Ok(Exit::Done)
}

fn read_ids(text: &str) -> Result<Vec<Vec<u32>>, Error> {
    let rows: Vec<Vec<u32>> =
        serde_json::from_str(text).map_err(|error| Error::Ids { reason: error.to_string() })?;
    let length = rows.first().map_or(0, Vec::len);
    if length == 0 {
        return Err(Error::Ids { reason: "there is no id in it".to_owned() });
    }
    if let Some(other) = rows.iter().find(|row| row.len() != length) {
        return Err(Error::Ids { reason: format!("one row has {length} ids, another {}", other.len()) });
    }
    Ok(rows)
}

fn write(path: &PathBuf, shape: &[usize], numbers: &[f32]) -> CommandResult<()> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes)
        .map_err(|error| Error::Answer { reason: format!("failed to lay out the logits: {error}") })?;
    let file = safetensors::serialize([("logits", view)], None)
        .map_err(|error| Error::Answer { reason: format!("failed to lay out the logits: {error}") })?;
    // To another name first: who reads `path` finds the whole file or none.
    let partial = path.with_extension("partial");
    std::fs::write(&partial, file).and_then(|()| std::fs::rename(&partial, path)).map_err(|source| {
        let _ = std::fs::remove_file(&partial);
        Error::File { action: "write", path: path.clone(), source }.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_equally_long_rows() {
        assert_eq!(read_ids("[[1,2],[3,4]]").unwrap(), [[1, 2], [3, 4]]);
        for wrong in ["", "[1,2]", "[]", "[[]]", "[[1],[2,3]]", "[[-1]]", "[[1.5]]"] {
            assert!(read_ids(wrong).is_err(), "{wrong}");
        }
    }
}
