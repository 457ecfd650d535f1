//! `shanty adapters`: looks at adapters and makes new ones of them.

use std::path::PathBuf;

use crate::{
    failure::{CommandResult, Exit},
    ui::Ui,
};

mod check;
mod combine;
mod convert;
mod diff;
mod inspect;
mod rename;

/// Look at adapters, compare, rename, combine and convert them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters inspect runs/pirate/adapter
  shanty adapters diff runs/pirate/adapter runs/gnome/adapter
  shanty adapters combine runs/pirate/adapter runs/gnome/adapter --weights 0.7,0.3 --how svd --out mixed
  shanty adapters convert downloaded --keys peft --out mine
  shanty adapters check runs/pirate/adapter --model models/tiny

Adapters are folders as shanty or PEFT wrote them. Nothing is written over.")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    Inspect(inspect::Args),
    Diff(diff::Args),
    Rename(rename::Args),
    Combine(combine::Args),
    Convert(convert::Args),
    Check(check::Args),
}

/// Where a new adapter goes.
#[derive(Debug, clap::Args)]
struct Out {
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    match args.action {
        Action::Inspect(args) => inspect::execute(&args, ui)?,
        Action::Diff(args) => diff::execute(&args, ui)?,
        Action::Rename(args) => rename::execute(args, ui)?,
        Action::Combine(args) => combine::execute(&args, ui)?,
        Action::Convert(args) => convert::execute(args, ui)?,
        Action::Check(args) => check::execute(&args, ui)?,
    }
    Ok(Exit::Done)
}

/// Lines of a name and what belongs to it, the names in a column.
fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = facts.iter().filter(|(_, value)| !value.is_empty());
    lines.map(|(name, value)| format!("{name:<width$}  {value}")).collect::<Vec<_>>().join("\n")
}

/// A number as people read it, four digits of it.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if (0.001..10_000.0).contains(&size) => {
            let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{value:.digits$}")
        }
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in
            [(0.0, "0"), (1.0, "1.000"), (12.3456, "12.35"), (0.0123, "0.01230"), (1234.5, "1234"), (1e-9, "1.00e-9")]
        {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn facts_line_up_and_empty_ones_are_left_out() {
        let text = facts(&[("a", "1".to_owned()), ("none", String::new()), ("long", "2".to_owned())]);
        assert_eq!(text, "a     1\nlong  2");
    }
}
