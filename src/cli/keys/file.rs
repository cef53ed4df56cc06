//! The keyring that the settings name.

use std::{collections::BTreeMap, path::PathBuf};

use crate::{cli::global::GlobalArgs, config, crypto::Keyring};

/// Returns the path of the keyring's file.
pub(super) fn path(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
) -> anyhow::Result<PathBuf> {
    Ok(config::keyring_file(&global.sources(flags)?)?)
}

/// Reads the keyring.
pub(super) fn load(
    global: &GlobalArgs,
    flags: BTreeMap<String, String>,
) -> anyhow::Result<Keyring> {
    Ok(Keyring::load(&path(global, flags)?)?)
}
