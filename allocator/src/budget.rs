//! Several VMs, one budget of RAM: who has how much of it.
//!
//! ```text
//!   VMM of web ──► Member::report(resident, faults) ─┐                          ┌─► Grant: so much may be resident
//!   VMM of db  ──► Member::report(resident, faults) ─┼─► table `budget`, locked ┼─► Grant
//!   VMM of ci  ──► Member::report(resident, faults) ─┘   divided once a second  └─► Grant
//! ```
//!
//! A **target** is what a VM is to have, a **grant** what it may have now: it follows the target down as fast as the VM evicts, and up as
//! others have made room. So the grants never exceed the pool's limit, while the targets move.
//!
//! # How it is divided
//! By marginal benefit, as in cache partitioning (Stone, Turek, Wolf: *Optimal partitioning of cache memory*, IEEE Trans. Computers 1992;
//! Qureshi and Patt, MICRO 2006): memory moves from the VM to which a byte is worth least to the one to which it is worth most. What a
//! byte is worth is estimated from ghosts, as ARC does: faults that a sixteenth more memory would have saved, by that sixteenth.
//!
//! - [`Demand::floor`] is a promise, and [`Demand::cap`] is all that a VM can use.
//! - Where there is room for all, nobody gives anything up: memory moves by need, never to even things out.
//! - It moves only if it is worth a quarter more elsewhere: half of what would make it worth the same, and at most an eighth
//!   of what the giver has above its floor.
//! - A giver that wants it back has its working set cut: it gets it back at once, is left alone for a time, and then gives in small steps
//!   first. The time doubles and the step halves each time that happens (exponential backoff). Without that, a VM whose working set
//!   just fits and one that never has enough would pass the same memory to and fro.

mod member;
mod table;

#[cfg(test)]
mod tests;

pub use member::{Budget, BudgetError, Grant, Member, Usage};
pub use table::{Row, TABLE_FILE};

/// The least that moves, in bytes. Targets are multiples of it, or a floor or cap.
pub const GRAIN: u64 = 1 << 20;
/// Memory moves if it is worth more than this many quarters of what it is worth where it is.
const WORTH_MORE: u128 = 5;
/// A VM that faults less often than that, per second, wants nothing: it is noise.
const WANTS: u32 = 4;
/// Of the faults that are no near misses, 1 in … is thought to be saved by a sixteenth more: a loop larger than memory has no near misses,
/// and yet every byte helps.
const FAR: u32 = 16;
/// The most divisions for which a VM is left alone: about a minute.
const PATIENCE_MOST: u16 = 64;

/// More than any machine has, and 128 of it can be added. Who has more counts as having this.
pub(crate) const SIZE_MOST: u64 = 1 << 56;

/// What a VM needs and has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// The least that it has, in bytes.
    pub floor: u64,
    /// The most that it can use, in bytes.
    pub cap: u64,
    /// What it has in memory, in bytes.
    pub resident: u64,
    /// Hard faults per second, of late.
    pub faults: u32,
    /// Of these, those that a sixteenth more memory would have saved: see [`crate::replacement::Replacement::near_misses`].
    pub near_misses: u32,
    /// What the last division gave it.
    pub share: Share,
}

/// What a division gives a VM. The default is that of a VM that is new.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// What it is to have, in bytes.
    pub target: u64,
    /// Divisions for which nothing is taken from it.
    pub rest: u16,
    /// Divisions for which it was left alone the last time.
    pub patience: u16,
    /// What it gave since it last took, in bytes.
    pub given: u64,
    /// What a sixteenth more memory would have saved it when it began to give, as faults per second in 1 of 16.
    pub needed: u64,
}

impl Demand {
    /// Faults per second that a sixteenth more would save, in 1 of [`FAR`].
    fn saved(&self) -> u64 {
        if self.faults < WANTS {
            return 0;
        }
        let near = self.near_misses.min(self.faults);
        u64::from(near) * u64::from(FAR) + u64::from(self.faults - near)
    }

    fn wants(&self) -> bool {
        self.saved() > 0 && self.share.target < self.cap
    }

    /// It fills what it was given, or nearly so.
    fn fills(&self) -> bool {
        self.resident >= self.share.target - self.share.target / 8
    }

    fn surplus(&self) -> u64 {
        self.share.target.saturating_sub(self.floor)
    }

    /// What it gave, if it needs that after all: it faults more than twice as much as before.
    fn cut(&self) -> u64 {
        if self.saved() / 2 > self.share.needed { self.share.given } else { 0 }
    }

    /// The most that it gives at once: the less, the longer it was left alone.
    fn step(&self) -> u64 {
        (self.surplus() / (8 * u64::from(self.share.patience.max(1)))).max(GRAIN)
    }
}

/// Divides `limit` bytes. The same demands in the same order give the same shares.
///
/// Every target is between floor and cap, and their sum is at most `limit`, unless the floors alone are more.
#[must_use]
pub fn divide(limit: u64, demands: &[Demand]) -> Vec<Share> {
    let mut vms = demands.to_vec();
    for vm in &mut vms {
        vm.floor = vm.floor.min(SIZE_MOST);
        vm.cap = vm.cap.clamp(vm.floor, SIZE_MOST);
        vm.share.target = vm.share.target.clamp(vm.floor, vm.cap);
        vm.share.patience = vm.share.patience.min(PATIENCE_MOST);
        vm.share.rest = vm.share.rest.min(PATIENCE_MOST).saturating_sub(1);
    }
    shrink_to(limit, &mut vms);
    hand_out(limit, &mut vms);
    move_by_worth(&mut vms);
    vms.into_iter().map(|vm| vm.share).collect()
}

fn sum(vms: &[Demand], of: impl Fn(&Demand) -> u64) -> u64 {
    vms.iter().fold(0, |sum, vm| sum.saturating_add(of(vm)))
}

/// `a * b / c` in full width; `c` is not 0 where it matters.
fn scaled(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c.max(1))).unwrap_or(u64::MAX)
}

/// The limit was lowered, or a VM is new: all give, in proportion to what they have above their floors.
fn shrink_to(limit: u64, vms: &mut [Demand]) {
    let (all, surplus) = (sum(vms, |vm| vm.share.target), sum(vms, Demand::surplus));
    let over = all.saturating_sub(limit);
    if over == 0 {
        return;
    }
    let kept = surplus.saturating_sub(over);
    for vm in vms {
        vm.share.target = vm.floor.saturating_add(scaled(vm.surplus(), kept, surplus));
    }
}

/// What nobody has goes to those that fill what they have, in equal parts.
fn hand_out(limit: u64, vms: &mut [Demand]) {
    let mut free = limit.saturating_sub(sum(vms, |vm| vm.share.target));
    let mut takers: Vec<&mut Demand> = vms.iter_mut().filter(|vm| vm.fills() && vm.share.target < vm.cap).collect();
    // Who needs least first: what it leaves is for the others.
    takers.sort_by_key(|vm| vm.cap - vm.share.target);
    let mut left = takers.len() as u64;
    for vm in takers {
        let part = (free / left.max(1)).min(vm.cap - vm.share.target);
        let whole = vm.share.target.saturating_add(part) == vm.cap;
        let part = if whole { part } else { part / GRAIN * GRAIN };
        vm.share.target += part;
        free -= part;
        left -= 1;
    }
}

/// The VM to which memory is worth most takes from the one to which it is worth least, the second from the second, and so on.
fn move_by_worth(vms: &mut [Demand]) {
    let mut order: Vec<usize> = (0..vms.len()).collect();
    // Worth a byte is saved faults by bytes; compared without a division. A stable sort: equals stay in the order of the table.
    order.sort_by(|&a, &b| {
        let (a, b) = (&vms[a], &vms[b]);
        let left = u128::from(a.saved()) * u128::from(b.share.target.max(1));
        left.cmp(&(u128::from(b.saved()) * u128::from(a.share.target.max(1))))
    });
    let mut givers: Vec<usize> =
        order.iter().copied().filter(|&at| vms[at].share.rest == 0 && vms[at].surplus() > 0).collect();
    let takers: Vec<usize> = order.iter().rev().copied().filter(|&at| vms[at].wants() && vms[at].fills()).collect();
    for taker in takers {
        let Some(place) = givers.iter().position(|&giver| giver != taker && amount(&vms[giver], &vms[taker]) > 0)
        else {
            continue;
        };
        let giver = givers.remove(place);
        givers.retain(|&other| other != taker);
        let amount = amount(&vms[giver], &vms[taker]);
        give(&mut vms[giver], amount);
        take(&mut vms[taker], amount);
    }
}

/// What moves from `giver` to `taker`: 0 if it is not worth it.
fn amount(giver: &Demand, taker: &Demand) -> u64 {
    let (gives, takes) = (u128::from(giver.saved()), u128::from(taker.saved()));
    let (has, gets) = (u128::from(giver.share.target), u128::from(taker.share.target));
    if takes * has * 4 <= gives * gets * WORTH_MORE {
        return 0;
    }
    // With so much moved, a byte is worth the same to both.
    let even = (takes * has - gives * gets) / (takes + gives).max(1);
    let even = u64::try_from(even).unwrap_or(u64::MAX);
    let most = giver.surplus().min(taker.cap - taker.share.target);
    let step = (even / 2).min(giver.step().max(taker.cut()));
    // Rounded up, so that it ends; what is left of a surplus or a need goes with it.
    step.min(most).next_multiple_of(GRAIN).min(most)
}

fn give(vm: &mut Demand, amount: u64) {
    if vm.share.given == 0 {
        vm.share.needed = vm.saved();
    } else {
        // It has been giving without wanting it back.
        vm.share.patience = vm.share.patience.saturating_sub(1);
    }
    vm.share.target -= amount;
    vm.share.given = vm.share.given.saturating_add(amount);
}

fn take(vm: &mut Demand, amount: u64) {
    if vm.cut() > 0 {
        vm.share.patience = vm.share.patience.saturating_mul(2).saturating_add(4).min(PATIENCE_MOST);
        vm.share.rest = vm.share.patience;
    }
    vm.share.target += amount;
    vm.share.given = 0;
}
