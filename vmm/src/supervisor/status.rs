//! How a VM is, for whoever asks.

use super::Supervisor;
use super::control::Status;
use crate::machine::virtio::balloon::BalloonControl;
use crate::persistence::holdup::DirtyBudget;
use crate::persistence::paging::PagedStatus;
use crate::persistence::restoring::RestoringStatus;

impl Supervisor {
    pub(super) fn status(&self) -> Status {
        Status {
            state: self.state,
            pid: std::process::id(),
            config: self.machine.config().clone(),
            up_seconds: self.started.elapsed().as_secs(),
            report: self.machine.devices().report().latest(),
            paused: self.paused,
            restoring: self.restoring_status(),
            paged: self.regions.pager().map(|pager| PagedStatus::new(pager.status(), self.swap_full)),
            holdup: self.regions.budget().map(DirtyBudget::status),
            balloon: self.machine.balloon().map(BalloonControl::status),
            generations: self.generations.status(),
        }
    }

    fn restoring_status(&self) -> Option<RestoringStatus> {
        let status = self.regions.restore_under_way()?.status();
        (status.present < status.clusters).then_some(status)
    }
}
