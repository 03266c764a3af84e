//! The guests that are in the binary.

use serde::Serialize;

/// A guest.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Guest {
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    pub(super) parameters: Vec<Parameter>,
}

/// A word of its command line.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) default: &'static str,
    pub(super) what: &'static str,
}

/// All of them.
pub(super) fn list() -> Vec<Guest> {
    let parameter = |parameter: &guests::Parameter| {
        let guests::Parameter { name, default, what } = *parameter;
        Parameter { name, default, what }
    };
    let guest = |guest: &guests::Guest| {
        let (name, summary) = (guest.name, guest.summary);
        Guest { name, summary, parameters: guest.parameters.iter().map(parameter).collect() }
    };
    guests::all().iter().map(guest).collect()
}
