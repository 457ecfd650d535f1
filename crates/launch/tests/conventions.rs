//! Each engine's variables, as its documentation lists them, and what is made of them.

use shanty_launch::{Devices, Engine, Error, Surroundings};

fn read(variables: &[(&str, &str)]) -> Result<Surroundings, Error> {
    Surroundings::read(|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

/// What an engine sets.
type Variables = &'static [(&'static str, &'static str)];

/// What a case expects: engine, node, nodes, process, coordinator's host, devices.
type Expected = (Engine, Option<u32>, Option<u32>, Option<u32>, Option<&'static str>, Devices);

#[test]
fn every_convention_says_who_where_and_with_what() {
    let cases: [(&str, Variables, Expected); 9] = [
        (
            "torchrun, a process a device",
            &[
                ("TORCHELASTIC_RUN_ID", "none"),
                ("RANK", "9"),
                ("WORLD_SIZE", "16"),
                ("LOCAL_RANK", "1"),
                ("LOCAL_WORLD_SIZE", "8"),
                ("GROUP_RANK", "1"),
                ("GROUP_WORLD_SIZE", "2"),
                ("MASTER_ADDR", "10.0.0.1"),
                ("MASTER_PORT", "29500"),
            ],
            (Engine::Torchrun, Some(1), Some(2), Some(9), Some("10.0.0.1"), Devices::One(1)),
        ),
        (
            "srun, a process a host",
            &[
                ("SLURM_JOB_ID", "17"),
                ("SLURM_JOB_NODELIST", "n[1-4]"),
                ("SLURM_JOB_NUM_NODES", "4"),
                ("SLURM_NODEID", "3"),
                ("SLURM_PROCID", "3"),
                ("SLURM_NTASKS", "4"),
                ("SLURM_LOCALID", "0"),
                ("SLURM_STEP_TASKS_PER_NODE", "1(x4)"),
            ],
            (Engine::Slurm, Some(3), Some(4), Some(3), Some("n1"), Devices::All),
        ),
        (
            "srun, a process a device, all devices seen",
            &[
                ("SLURM_JOB_ID", "17"),
                ("SLURM_JOB_NODELIST", "n[1-2]"),
                ("SLURM_JOB_NUM_NODES", "2"),
                ("SLURM_NODEID", "1"),
                ("SLURM_PROCID", "5"),
                ("SLURM_NTASKS", "6"),
                ("SLURM_LOCALID", "1"),
                ("SLURM_STEP_TASKS_PER_NODE", "4,2"),
                ("CUDA_VISIBLE_DEVICES", "0,1"),
            ],
            (Engine::Slurm, Some(1), Some(2), Some(5), Some("n1"), Devices::One(1)),
        ),
        (
            "srun --gpus-per-task=1",
            &[
                ("SLURM_JOB_ID", "17"),
                ("SLURM_JOB_NODELIST", "n1"),
                ("SLURM_NNODES", "1"),
                ("SLURM_NODEID", "0"),
                ("SLURM_PROCID", "1"),
                ("SLURM_NTASKS", "2"),
                ("SLURM_LOCALID", "1"),
                ("SLURM_STEP_TASKS_PER_NODE", "2"),
                ("CUDA_VISIBLE_DEVICES", "3"),
            ],
            (Engine::Slurm, Some(0), Some(1), Some(1), Some("n1"), Devices::One(0)),
        ),
        (
            "a batch script without srun, though the allocation is for eight tasks",
            &[
                ("SLURM_JOB_ID", "17"),
                ("SLURM_JOB_NODELIST", "n[1-2]"),
                ("SLURM_JOB_NUM_NODES", "2"),
                ("SLURM_NTASKS", "8"),
                ("SLURM_TASKS_PER_NODE", "4(x2)"),
                ("SLURM_NODEID", "0"),
            ],
            (Engine::Slurm, Some(0), Some(2), None, Some("n1"), Devices::All),
        ),
        (
            "a TrainJob, whose pods are those of an Indexed Job",
            &[
                ("PET_NNODES", "3"),
                ("PET_NPROC_PER_NODE", "auto"),
                ("PET_NODE_RANK", "2"),
                ("PET_MASTER_ADDR", "job-node-0-0.job"),
                ("PET_MASTER_PORT", "29400"),
                ("JOB_COMPLETION_INDEX", "2"),
            ],
            (Engine::TrainJob, Some(2), Some(3), None, Some("job-node-0-0.job"), Devices::All),
        ),
        (
            "SkyPilot",
            &[
                ("SKYPILOT_NODE_RANK", "1"),
                ("SKYPILOT_NUM_NODES", "2"),
                ("SKYPILOT_NODE_IPS", "10.1.0.4\n10.1.0.5"),
                ("SKYPILOT_NUM_GPUS_PER_NODE", "8"),
            ],
            (Engine::SkyPilot, Some(1), Some(2), None, Some("10.1.0.4"), Devices::All),
        ),
        (
            "dstack",
            &[
                ("DSTACK_NODE_RANK", "0"),
                ("DSTACK_NODES_NUM", "2"),
                ("DSTACK_MASTER_NODE_IP", "fd00::7"),
                ("DSTACK_RUN_NAME", "wet-mangust-1"),
            ],
            (Engine::Dstack, Some(0), Some(2), None, Some("fd00::7"), Devices::All),
        ),
        (
            "an Indexed Job",
            &[("JOB_COMPLETION_INDEX", "5")],
            (Engine::IndexedJob, Some(5), None, None, None, Devices::All),
        ),
    ];
    for (case, variables, expected) in cases {
        let found = read(variables).unwrap();
        let (engine, node, nodes, process, host, devices) = expected;
        assert_eq!(found.engine, Some(engine), "{case}");
        assert_eq!((found.node, found.nodes, found.process), (node, nodes, process), "{case}");
        assert_eq!(found.coordinator_host.as_deref(), host, "{case}");
        assert_eq!(found.devices(), devices, "{case}");
    }
}

#[test]
fn what_wraps_another_engine_is_asked_first() {
    let both = [
        ("SLURM_JOB_ID", "17"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
        ("TORCHELASTIC_RUN_ID", "x"),
        ("MASTER_ADDR", "n2"),
    ];
    let found = read(&both).unwrap();
    assert_eq!((found.engine, found.coordinator_host.as_deref()), (Some(Engine::Torchrun), Some("n2")));
}

#[test]
fn without_an_engine_nothing_is_said_and_all_devices_are_ones_own() {
    let found = read(&[("PATH", "/bin"), ("SLURM_JOB_ID", "")]).unwrap();
    assert_eq!(found, Surroundings::default());
    assert_eq!(found.devices(), Devices::All);
    assert_eq!(found.coordinator("http", 7461), None);
    assert!(found.is_first());
}

#[test]
fn the_coordinators_url_has_our_port_and_brackets_around_ipv6() {
    let host =
        |host: &str| Surroundings { coordinator_host: Some(host.to_owned()), ..Surroundings::default() };
    assert_eq!(host("n1").coordinator("https", 7461).as_deref(), Some("https://n1:7461"));
    assert_eq!(host("fd00::7").coordinator("http", 80).as_deref(), Some("http://[fd00::7]:80"));
}

#[test]
fn one_process_of_a_launch_is_the_first() {
    let srun = |process: &'static str, local: &'static str| {
        read(&[("SLURM_JOB_ID", "1"), ("SLURM_PROCID", process), ("SLURM_LOCALID", local)]).unwrap()
    };
    assert!(srun("0", "0").is_first());
    assert!(!srun("1", "1").is_first());
    assert!(!srun("2", "0").is_first());
}

#[test]
fn an_array_task_has_a_name_of_its_own() {
    let found = read(&[("SLURM_JOB_ID", "20"), ("SLURM_ARRAY_JOB_ID", "18"), ("SLURM_ARRAY_TASK_ID", "2")]);
    assert_eq!(found.unwrap().launch.as_deref(), Some("18_2"));
}

#[test]
fn a_number_that_is_none_is_named() {
    let error = read(&[("SLURM_JOB_ID", "1"), ("SLURM_NODEID", "two")]).unwrap_err();
    assert_eq!(error.code(), "SH0960");
    assert!(error.to_string().contains("SLURM_NODEID=two"), "{error}");
    let error = read(&[("SLURM_JOB_ID", "1"), ("SLURM_JOB_NODELIST", "n[3-1]")]).unwrap_err();
    assert_eq!(error.code(), "SH0961");
}

#[test]
fn a_process_that_is_started_again_at_its_place_has_its_name_again() {
    const SLURM: Variables =
        &[("SLURM_JOB_ID", "91"), ("SLURM_PROCID", "2"), ("SLURM_LOCALID", "0"), ("SLURM_NODEID", "1")];
    let cases: [(Variables, Option<&str>); 8] = [
        (&[], None),
        (SLURM, Some("slurm-91-2")),
        (
            &[("SLURM_JOB_ID", "20"), ("SLURM_ARRAY_JOB_ID", "18"), ("SLURM_ARRAY_TASK_ID", "2")],
            Some("slurm-18_2"),
        ),
        (&[("JOB_COMPLETION_INDEX", "3"), ("HOSTNAME", "pirate-worker-0-3")], Some("pirate-worker-0-3")),
        (&[("JOB_COMPLETION_INDEX", "3")], Some("kubernetes-3")),
        (&[("TORCHELASTIC_RUN_ID", "x/y"), ("RANK", "5")], Some("torchrun-5")),
        (&[("DSTACK_NODE_RANK", "1"), ("DSTACK_RUN_NAME", "wet mango")], Some("dstack-wet-mango-1")),
        (&[("JOB_COMPLETION_INDEX", "0"), ("HOSTNAME", ".-\u{e4}x")], Some("x")),
    ];
    for (variables, name) in cases {
        assert_eq!(read(variables).unwrap().name().as_deref(), name, "{variables:?}");
    }
}

#[test]
fn threads_are_those_that_the_engine_gave_and_never_none() {
    let threads = |variables: &[(&str, &str)], available| read(variables).unwrap().threads(available);
    assert_eq!(threads(&[], 16), 16);
    assert_eq!(threads(&[("SLURM_JOB_ID", "1"), ("SLURM_CPUS_PER_TASK", "4")], 16), 4);
    assert_eq!(threads(&[("SLURM_JOB_ID", "1"), ("SLURM_CPUS_PER_TASK", "64")], 16), 16);
    let torchrun = [("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "8")];
    assert_eq!((threads(&torchrun, 16), threads(&torchrun, 2)), (2, 1));
}
