//! Stock Debian in perdure, and the plug pulled on the machine below it.

use std::path::Path;
use std::time::Duration;
use tests::lab::chain;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, Output, in_emulation};

const SOON: Duration = Duration::from_secs(180);
/// For the guest's Linux to boot in KVM in TCG; it takes 4 to 7 s on an idle machine.
const GUEST_BOOT: Duration = Duration::from_secs(180);
/// MiB of state under the chain, and milliseconds between links.
const CHAIN: (usize, u32) = (16, 20);
/// Links that must follow each other before each outage, and after the last. The chain's window passes over all of its
/// state in 64 links, so every byte that went through the outage is looked at.
const LINKS: u64 = 100;

fn options(disk: &Disk, dax: Option<&Path>) -> Options {
    Options {
        disk: Some(disk.clone()),
        dax: dax.map(Path::to_owned),
        files: guest::files(Path::new(env!("CARGO_BIN_EXE_chain"))),
        ..Options::default()
    }
}

/// The path of a VM named `web` through so many announced outages; its pool lies in `home`, a directory of L1.
fn chain_survives_outages(medium: &str, home: &str, seed: u64, outages: u64) {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(&directory.path().join("disk"), 2048, Cache::Volatile { seed });
    let dax = directory.path().join("pmem");
    make_ext4(&dax, 512);
    let options = options(&disk, Some(&dax));
    let serial = format!("{home}/serial");
    let perdure = format!("export PERDURE_POOL={home}/pool PERDURE_LOG=info; perdure");

    let mut l1 = L1::boot(&options);
    l1.check(
        &format!(
            "{perdure} run web --kernel {} --initrd {} --cmdline 'console=ttyS0 quiet perdure.chain={},{}' \
             --memory 256M --medium {medium} --serial {serial} --detach",
            guest::KERNEL,
            guest::INITRD,
            CHAIN.0,
            CHAIN.1
        ),
        SOON,
    );
    // What the guest printed, all told. L1's copy is a file like any other: a cut may take its end.
    let mut printed = Vec::new();
    let mut in_l1 = Vec::new();
    for outage in 1..=outages {
        wait_for_links(&mut l1, &serial, chain::last_step(&printed) + LINKS, GUEST_BOOT);
        l1.check(&format!("{perdure} powerfail web"), SOON);
        assert_frozen(&l1.check(&format!("{perdure} list --json"), SOON), "web");
        assert_ne!(l1.run("pidof perdure", SOON).status, 0, "a VMM is left after the freeze");
        let now = l1.get(&serial);
        printed.extend_from_slice(now.strip_prefix(in_l1.as_slice()).expect("--serial FILE appends"));
        let cut = l1.power_cut();
        eprintln!("{medium}, outage {outage}: frozen after link {}, {cut:?}", chain::last_step(&printed));

        l1 = L1::boot(&options);
        // Nothing at all when even its name is lost.
        in_l1 = l1.run(&format!("cat {serial} 2>/dev/null"), SOON).output;
        assert!(now.starts_with(&in_l1), "the console's file holds what was never printed");
        l1.check(&format!("{perdure} resume web --detach"), SOON);
    }
    wait_for_links(&mut l1, &serial, chain::last_step(&printed) + LINKS, SOON);
    let now = l1.get(&serial);
    printed.extend_from_slice(now.strip_prefix(in_l1.as_slice()).expect("--serial FILE appends"));
    let verified = chain::verify(&printed, CHAIN.0).unwrap_or_else(|broken| panic!("{medium}: {broken}"));
    assert!(verified.steps >= LINKS * (outages + 1), "{verified:?}");
    eprintln!("{medium}: {verified:?}");
}

fn wait_for_links(l1: &mut L1, serial: &str, links: u64, limit: Duration) {
    l1.wait_until(&format!("tail -c 4096 {serial}"), limit, |seen| chain::last_step(&seen.output) >= links);
}

pub(crate) fn assert_frozen(list: &str, name: &str) {
    let document: serde_json::Value = serde_json::from_str(list).unwrap_or_else(|error| panic!("{error}: {list}"));
    let state = find(&document, name).and_then(|vm| vm.get("state")?.as_str()).unwrap_or_default();
    assert!(state.eq_ignore_ascii_case("frozen"), "{name} is not frozen: {list}");
}

pub(crate) fn find<'a>(value: &'a serde_json::Value, name: &str) -> Option<&'a serde_json::Value> {
    if value.get("name").and_then(serde_json::Value::as_str) == Some(name) {
        return Some(value);
    }
    match value {
        serde_json::Value::Array(items) => items.iter().find_map(|item| find(item, name)),
        serde_json::Value::Object(fields) => fields.values().find_map(|field| find(field, name)),
        _ => None,
    }
}

#[test]
fn a_chain_in_stock_linux_survives_power_cuts_on_file() {
    in_emulation(|| chain_survives_outages("file", "/pool", 1, 2));
}

#[test]
fn a_chain_in_stock_linux_survives_power_cuts_on_dax() {
    in_emulation(|| chain_survives_outages("dax", "/dax", 2, 1));
}

#[test]
fn a_chain_in_stock_linux_survives_power_cuts_on_nvdimm() {
    in_emulation(|| chain_survives_outages("nvdimm", "/pool", 3, 1));
}

#[test]
fn a_stock_debian_kernel_boots_to_a_shell_and_reboots() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(&directory.path().join("disk"), 1024, Cache::Host);
    let mut l1 = L1::boot(&options(&disk, None));
    l1.check("mkfifo /tmp/keys", SOON);
    // The redirection holds the FIFO open for writing too, so that one command's end is not the input's.
    l1.spawn(
        &format!(
            "export PERDURE_POOL=/pool/pool; perdure run shell --kernel {} --initrd {} --cmdline 'console=ttyS0 quiet' \
             --memory 256M --serial stdio <>/tmp/keys >/tmp/screen; echo $? >/tmp/status",
            guest::KERNEL,
            guest::INITRD
        ),
        "/tmp/errors",
    );
    let screen = "cat /tmp/screen; cat /tmp/errors /tmp/status 2>/dev/null";
    l1.wait_until(screen, GUEST_BOOT, |seen| seen.text().contains("guest# "));
    l1.check("echo 'echo sum $((6 * 7)); uname -r; nproc' >/tmp/keys", SOON);
    let seen = l1.wait_until(screen, SOON, |seen| seen.text().contains("sum 42"));
    assert!(seen.text().contains("-cloud-amd64"), "{}", seen.text());
    // A reboot goes through the guest's reset code, as firmware gets it: a fresh machine boots the same kernel.
    l1.check("echo 'reboot -f' >/tmp/keys", SOON);
    let boots = |seen: &Output| seen.text().matches("is up").count();
    l1.wait_until(screen, GUEST_BOOT, |seen| boots(seen) == 2 && seen.text().matches("guest# ").count() == 3);
    // The shell's end is the guest's: its init powers off.
    l1.check("echo exit >/tmp/keys", SOON);
    let status = l1.wait_until("cat /tmp/status", SOON, |seen| !seen.output.is_empty() && seen.status == 0);
    assert_eq!(status.text().trim(), "0", "{}", l1.check(screen, SOON));
}
