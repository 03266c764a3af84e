//! What survived an outage, and what a VM can go on from.

use super::context::Standing;
use super::regions::VmRegions;

/// Why a VM cannot go on from where it stood. In the words of a report: what was found, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// Its last context is not that of a freeze.
    #[error("it is {0}; `perdure run` starts it")]
    NotFrozen(&'static str),
    /// RAM is not that of the context.
    #[error(
        "its memory was cut off while it ran: the RAM region is {found}, the newest context that verifies is {context}. \
         What was in memory is lost; `perdure run` boots it anew"
    )]
    Unclean {
        /// What the stamp says, in words.
        found: String,
        /// The context's number.
        context: u64,
    },
    /// A disk, or persistent memory, is not that of the context.
    #[error(
        "its memory is that of context {context}, and its {storage} is {found}: it was exchanged, or written to meanwhile. \
         `perdure run` boots it anew from its disks"
    )]
    Storage {
        /// Which, in words: "disk data".
        storage: String,
        /// What the stamp says, in words.
        found: String,
        /// The context's number.
        context: u64,
    },
    /// The newer slot of the context is damaged.
    #[error(
        "its RAM belongs to context {ram}, which is damaged ({damage}); the newest context that verifies is {context}. \
         `perdure run` boots it anew"
    )]
    ContextDamaged {
        /// The stamp.
        ram: u64,
        /// The newest that verifies.
        context: u64,
        /// What is wrong.
        damage: String,
    },
}

impl Doubt {
    /// Whether something was lost that a generation may still have. Not so for a VM that has ended, or never ran.
    #[must_use]
    pub fn calls_for_recovery(&self) -> bool {
        match self {
            Self::NotFrozen(_) => false,
            Self::Unclean { .. } | Self::Storage { .. } | Self::ContextDamaged { .. } => true,
        }
    }

    /// What was found, without what to do.
    #[must_use]
    pub fn found(&self) -> String {
        match self {
            Self::NotFrozen(found) => (*found).to_owned(),
            Self::Unclean { found, context } => {
                format!("its memory was cut off while it ran (the RAM region is {found}, the context is {context})")
            }
            Self::Storage { storage, found, context } => {
                format!("its {storage} is {found}, the context is {context}")
            }
            Self::ContextDamaged { ram, damage, .. } => {
                format!("its RAM belongs to context {ram}, which is damaged ({damage})")
            }
        }
    }
}

/// Whether the VM can be resumed in place.
///
/// # Errors
/// [`Doubt`] says why not.
pub fn assess(regions: &VmRegions) -> Result<(), Doubt> {
    let context = regions.context();
    let damage = regions.damage().join("; ");
    match (regions.ram().is_clean(), &context.standing) {
        (Some(stamp), _) if stamp != context.sequence && !damage.is_empty() => {
            Err(Doubt::ContextDamaged { ram: stamp, context: context.sequence, damage })
        }
        (Some(stamp), Standing::Frozen(_)) if stamp == context.sequence => match regions.strays().next() {
            None => Ok(()),
            Some((storage, stamp)) => {
                let found = stamp.map_or_else(|| "not stamped clean".to_owned(), |n| format!("that of context {n}"));
                Err(Doubt::Storage { storage, found, context: context.sequence })
            }
        },
        (Some(stamp), Standing::Created) if stamp == context.sequence => Err(Doubt::NotFrozen("new and has never run")),
        (Some(stamp), Standing::Ended { .. }) if stamp == context.sequence => {
            Err(Doubt::NotFrozen("stopped: its guest ended"))
        }
        (stamp, _) => {
            let found = match (stamp, regions.ram().doubtful_stamp()) {
                (Some(stamp), _) => format!("that of context {stamp}"),
                (None, Some(stamp)) => format!("stamped clean@{stamp}, but the other copy of its header is damaged"),
                (None, None) if regions.ram().has_lost_header_copy() => {
                    "not stamped clean, but the other copy of its header is damaged and may have been".to_owned()
                }
                (None, None) => "not stamped clean".to_owned(),
            };
            Err(Doubt::Unclean { found, context: context.sequence })
        }
    }
}
