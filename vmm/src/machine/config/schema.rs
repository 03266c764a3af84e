//! The JSON schema of what `--config` reads, derived from the types themselves, and compared with the file in which people find it.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::*;

/// Renews the file where it is set: `PERDURE_RENEW_SCHEMA=1 cargo test -p vmm --lib schema`.
const RENEW: &str = "PERDURE_RENEW_SCHEMA";

/// A type of another crate, or of custom form: its name, and what its text or number is.
macro_rules! schema_of {
    ($type:ty, $name:literal, $($schema:tt)+) => {
        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($($schema)+)
            }
        }
    };
}

pub(super) struct Medium;
pub(super) struct MacAddress;
pub(super) struct GuestCid;

schema_of!(ByteSize, "ByteSize", {
    "description": "A number of bytes, or a text as in 512M or 4G (binary units)",
    "anyOf": [
        { "type": "integer", "minimum": 0 },
        { "type": "string", "pattern": "^ *[0-9]+([KMGTkmgt])?([iI]?[bB])? *$" },
    ],
});
schema_of!(Medium, "Medium", { "enum": MediumKind::ALL.map(|medium| medium.to_string()) });
schema_of!(MacAddress, "MacAddress", {
    "description": "A unicast address, as in 02:00:5e:10:00:01",
    "type": "string",
    "pattern": "^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$",
});
schema_of!(GuestCid, "GuestCid", { "type": "integer", "minimum": 3, "maximum": u32::MAX - 1 });

fn generated() -> Value {
    let mut schema = schemars::schema_for!(VmConfig).to_value();
    schema["title"] = json!("A virtual machine of perdure");
    schema["description"] = json!(
        "What `perdure run NAME --config FILE.json` reads, and `perdure inspect NAME --json` shows as \"config\""
    );
    schema
}

#[test]
fn the_schema_in_the_repository_is_that_of_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.schema.json");
    let text = format!("{:#}\n", generated());
    if std::env::var_os(RENEW).is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap();
    assert!(
        stored == text,
        "{} is not what the types say: `{RENEW}=1 cargo test -p vmm --lib schema` renews it",
        path.display()
    );
}

/// A configuration in which nothing is left out.
fn full() -> VmConfig {
    let text = json!({
        "cpus": 2, "memory": "1G", "ram": "256M", "ram_min": 67_108_864, "swap": "2GiB", "medium": "nvdimm",
        "kernel": { "file": { "path": "/boot/vmlinuz", "initrd": "/boot/initrd" } }, "cmdline": "console=ttyS0",
        "disks": [{ "pool": { "name": "data", "size": "10G" } }, { "file": { "path": "/srv/a.img", "read-only": true } }],
        "serial": { "file": "/var/log/web" }, "console": "virtio", "pmem": [{ "name": "log", "size": "64M" }], "clock": "realtime", "rng": true, "balloon": true,
        "net": [{ "tap": "vm0", "mac": "02:00:5e:10:00:01" }], "vsock": { "cid": 3, "socket": "/run/web.vsock" },
        "holdup_us": 16_000, "snapshot_every_ms": 1000, "family": "web",
        "generations": { "max_snapshots": 5, "expiration_ms": 1, "redundancy": 2, "integrity": "warn", "compress": "lz4" },
    });
    serde_json::from_value(text).unwrap()
}

#[test]
fn every_field_is_described_and_none_that_is_not_there() {
    // Options that are not set are not written, so the schema is asked for its own list.
    let (schema, written) = (generated(), serde_json::to_value(full()).unwrap());
    let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(fields(&schema["properties"]), fields(&written), "`full` shows every field");
    for (name, field) in schema["properties"].as_object().unwrap() {
        assert!(field["description"].is_string(), "{name}");
    }
    let objects = schema["$defs"].as_object().unwrap().values().chain([&schema]);
    for object in objects.filter(|object| object["properties"].is_object()) {
        assert_eq!(object["additionalProperties"], false, "what is unknown is refused: {object:#}");
    }
}

/// A text that the pattern of a type of the schema takes.
fn texts_of(pattern: &Value) -> impl Strategy<Value = String> + use<> {
    let pattern = pattern.as_str().unwrap().trim_start_matches('^').trim_end_matches('$');
    proptest::string::string_regex(pattern).unwrap()
}

#[test]
fn texts_of_the_patterns_are_read() {
    let definitions = &generated()["$defs"];
    let sizes = texts_of(&definitions["ByteSize"]["anyOf"][1]["pattern"]);
    let addresses = texts_of(&definitions["MacAddress"]["pattern"]);
    let mut runner = TestRunner::deterministic();
    let drawn = runner.run(&(sizes, addresses), |(size, address)| {
        let read = serde_json::from_value::<ByteSize>(json!(size));
        // A number that no machine has is one of the pattern's, too.
        prop_assert!(read.is_ok() || size.chars().filter(char::is_ascii_digit).count() > 7, "{size:?}");
        let card = json!({ "tap": "vm0", "mac": address });
        prop_assert!(serde_json::from_value::<NetConfig>(card).is_ok(), "{address:?}");
        Ok(())
    });
    drawn.unwrap();
}

#[test]
fn what_is_described_is_read_and_what_is_not_is_refused() {
    let good = [
        json!({}),
        json!({ "memory": 1 << 20 }),
        json!({ "memory": "64mib", "kernel": { "guest": "counter" } }),
        json!({ "kernel": { "guest-with": { "guest": "pages", "initrd": "list" } }, "serial": "none" }),
        json!({ "ram": null, "generations": { "max_snapshots": null, "bufsize": "1M" } }),
    ];
    for config in good {
        serde_json::from_value::<VmConfig>(config).unwrap();
    }
    let bad = [
        json!({ "memroy": "1G" }),
        json!({ "memory": "1X" }),
        json!({ "memory": -1 }),
        json!({ "cpus": "two" }),
        json!({ "kernel": "counter" }),
        json!({ "kernel": { "file": { "initrd": "x" } } }),
        json!({ "disks": [{ "pool": { "name": "a" } }] }),
        json!({ "disks": [{ "file": { "path": "/a", "read_only": true } }] }),
        json!({ "serial": "tty" }),
        json!({ "clock": "stop" }),
        json!({ "medium": "tape" }),
        json!({ "net": [{ "tap": "vm0", "mac": "03:00:5e:10:00:01" }] }),
        json!({ "net": [{ "tap": "vm0", "mtu": 9000 }] }),
        json!({ "vsock": { "cid": 2, "socket": "/a" } }),
        json!({ "generations": { "redundancy": 0 } }),
        json!({ "generations": { "integrity": "maybe" } }),
    ];
    for config in bad {
        assert!(serde_json::from_value::<VmConfig>(config.clone()).is_err(), "{config}");
    }
}
