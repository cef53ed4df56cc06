//! Runs the fuzz targets of `fuzz/` with its seeds and with a few random inputs.

#[path = "../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "the file is the root of the crate in fuzz/, too")]
mod targets;

use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*};

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 6] = [
    ("bearer", targets::bearer),
    ("client_certificate", targets::client_certificate),
    ("grant_pattern", targets::grant_pattern),
    ("journal", targets::journal),
    ("sealed_value", targets::sealed_value),
    ("upstream_answer", targets::upstream_answer),
];

#[test]
fn every_target_accepts_its_seeds() {
    for (name, target) in TARGETS {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
        let mut count = 0;
        for seed in fs::read_dir(&seeds).unwrap_or_else(|error| panic!("{seeds:?}: {error}")) {
            target(&fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name} has no seed");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_target_accepts_random_bytes(bytes in vec(any::<u8>(), 0..256)) {
        for (_, target) in TARGETS {
            target(&bytes);
        }
    }
}
