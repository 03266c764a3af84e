//! Pages that changed, told to each who wants to know, and a bound on those that are not durable.
//!
//! Witnesses tell a page once, and two want to hear of it: generations ([`super::DirtyTracker`]), and whoever flushes behind the guest
//! ([`UnflushedPages`]). So what the VM's teller ([`super::super::kvm::teller::Teller`]: rings, or a log) and the VMM's bitmap tell is taken in one place, here, and put down for
//! both.
//!
//! ```text
//!   guest writes ─► teller ──harvest──► hot ──rearm──► cold ──take──► in flight ──flushed──► durable
//!   VMM writes ──► bitmap ────────────────────────────►─┘
//! ```
//!
//! A *hot* page was told and can still be written to without a word: flushing it would prove nothing. Rearming makes it *cold*: a write to it
//! after that is told, as hot again. Only cold pages are flushed.
//!
//! # The bound
//!
//! *Rings.* Let *grant* be what all rings hold. Between two rearms at most that many pages become dirty, whatever the guest does, and a vCPU whose ring is
//! full waits. Who rearms for a vCPU leaves room for two grants below the limit, the flusher for one; so the flusher can always make what is hot
//! cold, and unflushed pages never exceed the limit. (Pages that devices write are counted when somebody looks; they have no ring. And where the
//! limit is lowered below what is dirty, one more grant is given, or what is hot could never be flushed.)
//!
//! *Slices.* Each vCPU is granted a slice for which there is room below the limit, beside what is dirty and what others were granted; at its end it
//! looks what was written, by anybody, and asks for the next, or waits. Rearming grants nothing. [`slices`] has the sizes.

mod slices;

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::super::kvm::{KvmError, Vm};
use super::super::memory::GuestRam;
use super::{Bound, PageSet};
use slices::Slices;

/// Rings are armed anew whatever is dirty.
const ROOM_OR_NOT: Option<u64> = None;
/// A vCPU that waits for room looks this often whether it is to stop, should nobody have told it.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What was told and is not yet dealt with.
#[derive(Debug, Default)]
pub(in super::super) struct Told {
    state: Mutex<State>,
    news: Condvar,
    bound: OnceLock<Bound>,
}

#[derive(Debug, Default)]
struct State {
    /// Changes for the next generation, once they are watched for.
    generations: Option<PageSet>,
    unflushed: Option<Unflushed>,
}

/// A set whose size is known.
#[derive(Debug, Default)]
struct Counted {
    pages: PageSet,
    count: u64,
}

impl Counted {
    fn new(pages: u64) -> Self {
        Self { pages: PageSet::new(pages), count: 0 }
    }

    fn insert(&mut self, page: u64) {
        if page < self.pages.bound() && !self.pages.contains(page) {
            self.pages.insert(page);
            self.count += 1;
        }
    }

    fn add(&mut self, other: &PageSet) {
        other.runs().flatten().for_each(|page| self.insert(page));
    }

    fn remove(&mut self, page: u64) {
        if self.pages.contains(page) {
            self.pages.remove_run(&(page..page + 1));
            self.count -= 1;
        }
    }

    fn clear(&mut self) {
        if self.count > 0 {
            self.pages.clear();
            self.count = 0;
        }
    }
}

#[derive(Debug)]
struct Unflushed {
    hot: Counted,
    cold: Counted,
    in_flight: Counted,
    /// Where to look next for pages to flush.
    hand: u64,
    /// In pages.
    limit: u64,
    /// What can be written before somebody looks.
    grant: u64,
    slices: Slices,
    /// vCPUs that wait for room.
    waiting: u32,
    waited: Duration,
}

impl Unflushed {
    fn count(&self) -> u64 {
        self.hot.count + self.cold.count + self.in_flight.count
    }

    /// A page can be written to without a word. That it could have been flushed before is of no use then.
    fn is_hot(&mut self, page: u64) {
        self.cold.remove(page);
        self.hot.insert(page);
    }

    /// These were written to, and will be told again. One that is hot becomes cold with the others.
    fn are_written(&mut self, pages: &PageSet) {
        for page in pages.runs().flatten().filter(|page| !self.hot.pages.contains(*page)) {
            self.cold.insert(page);
        }
    }

    fn may_grant(&self, grants: u64) -> bool {
        self.count() + grants * self.grant <= self.limit
    }

    fn rearmed(&mut self) {
        self.cold.add(&self.hot.pages);
        self.hot.clear();
    }

    /// Takes up to `most` pages that are cold, from where the last call left off: a hand that goes round, as CLOCK's. So a page that is written to
    /// all the time has become hot again, at the price of a fault, before the hand comes by, and is not flushed for nothing.
    fn take(&mut self, most: u64) -> Vec<std::ops::Range<u64>> {
        let mut left = most;
        let mut taken = Vec::new();
        if self.cold.pages.runs_from(self.hand).next().is_none() {
            self.hand = 0;
        }
        for run in self.cold.pages.runs_from(self.hand) {
            if left == 0 {
                break;
            }
            let end = run.end.min(run.start + left);
            left -= end - run.start;
            taken.push(run.start..end);
        }
        self.hand = taken.last().map_or(0, |run| run.end);
        for run in &taken {
            self.cold.pages.remove_run(run);
            self.cold.count -= run.end - run.start;
            run.clone().for_each(|page| self.in_flight.insert(page));
        }
        taken
    }
}

/// How much is not durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Pages that changed and are not known to be durable.
    pub unflushed: u64,
    /// Of these, those that can be flushed.
    pub cold: u64,
    /// vCPUs that wait for some of it to be durable.
    pub waiting: u32,
    /// How long vCPUs have waited so far, one after the other.
    pub waited: Duration,
    /// How often more was written in a slice than had been granted ([`Bound::Slices`]).
    pub overrun: u64,
}

impl State {
    /// Takes what the guest wrote.
    fn harvest(&mut self, vm: &Vm) -> Result<(), KvmError> {
        let mut new = 0;
        let taken = vm.harvest(&mut |page| {
            new += 1;
            self.generations.iter_mut().for_each(|pages| pages.insert(page));
            self.unflushed.iter_mut().for_each(|unflushed| unflushed.is_hot(page));
        });
        if let (Some(unflushed), true) = (&mut self.unflushed, vm.runs_by_slices()) {
            unflushed.slices.check(new);
        }
        taken
    }

    /// Takes all that was written.
    fn look(&mut self, vm: &Vm) -> Result<(), KvmError> {
        self.take_written(vm.ram());
        self.harvest(vm)
    }

    /// Takes what the VMM wrote.
    fn take_written(&mut self, ram: &GuestRam) {
        let mut written = PageSet::new(ram.pages());
        ram.take_written(&mut written);
        self.generations.iter_mut().for_each(|pages| pages.union(&written));
        self.unflushed.iter_mut().for_each(|unflushed| unflushed.are_written(&written));
    }

    /// Has what was told be told anew, if there is room for so many grants where that grants something, or in any case.
    fn rearm(&mut self, vm: &Vm, grants: Option<u64>) -> Result<bool, KvmError> {
        let grants = grants.filter(|_| !vm.runs_by_slices());
        let may = |unflushed: &Unflushed| grants.is_none_or(|grants| unflushed.may_grant(grants));
        if !self.unflushed.as_ref().is_none_or(may) {
            return Ok(false);
        }
        vm.rearm()?;
        self.unflushed.iter_mut().for_each(Unflushed::rearmed);
        Ok(true)
    }
}

impl Told {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest writes is to be bounded.
    pub(in super::super) fn want(&self, bound: Bound) {
        let _ = self.bound.set(bound);
    }

    /// By what, if it is.
    pub(in super::super) fn bound(&self) -> Option<Bound> {
        self.bound.get().copied()
    }

    /// Generations hear of what changes from now on. Twice is once.
    pub(super) fn watch(&self, pages: u64) {
        let State { generations, unflushed } = &mut *self.state();
        // Writes to what is hot are not told: it may change from now on.
        let hot = || unflushed.as_ref().map_or_else(|| PageSet::new(pages), |unflushed| unflushed.hot.pages.clone());
        generations.get_or_insert_with(hot);
    }

    /// What changed since the last call, for generations.
    pub(super) fn collect(&self, vm: &Vm, into: &mut PageSet) -> Result<(), KvmError> {
        let mut state = self.state();
        state.look(vm)?;
        let rearmed = state.rearm(vm, Some(2))?;
        let State { generations, unflushed } = &mut *state;
        let Some(pages) = generations else { return Ok(()) };
        into.union(pages);
        pages.clear();
        if let Some(unflushed) = unflushed.as_ref().filter(|_| !rearmed) {
            // Writes to these are not told: each counts as changed once more.
            pages.union(&unflushed.hot.pages);
        }
        Ok(())
    }

    /// A vCPU's ring is full: it waits until there is room, or `is_to_stop`.
    pub(in super::super) fn on_ring_full(vm: &Vm, is_to_stop: &dyn Fn() -> bool) -> Result<(), KvmError> {
        let told = vm.ram().told();
        let rearmed = told.wait_for_room(is_to_stop, &mut |state| {
            state.harvest(vm)?;
            Ok(state.rearm(vm, Some(2))?.then_some(()))
        });
        rearmed.map(drop)
    }

    /// The slice of vCPU `index` is over: for how long the next is, once there is room. `None`: it `is_to_stop`.
    pub(in super::super) fn next_slice(
        vm: &Vm,
        index: u32,
        is_to_stop: &dyn Fn() -> bool,
    ) -> Result<Option<Duration>, KvmError> {
        vm.ram().told().wait_for_room(is_to_stop, &mut |state| {
            state.harvest(vm)?;
            let Some(unflushed) = &mut state.unflushed else { return Ok(Some(slices::LONGEST)) };
            let dirty = unflushed.count();
            Ok(unflushed.slices.grant(index, dirty, unflushed.limit))
        })
    }

    /// Asks for room until there is some, or the vCPU `is_to_stop`.
    fn wait_for_room<T>(
        &self,
        is_to_stop: &dyn Fn() -> bool,
        ask: &mut dyn FnMut(&mut State) -> Result<Option<T>, KvmError>,
    ) -> Result<Option<T>, KvmError> {
        let mut state = self.state();
        let mut answer = ask(&mut state);
        if !matches!(answer, Ok(None)) {
            return answer;
        }
        let begun = Instant::now();
        state.unflushed.iter_mut().for_each(|unflushed| unflushed.waiting += 1);
        while !is_to_stop() && matches!(answer, Ok(None)) {
            self.news.notify_all();
            state = self.news.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
            answer = ask(&mut state);
        }
        if let Some(unflushed) = &mut state.unflushed {
            unflushed.waiting -= 1;
            unflushed.waited += begun.elapsed();
        }
        answer
    }

    /// Who waits here looks again what there is to do.
    pub(in super::super) fn wake(&self) {
        // Whoever is about to wait has looked already, or does so after this.
        drop(self.state());
        self.news.notify_all();
    }
}

/// The pages of a machine that are not durable. Clones are the same.
#[derive(Debug, Clone)]
pub struct UnflushedPages {
    vm: Vm,
}

impl UnflushedPages {
    /// `None`: the machine's are not bounded.
    pub(in super::super) fn of(vm: &Vm) -> Option<Self> {
        vm.teller().map(|_| Self { vm: vm.clone() })
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// What vCPUs can write to before somebody looks, in pages, where there is little room.
    #[must_use]
    pub fn grant(&self) -> u64 {
        self.vm.teller().map_or(0, |teller| teller.grant(slices::LEAST))
    }

    /// By what they are bounded.
    #[must_use]
    pub fn bound(&self) -> Option<Bound> {
        self.ram().told().bound()
    }

    /// The least limit under which a guest can run, in pages.
    #[must_use]
    pub fn least_limit(&self) -> u64 {
        2 * self.grant()
    }

    /// All but `unflushed` is durable, now; no vCPU has run since it was made so. From now on at most `limit` pages are not.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn begin(&self, unflushed: &PageSet, limit: u64) -> Result<(), KvmError> {
        let pages = self.ram().pages();
        let mut state = self.ram().told().state();
        // Whatever was told before is durable, or in `unflushed`.
        state.unflushed = None;
        state.look(&self.vm)?;
        state.rearm(&self.vm, ROOM_OR_NOT)?;
        let mut cold = Counted::new(pages);
        cold.add(unflushed);
        state.unflushed = Some(Unflushed {
            hot: Counted::new(pages),
            cold,
            in_flight: Counted::new(pages),
            hand: 0,
            limit: limit.max(self.least_limit()),
            grant: self.grant(),
            slices: Slices::default(),
            waiting: 0,
            waited: Duration::ZERO,
        });
        Ok(())
    }

    /// A fresh machine, whose pages are these, goes on over the same memory. Before it runs.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn machine_changes(&self, to: &Self) -> Result<(), KvmError> {
        let mut state = self.ram().told().state();
        state.harvest(&self.vm)?;
        // All pages are watched in the new one.
        state.unflushed.iter_mut().for_each(Unflushed::rearmed);
        if let Some(unflushed) = &mut state.unflushed {
            unflushed.grant = to.grant();
            unflushed.slices.forget();
        }
        Ok(())
    }

    /// No more than so many pages, from now on.
    pub fn set_limit(&self, limit: u64) {
        if let Some(unflushed) = &mut self.ram().told().state().unflushed {
            unflushed.limit = limit.max(2 * unflushed.grant);
        }
    }

    /// Learns what was written. What is hot stays so: each page that is armed anew costs the guest a fault.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn look(&self) -> Result<Standing, KvmError> {
        let mut state = self.ram().told().state();
        state.look(&self.vm)?;
        Ok(standing(&state))
    }

    /// As [`UnflushedPages::look`], and makes cold what can be: before it is flushed.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn rearm(&self) -> Result<Standing, KvmError> {
        let mut state = self.ram().told().state();
        state.look(&self.vm)?;
        if let Some(unflushed) = state.unflushed.as_ref().filter(|unflushed| unflushed.hot.count > 0) {
            // Where the limit was lowered since, there may be no room for a grant, and nothing else that could be flushed to make some.
            let grants = if unflushed.cold.count + unflushed.in_flight.count == 0 { ROOM_OR_NOT } else { Some(1) };
            state.rearm(&self.vm, grants)?;
        }
        Ok(standing(&state))
    }

    /// As it is known without a look.
    #[must_use]
    pub fn standing(&self) -> Standing {
        standing(&self.ram().told().state())
    }

    /// Up to `most` pages to flush, as runs, ascending; none if none is cold.
    #[must_use]
    pub fn take(&self, most: u64) -> Vec<std::ops::Range<u64>> {
        self.ram().told().state().unflushed.as_mut().map(|unflushed| unflushed.take(most)).unwrap_or_default()
    }

    /// What was taken is durable (or not: it is to be flushed again).
    pub fn flushed(&self, durable: bool) {
        let told = self.ram().told();
        if let Some(unflushed) = &mut told.state().unflushed {
            if !durable {
                unflushed.cold.add(&unflushed.in_flight.pages);
            }
            unflushed.in_flight.clear();
        }
        told.news.notify_all();
    }

    /// All pages that are not durable. The machine must stand, or what it writes meanwhile is not among them.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn all(&self) -> Result<PageSet, KvmError> {
        let mut state = self.ram().told().state();
        state.look(&self.vm)?;
        let Some(unflushed) = &state.unflushed else { return Ok(PageSet::new(self.ram().pages())) };
        let mut all = unflushed.hot.pages.clone();
        all.union(&unflushed.cold.pages);
        all.union(&unflushed.in_flight.pages);
        Ok(all)
    }

    /// Waits until a vCPU waits, somebody calls [`UnflushedPages::wake`], or `most` has passed.
    pub fn wait(&self, most: Duration, is_over: &dyn Fn() -> bool) {
        let told = self.ram().told();
        let state = told.state();
        let waits = state.unflushed.as_ref().is_some_and(|unflushed| unflushed.waiting > 0);
        if !waits && !is_over() {
            drop(told.news.wait_timeout(state, most));
        }
    }

    /// Whoever waits looks again.
    pub fn wake(&self) {
        self.ram().told().wake();
    }
}

fn standing(state: &State) -> Standing {
    state.unflushed.as_ref().map_or_else(Standing::default, |unflushed| Standing {
        unflushed: unflushed.count(),
        cold: unflushed.cold.count,
        waiting: unflushed.waiting,
        waited: unflushed.waited,
        overrun: unflushed.slices.overrun(),
    })
}

#[cfg(test)]
mod tests;
