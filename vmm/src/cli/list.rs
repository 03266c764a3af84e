//! `perdure list`

use super::survey::{names, survey};
use super::{Environment, lineage, output};

/// List the virtual machines of the pool.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let vms = match environment.open_pool_if_any()? {
        Some(pool) => {
            let look = |name: &String| survey(environment, &pool, name).map(|survey| survey.with_generations(&pool));
            names(&pool).iter().map(look).collect::<Result<Vec<_>, _>>()?
        }
        None => Vec::new(),
    };
    if args.json {
        return output::json(&vms);
    }
    let rows: Vec<_> = vms
        .into_iter()
        .map(|vm| {
            let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
            vec![
                vm.name,
                vm.restored_percent.map_or_else(
                    || vm.state.word().to_owned(),
                    |percent| format!("{} ({percent} % restored)", vm.state.word()),
                ),
                or_dash(vm.pid.map(|pid| pid.to_string())),
                or_dash(vm.memory.map(output::bytes)),
                or_dash(vm.cpus.map(|cpus| cpus.to_string())),
                or_dash(vm.medium),
                or_dash(vm.generations.map(|all| format!("{} ({})", all.count, lineage::age(all.newest_age_ms)))),
            ]
        })
        .collect();
    output::table(&["NAME", "STATE", "PID", "MEMORY", "CPUS", "MEDIUM", "GENERATIONS (NEWEST)"], &rows);
    Ok(())
}
