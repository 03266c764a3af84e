//! What scripts read: `--json` gives one document on stdout and nothing else, with these fields.

use serde_json::Value;
use tests::perdure::Perdure;

use crate::vm::{COUNTER, MEDIA, TURNS, Vm};

/// These fields are there, and none of them is null.
#[track_caller]
fn has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some_and(|value| !value.is_null()), "no {field}: {document}");
    }
}

#[test]
fn list_tells_name_state_pid_memory_and_medium_of_each_vm() {
    let perdure = Perdure::new();
    assert_eq!(perdure.run(&["list", "--json"]).expect_code(0).json(), serde_json::json!([]));
    for (name, medium) in [("a", "file"), ("b", "nvdimm")] {
        let start = ["run", name, "--detach", "--memory", "8M", "--medium", medium, "--serial", "none"];
        perdure.run(&[&start[..], &COUNTER].concat()).expect_code(0);
    }
    perdure.run(&["powerfail", "b"]).expect_code(0);
    let list = perdure.run(&["list", "--json"]).expect_code(0).json();
    for vm in list.as_array().expect("a list") {
        has(vm, &["name", "state", "memory", "medium", "cpus"]);
        assert_eq!(vm["memory"], 8 << 20, "{vm}");
    }
    assert_eq!(
        (&list[0]["name"], &list[0]["state"], &list[0]["medium"]),
        (&"a".into(), &"running".into(), &"file".into())
    );
    assert!(list[0]["pid"].is_u64(), "{list}");
    assert_eq!(
        (&list[1]["state"], &list[1]["medium"], &list[1]["pid"]),
        (&"frozen".into(), &"nvdimm".into(), &Value::Null)
    );
    let table = perdure.run(&["list"]).expect_code(0).stdout;
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.lines().nth(2).is_some_and(|row| row.starts_with("b ") && row.contains("frozen")), "{table}");
}

#[test]
fn inspect_of_a_frozen_vm_shows_its_context_with_devices_and_vcpus() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&TURNS[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        vm.freeze();
        let document = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
        has(&document, &["name", "state", "memory", "medium", "cpus", "config", "regions", "context"]);
        assert_eq!(document["config"]["cpus"], 2);
        assert_eq!(document["config"]["kernel"]["guest"], "smp");
        let context = &document["context"];
        assert_eq!(context["ram_clean_at"], context["sequence"], "{medium}: the stamp is that of the context");
        let machine = &context["standing"]["machine"];
        assert_eq!(machine["vcpus"].as_array().map(Vec::len), Some(2), "{medium}");
        let devices = machine["devices"].as_object().expect("devices");
        for device in ["serial0", "power", "keyboard-controller"] {
            assert!(devices.contains_key(device), "no {device}: {:?}", devices.keys());
        }
        let regions = document["regions"].as_array().expect("regions");
        for region in regions {
            has(region, &["name", "kind", "medium", "size", "file"]);
            assert!(std::path::Path::new(region["file"].as_str().unwrap()).is_file(), "{region}");
        }
        let text = vm.perdure.run(&["inspect", "web"]).expect_code(0).stdout;
        for told in ["web", "frozen", medium, "clean@", "2 vCPUs"] {
            assert!(text.contains(told), "no {told}: {text}");
        }
    }
}

#[test]
fn inspect_of_a_running_vm_tells_what_it_is_made_of() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    let document = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    has(&document, &["name", "state", "pid", "memory", "medium", "cpus", "config", "regions"]);
    assert_eq!(document["state"], "running");
    assert_eq!(document["config"]["cmdline"], "hz=500 ram=8K", "{document}");
}

#[test]
fn pool_list_df_and_check_are_documents_too() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        let list = vm.perdure.run(&["pool", "list", "--json"]).expect_code(0).json();
        let names: Vec<_> = list.as_array().expect("a list").iter().map(|region| region["name"].clone()).collect();
        assert_eq!(names, ["web/ram", "web/context"]);
        for region in list.as_array().unwrap() {
            has(region, &["name", "kind", "medium", "size", "file", "holder"]);
            assert_eq!(region["holder"], vm.pid(), "{region}");
        }
        let df = vm.perdure.run(&["pool", "df", "--json"]).expect_code(0).json();
        let row = df.as_array().expect("a list").iter().find(|row| row["medium"] == medium).expect("the medium");
        has(row, &["directory", "allocated", "free"]);
        assert!(row["allocated"].as_u64() >= Some(8 << 20), "{row}");
        let check = vm.perdure.run(&["pool", "check", "--json"]).expect_code(0).json();
        assert_eq!(check, serde_json::json!({ "regions": 2, "problems": [] }));
        for what in ["list", "df", "check"] {
            assert!(!vm.perdure.run(&["pool", what]).expect_code(0).stdout.is_empty());
        }
    }
}

#[test]
fn a_limit_of_ram_is_the_pools_until_it_is_lifted() {
    let vm = Vm::new("web");
    let limit = |arguments: &[&str]| {
        let document = vm.perdure.run(&[&["pool", "limit", "--json"], arguments].concat()).expect_code(0).json();
        has(&document, &["promised", "granted"]);
        document["ram"].clone()
    };
    assert_eq!(limit(&["--ram", "8G"]), 8_u64 << 30);
    vm.start(&COUNTER);
    assert_eq!(limit(&[]), 8_u64 << 30);
    assert!(vm.perdure.run(&["pool", "limit"]).expect_code(0).stdout.starts_with("limit 8 GiB"));
    assert_eq!(limit(&["--none"]), Value::Null);
    assert_eq!(limit(&[]), Value::Null);
}

#[test]
fn logs_go_to_stderr_alone() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    for verbose in [&["-vvv", "list", "--json"][..], &["inspect", "web", "--json", "-vvv"]] {
        vm.perdure.run(verbose).expect_code(0).json();
    }
    let mut command = vm.perdure.command(&["list", "--json"]);
    let output = command.env("PERDURE_LOG", "trace").output().expect("perdure runs");
    serde_json::from_slice::<Value>(&output.stdout).expect("one document");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_reason_to_panic() {
    let vm = Vm::new("web");
    vm.start(&TURNS);
    vm.wait_for_more();
    vm.freeze();
    for what in ["inspect web --json", "list --json", "pool list", "man", "completions bash", "--help"] {
        let script = format!(r#"{{ "$0" {what}; echo "status $?" >&2; }} | true"#);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script]).arg(tests::perdure::binary()).env("PERDURE_POOL", vm.perdure.pool());
        let output = command.output().expect("a shell");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked") && !stderr.contains("status 101"), "{what}: {stderr}");
    }
}

#[test]
fn looking_at_a_pool_that_is_not_there_makes_none() {
    for arguments in [&["pool", "list"][..], &["inspect", "web"], &["resume", "--all"], &["stop", "web"]] {
        let perdure = Perdure::new();
        perdure.run(arguments);
        assert!(!perdure.pool().exists(), "{arguments:?} made a pool");
    }
}

#[test]
fn the_config_that_inspect_shows_makes_another_vm_of_the_same_kind() {
    let vm = Vm::new("web");
    vm.start(
        &[&TURNS[..], &["--disk", "data:2M", "--rng", "--balloon", "--clock", "realtime", "--max-snapshots", "7"]]
            .concat(),
    );
    let config = |name: &str| vm.perdure.run(&["inspect", name, "--json"]).expect_code(0).json()["config"].clone();
    let running = config("web");
    vm.wait_for_more();
    vm.freeze();
    assert_eq!(config("web"), running, "it is the same whether the VM runs or not");
    let file = vm.perdure.pool().with_extension("json");
    std::fs::write(&file, running.to_string()).expect("a file");
    let file = file.to_str().expect("a path of plain text");
    vm.perdure.run(&["run", "sibling", "--detach", "--config", file]).expect_code(0);
    assert_eq!(config("sibling"), running);
    vm.perdure.run(&["stop", "sibling", "--timeout", "0s"]).expect_code(0);
    assert_eq!(config("sibling"), running);
}

#[test]
fn run_prints_the_schema_of_its_config_file() {
    let perdure = Perdure::new();
    let schema = perdure.run(&["run", "--config-schema"]).expect_code(0).json();
    assert_eq!(schema["type"], "object");
    has(&schema["properties"], &["cpus", "memory", "kernel", "disks", "net", "vsock", "generations"]);
    assert_eq!(schema["additionalProperties"], false);
    assert!(!perdure.pool().exists(), "nothing is made");
}
