//! The commands of docs/guides: every block that is marked `sh test` is run, as it stands, with a tiny job in the folder.

use std::{fs, path::Path};

use shanty_testkit::{Finished, Shanty, Slurm, TinyJob};

use crate::support::Place;

/// The marked blocks of a guide, as one script.
fn script(guide: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guides").join(guide);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut script = String::from("set -euo pipefail\n");
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh test" => inside = true,
            "```" => inside = false,
            command if inside => script.push_str(&format!("{command}\n")),
            _ => {}
        }
    }
    assert!(!inside && script.lines().count() > 2, "{guide} has no commands that are marked");
    script
}

/// Runs a guide's commands; whatever they leave running is killed with the shell.
fn follow(guide: &str, place: &Place, path: &str) -> Finished {
    let program = Path::new(env!("CARGO_BIN_EXE_shanty"));
    let folder = program.parent().unwrap().display();
    let shell = Shanty::new("/bin/bash", place.folder.path())
        .environment("PATH", &format!("{folder}:{path}"))
        .environment("SHANTY_LOG", "warn");
    let script = script(guide);
    shell
        .run(&["-c", &script])
        .unwrap()
        .expect_code(0)
        .unwrap_or_else(|error| panic!("{guide}: {error}\n{script}"))
}

fn place() -> Place {
    Place::new(TinyJob { workers: (1, 2), ..TinyJob::default() }).unwrap()
}

fn path() -> String {
    std::env::var("PATH").unwrap_or_default()
}

#[test]
fn laptop() {
    let place = place();
    follow("laptop.md", &place, &path());
    assert!(place.path("runs/again/adapter/adapter_model.safetensors").is_file());
}

#[test]
fn gpu_box() {
    let place = place();
    let followed = follow("gpu-box.md", &place, &path());
    assert!(followed.stdout.contains("succeeded"), "{}", followed.stdout);
    assert!(place.path("units/shanty-worker.service").is_file());
}

#[test]
fn slurm() {
    let folder = tempfile::tempdir().unwrap();
    let Some(slurm) = Slurm::start(folder.path(), 2).unwrap() else { return };
    // Long enough to be looked at while it runs.
    let job = TinyJob { workers: (1, 2), steps: 2_000, every_steps: 0, ..TinyJob::default() };
    let place = Place::new(job).unwrap().environment("SLURM_CONF", &slurm.conf().display().to_string());
    let shell = place.shanty.of("/bin/bash");
    let program = Path::new(env!("CARGO_BIN_EXE_shanty")).parent().unwrap().display().to_string();
    let shell =
        shell.environment("PATH", &format!("{program}:{}", Slurm::path())).environment("SHANTY_LOG", "warn");
    let followed = shell.run(&["-c", &script("slurm.md")]).unwrap();
    let output = || {
        let files = fs::read_dir(place.path("runs/tiny.slurm")).into_iter().flatten().flatten();
        let outputs = files.filter(|file| file.file_name().to_string_lossy().ends_with(".out"));
        outputs.filter_map(|file| fs::read_to_string(file.path()).ok()).collect::<String>()
    };
    let followed = followed.expect_code(0).unwrap_or_else(|error| panic!("{error}\n{}", output()));
    assert!(followed.stdout.contains("succeeded"), "{}", followed.stdout);
}

#[test]
fn kubernetes() {
    let place = place();
    follow("kubernetes.md", &place, &path());
    let manifests = fs::read_to_string(place.path("tiny.yaml")).unwrap();
    assert!(
        manifests.contains("--host tiny-coordinator-0.tiny-coordinator\n"),
        "the guide's certificate is for that host"
    );
}

#[test]
fn spot() {
    let followed = follow("spot.md", &place(), &path());
    assert!(followed.stdout.contains("\"duplicates\":0"), "{}", followed.stdout);
}

#[test]
fn air_gapped() {
    let place = place();
    follow("air-gapped.md", &place, &path());
    assert!(place.path("authority/node-1.key").is_file());
}
