//! What is heard of the guest's memory while it runs: being restored, or paged.

use allocator::filler::FillerEvent;
use allocator::paging::PagingEvent;

use super::{Chain, Ended, Supervisor, SupervisorError};
use crate::persistence::{restoring, working_set};

/// News of memory.
#[derive(Debug)]
pub(super) enum MemoryNews {
    /// It is being restored.
    Restore(FillerEvent),
    /// It is paged.
    Paging(PagingEvent),
}

impl Supervisor {
    pub(super) fn on_memory(&mut self, news: MemoryNews) -> Result<Option<Ended>, SupervisorError> {
        match news {
            MemoryNews::Restore(event) => self.on_restore(event),
            MemoryNews::Paging(event) => self.on_paging(event),
        }
    }

    fn on_paging(&mut self, event: PagingEvent) -> Result<Option<Ended>, SupervisorError> {
        let name = &self.name;
        match event {
            PagingEvent::Lost(error) => return self.end(Ended::MemoryLost(Chain(&error).to_string())).map(Some),
            PagingEvent::SwapFull => {
                self.swap_full = true;
                tracing::warn!(
                    "{name}: RAM and swap are full, and its guest waits for memory; nothing is lost. It goes on when the guest frees \
                     some; a VM with more --swap has room for more"
                );
            }
            PagingEvent::SwapRoom => {
                self.swap_full = false;
                tracing::info!("{name}: there is room in its swap region again, and its guest goes on");
            }
            PagingEvent::Unwritable(error) => {
                tracing::warn!(
                    "{name}: memory cannot be swapped out, stays in RAM, and is tried again: {}",
                    Chain(&error)
                );
            }
            PagingEvent::Missing(error) => self.tell_missing(&error),
            PagingEvent::Complete => self.note_restored(),
        }
        Ok(None)
    }

    fn on_restore(&mut self, event: FillerEvent) -> Result<Option<Ended>, SupervisorError> {
        match event {
            FillerEvent::Complete => self.note_restored(),
            FillerEvent::Missing(error) => self.tell_missing(&error),
            FillerEvent::Lost(error) => return self.end(Ended::MemoryLost(Chain(&error).to_string())).map(Some),
        }
        Ok(None)
    }

    fn note_restored(&self) {
        self.remember_working_set();
        tracing::info!("{}: all of its memory is restored", self.name);
    }

    fn tell_missing(&self, error: &dyn std::error::Error) {
        let name = &self.name;
        tracing::warn!(
            "{name}: {}; it stops if its guest asks for that. `perdure scrub {name} --repair` heals what has a good copy",
            Chain(error)
        );
    }

    /// For the next resume.
    pub(super) fn remember_working_set(&self) {
        if let Some(restoring) = self.regions.restore_under_way() {
            let status = restoring.status();
            working_set::learn(&self.pool, &self.name, status.cluster, status.clusters, &restoring.trace());
        }
    }

    /// Nothing is restored from a generation any more, if ever it was.
    pub(super) fn let_go_of_generation(&self) {
        if let Some(restoring) = self.regions.restore_under_way().filter(|restoring| restoring.holds_generation()) {
            restoring::let_go(&self.pool, &self.name, self.regions.config(), restoring.generation());
        }
    }
}
