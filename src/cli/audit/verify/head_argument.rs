//! The values of `--head`.

use std::{path::PathBuf, str::FromStr};

use crate::{
    audit::chain::{ChainHead, Digest},
    files::given_path,
};

/// A value of `--head`: a head, or a file of signed heads.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum HeadArgument {
    Head { chain: String, head: ChainHead },
    File(PathBuf),
}

impl FromStr for HeadArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((position, hash)) = text.rsplit_once(':').filter(|(_, hash)| hash.len() == 64)
        else {
            return given_path::parse(text).map(Self::File).map_err(|error| error.to_string());
        };
        let malformed = || "neither a file nor CHAIN:SEQ:HASH".to_owned();
        let (chain, seq) = position.rsplit_once(':').ok_or_else(malformed)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(hash, &mut bytes).map_err(|_| malformed())?;
        let head = ChainHead { seq: seq.parse().map_err(|_| malformed())?, hash: Digest(bytes) };
        Ok(Self::Head { chain: chain.to_owned(), head })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_a_position_with_a_hash_or_a_file() {
        let hash = "ab".repeat(32);
        let parse = |text: &str| text.parse::<HeadArgument>();
        let head = ChainHead { seq: 12, hash: Digest([0xab; 32]) };
        let expected = HeadArgument::Head { chain: "c00000001-0123456789abcdef".into(), head };
        assert_eq!(parse(&format!("c00000001-0123456789abcdef:12:{hash}")), Ok(expected));
        assert_eq!(parse("/a:b/heads"), Ok(HeadArgument::File("/a:b/heads".into())));
        for wrong in
            [format!("c1:x:{hash}"), format!("c1:{hash}"), format!("c1:1:{}", "x".repeat(64))]
        {
            assert!(parse(&wrong).is_err(), "{wrong}");
        }
    }
}
