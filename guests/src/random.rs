//! The random numbers of walks.

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64 (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, OOPSLA 2014). The same seed gives the same
/// numbers, here and in `asm/memwalk.s`.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Any seed will do.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, 0 if that is 0: the upper half of a product (Lemire: *Fast random integer generation in an interval*,
    /// ACM TOMACS 2019, without its rejection step: the bias is below n / 2^64).
    pub fn below(&mut self, n: u64) -> u64 {
        let product = u128::from(self.draw()) * u128::from(n);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// A number from 0 up to, but not, 1: the upper 53 bits, which an `f64` holds exactly.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_published_generator() {
        // Vigna's splitmix64.c with the state 1234567.
        let mut random = SplitMix64::new(1_234_567);
        assert_eq!(random.draw(), 6_457_827_717_110_365_317);
        assert_eq!(random.draw(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn numbers_below_a_bound_and_in_the_unit_interval_stay_there_and_reach_both_halves() {
        let mut random = SplitMix64::new(1);
        let below: Vec<u64> = (0..1000).map(|_| random.below(7)).collect();
        assert!((0..7).all(|n| below.contains(&n)) && below.iter().all(|n| *n < 7));
        assert_eq!(random.below(0), 0);
        let low = (0..1000).filter(|_| random.unit() < 0.5).count();
        assert!((400..600).contains(&low), "{low}");
    }
}
