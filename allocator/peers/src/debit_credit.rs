//! What every peer does.

use anyhow::Result;

pub(crate) const ACCOUNTS: u64 = 100_000;
pub(crate) const TELLERS: u64 = 10;
pub(crate) const BRANCHES: u64 = 1;
/// Bytes of an account, a teller, a branch; the balance is the first 8.
pub(crate) const RECORD: usize = 128;
/// Bytes of an audit record.
pub(crate) const AUDIT: usize = 64;
/// Audit records that are kept.
pub(crate) const TRAIL: u64 = 65_536;

/// A request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) account: u64,
    pub(crate) teller: u64,
    pub(crate) branch: u64,
    pub(crate) amount: i64,
    /// Its place in the audit trail.
    pub(crate) audit: u64,
}

impl Transfer {
    pub(crate) fn audit_record(&self) -> [u8; AUDIT] {
        let mut record = [0; AUDIT];
        let fields = [self.account, self.teller, self.branch, self.amount.cast_unsigned(), self.audit];
        for (slot, field) in record.chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        record
    }
}

/// The balance of a record, changed by `amount`.
pub(crate) fn book(record: &mut [u8], amount: i64) {
    if let Some(balance) = record.first_chunk_mut::<8>() {
        *balance = (i64::from_le_bytes(*balance) + amount).to_le_bytes();
    }
}

/// The balance of a record.
pub(crate) fn balance(record: &[u8]) -> i64 {
    record.first_chunk().map_or(0, |balance| i64::from_le_bytes(*balance))
}

/// The same requests for everybody, at random (SplitMix64).
#[derive(Debug, Default)]
pub(crate) struct Requests {
    state: u64,
    made: u64,
}

impl Requests {
    pub(crate) fn next(&mut self) -> Transfer {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        self.made += 1;
        Transfer {
            account: z % ACCOUNTS,
            teller: z / ACCOUNTS % TELLERS,
            branch: 0,
            amount: (z >> 40) as i64 % 1000 - 500,
            audit: self.made % TRAIL,
        }
    }
}

/// One who keeps accounts.
pub(crate) trait Bank {
    /// A transaction.
    fn transfer(&mut self, transfer: &Transfer) -> Result<()>;
    /// Between two rounds, not measured: makes durable what is not.
    fn rest(&mut self) -> Result<()>;
    /// Of all accounts, of all tellers, of all branches.
    fn sums(&mut self) -> Result<[i64; 3]>;
}
