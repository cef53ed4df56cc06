//! Chance that can be repeated: a seed for each test, printed, and taken from `TB_SEED` to run the same
//! again.

use std::{env, time::Duration};

use aws_lc_rs::rand;

/// A source of numbers that follow from one seed.
#[derive(Clone, Debug)]
pub(crate) struct Seed(u64);

impl Seed {
    /// The seed of `test`, which is printed.
    #[expect(clippy::print_stdout, reason = "what a failure is repeated with")]
    pub(crate) fn of(test: &str) -> Self {
        let told = env::var("TB_SEED").ok().map(|seed| seed.parse().expect("TB_SEED is a number"));
        let seed = told.unwrap_or_else(|| {
            let mut bytes = [0; 4];
            rand::fill(&mut bytes).unwrap();
            u32::from_le_bytes(bytes).into()
        });
        println!("TB_SEED={seed} cargo test --test it {test}");
        Self(seed)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// A time of so many milliseconds at most.
    pub(crate) fn millis(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.below(most + 1))
    }

    /// A source of its own for another part of the test.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.below(u64::MAX))
    }
}
