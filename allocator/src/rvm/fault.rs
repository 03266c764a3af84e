//! Mistakes that a test makes on purpose, to see that the enumeration of crash states finds them (`--features seeded-faults`).

#[cfg(all(feature = "seeded-faults", not(debug_assertions)))]
compile_error!("the feature seeded-faults makes a log that loses data on purpose: for debug builds of tests alone");

#[cfg(feature = "seeded-faults")]
thread_local! {
    static SEEDED: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Lets this thread make a mistake from now on, or none.
#[cfg(all(test, feature = "seeded-faults"))]
pub(crate) fn seed_fault(name: Option<&'static str>) {
    SEEDED.set(name);
}

/// From now on no panic of a thread that makes a mistake is reported: it is a find, and no news. Those of other tests, which run beside it, are.
#[cfg(all(test, feature = "seeded-faults"))]
pub(crate) fn hush_seeded_panics() {
    static HUSHED: std::sync::Once = std::sync::Once::new();
    HUSHED.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if SEEDED.get().is_none() {
                report(panic);
            }
        }));
    });
}

/// Whether the mistake of that name is to be made here.
#[cfg(feature = "seeded-faults")]
pub(crate) fn seeded(name: &str) -> bool {
    SEEDED.get() == Some(name)
}

/// Whether the mistake of that name is to be made here: never, in this build.
#[cfg(not(feature = "seeded-faults"))]
pub(crate) const fn seeded(_name: &str) -> bool {
    false
}
