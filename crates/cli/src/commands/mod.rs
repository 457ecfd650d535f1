//! One file a command.

use crate::{
    args::Command,
    failure::{CommandResult, Exit},
    ui::Ui,
};

pub(crate) mod adapters;
pub(crate) mod bench;
pub(crate) mod cancel;
pub(crate) mod certs;
pub(crate) mod chaos;
pub(crate) mod chat;
pub(crate) mod checkpoints;
pub(crate) mod completions;
pub(crate) mod coordinator;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod drain;
pub(crate) mod eval;
pub(crate) mod explain;
pub(crate) mod export;
pub(crate) mod export_history;
pub(crate) mod generate;
pub(crate) mod health;
pub(crate) mod jobs;
pub(crate) mod logits;
pub(crate) mod logs;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod prepare_data;
pub(crate) mod render;
pub(crate) mod resume;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod submit;
pub(crate) mod token;
pub(crate) mod top;
pub(crate) mod up;
pub(crate) mod worker;
pub(crate) mod worker_device;

/// Carries out one command.
pub(crate) fn dispatch(command: Command, ui: &Ui) -> CommandResult<Exit> {
    match command {
        Command::Run(args) => run::execute(args, ui),
        Command::Plan(args) => plan::execute(args, ui),
        Command::Resume(args) => resume::execute(args, ui),
        Command::Submit(args) => submit::execute(args, ui),
        Command::Render(args) => render::execute(args, ui),
        Command::Jobs(args) => jobs::execute(args, ui),
        Command::Status(args) => status::execute(args, ui),
        Command::Top(args) => top::execute(args, ui),
        Command::Logs(args) => logs::execute(args, ui),
        Command::Cancel(args) => cancel::execute(args, ui),
        Command::Drain(args) => drain::execute(args, ui),
        Command::Checkpoints(args) => checkpoints::execute(args, ui),
        Command::Coordinator(args) => coordinator::execute(args, ui),
        Command::Worker(args) => worker::execute(args, ui),
        Command::Up(args) => up::execute(args, ui),
        Command::Certs(args) => certs::execute(args, ui),
        Command::Token(args) => token::execute(args, ui),
        Command::WorkerDevice(args) => worker_device::execute(args, ui),
        Command::PrepareData(args) => prepare_data::execute(args, ui),
        Command::Data(args) => data::execute(args, ui),
        Command::Generate(args) => generate::execute(args, ui),
        Command::Chat(args) => chat::execute(args, ui),
        Command::Eval(args) => eval::execute(args, ui),
        Command::Merge(args) => merge::execute(args, ui),
        Command::Export(args) => export::execute(args, ui),
        Command::Adapters(args) => adapters::execute(args, ui),
        Command::Logits(args) => logits::execute(args, ui),
        Command::Bench(args) => bench::execute(args, ui),
        Command::Health(args) => health::execute(args, ui),
        Command::Doctor(args) => doctor::execute(args, ui),
        Command::Chaos(args) => chaos::execute(args, ui),
        Command::Explain(args) => explain::execute(args, ui),
        Command::Completions(args) => completions::execute(args, ui),
    }
}
