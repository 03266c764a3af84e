//! The states of a VM, and the one table of what may follow what.
//!
//! ```text
//! Created ─► Running ─► Freezing ─► Frozen ─► PoweredOff ─► Resuming ─► Running
//!               ▲           │ abort    │ power came back          └──────► Failed
//!               └───────────┴──────────┘
//! ```
//!
//! A cut takes any live state to `PoweredOff`. That is never written down: recovery infers it from what it finds.

use serde::{Deserialize, Serialize};

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has regions and a configuration, and has never run.
    Created,
    /// Its vCPUs run.
    Running,
    /// A power-fail signal came; what is volatile is being saved.
    Freezing,
    /// All is durable. The power may go, or come back.
    Frozen,
    /// No process holds it.
    PoweredOff,
    /// A process is putting it together again.
    Resuming,
    /// It could not be resumed. Nothing was altered.
    Failed,
}

/// What makes a VM change its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The kernel was loaded, vCPUs start.
    Start,
    /// The power-fail signal.
    PowerFail,
    /// All is durable.
    Saved,
    /// Saving failed, or the power came back before it was done.
    Abort,
    /// The power came back after it was done.
    PowerBack,
    /// Darkness, or the end of the process.
    Cut,
    /// A process takes the VM up again.
    Resume,
    /// The VM stands as it stood.
    Restored,
    /// It cannot be made to stand.
    Refused,
}

/// A change of state that there is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a VM that is {state} cannot take '{event:?}'")]
pub struct InvalidTransition {
    state: State,
    event: Event,
}

impl State {
    /// The state after `event`.
    ///
    /// # Errors
    /// [`InvalidTransition`] if `event` cannot come here.
    pub fn after(self, event: Event) -> Result<Self, InvalidTransition> {
        use Event as E;
        use State as S;
        Ok(match (self, event) {
            (S::Created, E::Start)
            | (S::Freezing, E::Abort)
            | (S::Frozen, E::PowerBack)
            | (S::Resuming, E::Restored) => S::Running,
            (S::Running, E::PowerFail) => S::Freezing,
            (S::Freezing, E::Saved) => S::Frozen,
            (S::PoweredOff, E::Resume) => S::Resuming,
            (S::Resuming, E::Refused) => S::Failed,
            (_, E::Cut) => S::PoweredOff,
            (state, event) => return Err(InvalidTransition { state, event }),
        })
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::PoweredOff => "powered off",
            Self::Resuming => "resuming",
            Self::Failed => "failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_goes_round_and_comes_back_to_running() {
        let mut state = State::Running;
        for event in [Event::PowerFail, Event::Saved, Event::Cut, Event::Resume, Event::Restored] {
            state = state.after(event).unwrap();
        }
        assert_eq!(state, State::Running);
    }

    #[test]
    fn power_that_comes_back_in_time_leads_back_to_running() {
        assert_eq!(State::Freezing.after(Event::Abort), Ok(State::Running));
        assert_eq!(State::Frozen.after(Event::PowerBack), Ok(State::Running));
    }

    #[test]
    fn a_frozen_vm_does_not_freeze_again() {
        let error = State::Frozen.after(Event::PowerFail).unwrap_err();
        assert_eq!(error.to_string(), "a VM that is frozen cannot take 'PowerFail'");
        assert!(State::Freezing.after(Event::PowerFail).is_err());
    }

    #[test]
    fn a_cut_darkens_every_state() {
        for state in [State::Created, State::Running, State::Freezing, State::Frozen, State::Resuming, State::Failed] {
            assert_eq!(state.after(Event::Cut), Ok(State::PoweredOff));
        }
    }
}
