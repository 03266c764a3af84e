//! Faults that a test seeds, to see that the crash harness finds them (`tests/faults.rs`). They exist only with the feature
//! `seeded-faults`, which no other build has: without it [`seeded`] is a constant, and nothing is left of its callers' other branch.

#[cfg(all(feature = "seeded-faults", not(debug_assertions)))]
compile_error!("the feature seeded-faults makes a store that loses data on purpose: for debug builds of tests alone");

#[cfg(feature = "seeded-faults")]
thread_local! {
    static SEEDED: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Lets this thread make a mistake from now on, or none.
#[cfg(feature = "seeded-faults")]
pub fn seed_fault(name: Option<&'static str>) {
    SEEDED.set(name);
}

/// Whether the mistake of that name is to be made here.
#[cfg(feature = "seeded-faults")]
pub(crate) fn seeded(name: &str) -> bool {
    SEEDED.get() == Some(name)
}

#[cfg(not(feature = "seeded-faults"))]
pub(crate) const fn seeded(_name: &str) -> bool {
    false
}
