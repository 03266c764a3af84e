//! What a command line that cannot be understood gets: status 2, and not a word on stdout.

use tests::perdure::Perdure;

#[track_caller]
fn is_refused(arguments: &[&str]) {
    let perdure = Perdure::new();
    let ended = perdure.run(arguments).expect_code(2);
    assert_eq!(ended.stdout, "", "{arguments:?}");
    assert!(["error", "Usage", "perdure: "].iter().any(|words| ended.stderr.contains(words)), "{}", ended.stderr);
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_status_2() {
    for arguments in [
        &[][..],
        &["frobnicate"],
        &["--frobnicate", "list"],
        &["run", "--frobnicate"],
        &["run", "two", "names"],
        &["run", "--memory", "lots"],
        &["run", "--memory", "-1"],
        &["run", "--cpus", "many"],
        &["run", "--medium", "paper"],
        &["run", "--clock", "cuckoo"],
        &["run", "--guest", "counter", "--kernel", "vmlinuz"],
        &["run", "--initrd", "initrd"],
        &["powerfail"],
        &["powerfail", "web", "--all"],
        &["powerfail", "web", "--holdup", "soon"],
        &["powerback"],
        &["powerback", "web", "--all"],
        &["resume"],
        &["resume", "web", "--all"],
        &["list", "web"],
        &["inspect"],
        &["inspect", "web", "nginx"],
        &["console"],
        &["stop"],
        &["stop", "--force", "web"],
        &["remove"],
        &["remove", "web", "nginx"],
        &["pool"],
        &["pool", "frobnicate"],
        &["pool", "list", "web"],
        &["pool", "df", "--frobnicate"],
        &["completions"],
        &["completions", "cobol"],
        &["man", "perdure"],
    ] {
        is_refused(arguments);
    }
}

#[test]
fn a_value_that_no_vm_can_have_is_a_matter_of_usage_too() {
    for arguments in [
        &["run", "--cpus", "0"][..],
        &["run", "--cpus", "255"],
        &["run", "--memory", "0"],
        &["run", "--memory", "4097"],
        &["run", "--memory", "4K"],
        &["run", "--guest", "nobody"],
    ] {
        is_refused(arguments);
    }
}

#[test]
fn help_and_version_are_no_errors() {
    let perdure = Perdure::new();
    let version = perdure.run(&["--version"]).expect_code(0);
    assert_eq!(version.stdout.trim(), concat!("perdure ", env!("CARGO_PKG_VERSION")));
    let help = perdure.run(&["--help"]).expect_code(0);
    for verb in [
        "run",
        "powerfail",
        "powerback",
        "resume",
        "list",
        "inspect",
        "console",
        "stop",
        "remove",
        "pool",
        "doctor",
        "demo",
    ] {
        assert!(help.stdout.contains(verb), "--help does not name {verb}:\n{}", help.stdout);
        let help = perdure.run(&[verb, "--help"]).expect_code(0);
        assert!(help.stdout.contains(&format!("perdure {verb}")), "{verb}:\n{}", help.stdout);
    }
    assert!(!perdure.pool().exists());
}

#[test]
fn completions_are_scripts_that_know_the_commands() {
    let perdure = Perdure::new();
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef perdure"), ("fish", "complete -c perdure")] {
        let script = perdure.run(&["completions", shell]).expect_code(0).stdout;
        assert!(script.contains(mark), "{shell}:\n{script}");
        for word in ["powerfail", "resume", "holdup", "medium"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    // Where there is a bash, it takes the script.
    let script = perdure.run(&["completions", "bash"]).expect_code(0).stdout;
    if let Ok(output) = std::process::Command::new("bash").args(["-n", "-c", &script]).output() {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_manual_page_is_troff_and_names_every_command() {
    let page = Perdure::new().run(&["man"]).expect_code(0).stdout;
    assert!(page.contains(".TH perdure 1"), "{page}");
    for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SUBCOMMANDS"] {
        assert!(page.contains(&format!(".SH {section}")), "no {section}:\n{page}");
    }
    for verb in ["run", "resume", "powerfail", "powerback", "list", "inspect", "console", "stop", "remove", "pool"] {
        assert!(page.contains(verb), "no {verb}");
    }
}

#[test]
fn looking_at_a_pool_that_is_not_there_and_asking_for_what_cannot_be_make_none() {
    let perdure = Perdure::new();
    assert_eq!(perdure.run(&["list", "--json"]).expect_code(0).json(), serde_json::json!([]));
    for wrong in [["run", "--cpus", "0"], ["run", "--memory", "1000"]] {
        let ended = perdure.run(&wrong).expect_code(2);
        assert!(!ended.stderr.contains("called"), "a VM that is not there has no name: {}", ended.stderr);
    }
    assert!(!perdure.pool().exists());
}
