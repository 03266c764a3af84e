//! `perdure completions`, `perdure man`

use clap_complete::Shell;

use super::output::say;

/// Print a completion script for a shell, on standard output.
#[derive(Debug, clap::Args)]
pub(super) struct CompletionArgs {
    /// Which shell
    shell: Shell,
}

pub(super) fn completions(mut command: clap::Command, args: &CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "perdure", &mut script);
    say!("{}", String::from_utf8_lossy(&script).trim_end());
    Ok(())
}

pub(super) fn man(command: clap::Command) -> anyhow::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    say!("{}", String::from_utf8_lossy(&page).trim_end());
    Ok(())
}
