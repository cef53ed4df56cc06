//! Random numbers that can be repeated: each test prints its seed, and takes it from the environment
//! variable `TB_SEED` if that is set.

use std::{env, time::Duration};

use aws_lc_rs::rand;

/// A pseudorandom number generator whose numbers depend on the seed only.
#[derive(Clone, Debug)]
pub(crate) struct TestRng(u64);

impl TestRng {
    /// Creates a generator for `test`, and prints the command that repeats the test with its seed.
    #[expect(clippy::print_stdout, reason = "a failed test shows how to repeat it")]
    pub(crate) fn for_test(test: &str) -> Self {
        let given = env::var("TB_SEED").ok().map(|seed| seed.parse().expect("TB_SEED is a number"));
        let seed = given.unwrap_or_else(|| {
            let mut bytes = [0; 4];
            rand::fill(&mut bytes).unwrap();
            u32::from_le_bytes(bytes).into()
        });
        println!("TB_SEED={seed} cargo test --test it {test}");
        Self(seed)
    }

    /// Returns a number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// Returns a duration of at most `max` milliseconds.
    pub(crate) fn millis(&mut self, max: u64) -> Duration {
        Duration::from_millis(self.below(max + 1))
    }

    /// Returns an independent generator for another part of the test.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.below(u64::MAX))
    }
}
