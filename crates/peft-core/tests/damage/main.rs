//! Damaged and impossible folders: each gives its code, names its file, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod adapter;
mod base;
#[path = "../common/mod.rs"]
mod common;
mod families;
mod scene;

use std::path::Path;

use scene::{Damage, index, spoilt};
use shanty_diagnostic::Diagnose as _;
use shanty_peft_core::{adapter::AdapterFolder, model::ResidentBase};

#[test]
fn the_undamaged_copies_are_fine() {
    let nothing: Damage = Box::new(|_| {});
    for source in ["models/llama", "nf4/checkpoint_double/model"] {
        ResidentBase::load(spoilt(source, &nothing).path(), None, &mut |_| {}).unwrap();
    }
    AdapterFolder::open(spoilt("adapters/lora_qv/llama/adapter", &nothing).path()).unwrap();
    // An index that is right.
    let folder = spoilt("models/llama", &index(|_| {}));
    ResidentBase::load(folder.path(), None, &mut |_| {}).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    let nowhere = Path::new("/nowhere/at/all");
    let error = ResidentBase::load(nowhere, None, &mut |_| {}).unwrap_err();
    assert_eq!(error.code(), "SH0301");
    assert!(error.diagnostic().hint.unwrap().contains("config.json"));
    assert_eq!(AdapterFolder::open(nowhere).unwrap_err().code(), "SH0401");
}
