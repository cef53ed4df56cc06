//! Which public key an API KEY is sealed to.
//!
//! Whoever can write the table `intake_keys` could publish a key of their own and read what admins seal. So the
//! published key is compared with something that is not in the database: the setting, the keyring if this
//! machine has it, or else the key that was remembered for the database, as ssh remembers the keys of hosts.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use super::known_keys::{KnownKeys, Outcome};
use crate::{
    cli::{global::GlobalArgs, output},
    config::{self, Flags, KnownKeyFlags, Sources},
    crypto::{IntakePublicKey, Keyring},
    files::given_path::shown,
    store::{Location, admin::Admin, intake_keys},
};

/// What to do when the published key is not the expected one.
const COMPARE: &str = "somebody may have replaced it to read the API KEYs that you enter. Run `token-broker keys \
    public` on the broker's host, and compare what it prints";

/// Remembers the primary intake key of `keyring` for the database of `sources`, if this user's command line remembers
/// another key of that keyring for it. So the keyring vouches for the new key, and not the database.
///
/// # Errors
/// When the file of remembered keys cannot be read or written.
pub(in crate::cli) fn remember_successor(
    sources: &Sources,
    keyring: &Keyring,
) -> anyhow::Result<()> {
    let Ok(url) = config::database_url(sources) else { return Ok(()) };
    let location = url.database("token-broker")?.location();
    let known = match config::known_keys_file(sources)? {
        Some(file) => KnownKeys::at(file),
        None => KnownKeys::of_user()?,
    };
    if !known.file().exists() {
        return Ok(());
    }
    let (new, ours) = (keyring.intake_public(), keyring.intake_publics());
    if known.succeed(&location.to_string(), location.database(), &ours, &new)? {
        output::note(format_args!("{} remembers it for {location}", known.file().display()));
    }
    Ok(())
}

/// What the published key is compared with.
pub(super) struct Trust {
    configured: Option<IntakePublicKey>,
    keyring_file: Option<PathBuf>,
    known_keys_file: Option<PathBuf>,
    /// The database, as the settings name it.
    location: Option<Location>,
}

impl Trust {
    /// Reads the settings.
    pub(super) fn new(global: &GlobalArgs, flags: &Flags<KnownKeyFlags>) -> anyhow::Result<Self> {
        let sources = global.sources(flags.given.clone())?;
        Ok(Self {
            configured: config::intake_key(&sources)?,
            keyring_file: config::known_keyring_file(&sources)?,
            known_keys_file: config::known_keys_file(&sources)?,
            // Without a database, `account seal` works with a configured key.
            location: config::database_url(&sources)
                .ok()
                .and_then(|url| Some(url.database("token-broker").ok()?.location())),
        })
    }

    /// Returns the key of the setting.
    pub(super) fn configured(&self) -> Option<&IntakePublicKey> {
        self.configured.as_ref()
    }

    /// Returns the key that is published in the database, if it can be trusted.
    ///
    /// # Errors
    /// When it is not the configured or the remembered one, or not one of the keyring's; when none is published
    /// and none configured; when the key cannot be remembered.
    pub(super) async fn key_for(&self, admin: &Admin) -> anyhow::Result<IntakePublicKey> {
        let published = intake_keys::primary(admin.pool()).await?;
        if let Some(configured) = &self.configured {
            self.check_configured(configured, published.as_ref())?;
            return Ok(configured.clone());
        }
        let published = published.context(
            "no intake key is published: run `token-broker keys publish` as the owner of the tables, or give \
             --intake-key as `keys public` prints it",
        )?;
        match self.keyring() {
            Some(keyring) => ensure!(
                keyring.intake_publics().contains(&published),
                "the published intake key {published} is not one of the keyring on this machine, whose key is \
                 {}: {COMPARE}",
                keyring.intake_public()
            ),
            None => self.compare_with_remembered(&published)?,
        }
        Ok(published)
    }

    fn check_configured(
        &self,
        configured: &IntakePublicKey,
        published: Option<&IntakePublicKey>,
    ) -> anyhow::Result<()> {
        let Some(published) = published else { return Ok(()) };
        ensure!(
            configured == published,
            "the published intake key is not the one of TOKEN_BROKER_INTAKE_KEY\n  \
             configured  {configured}\n  published   {published}\n{COMPARE}"
        );
        // The next call without the setting trusts this key. It need not be possible: in a container, there may
        // be no home directory.
        if let (Ok(known), Some(location)) = (self.known_keys(), &self.location) {
            let _ = known.remember(&location.to_string(), published);
        }
        Ok(())
    }

    /// Returns the keyring, if this machine has one.
    fn keyring(&self) -> Option<Keyring> {
        let file = self.keyring_file.as_ref()?;
        Keyring::load(file)
            .inspect_err(|error| {
                output::note(format_args!(
                    "warning: {error}; so the intake key is compared with the remembered one"
                ));
            })
            .ok()
    }

    fn known_keys(&self) -> anyhow::Result<KnownKeys> {
        match &self.known_keys_file {
            Some(file) => Ok(KnownKeys::at(file.clone())),
            None => KnownKeys::of_user(),
        }
    }

    fn compare_with_remembered(&self, published: &IntakePublicKey) -> anyhow::Result<()> {
        const ELSE: &str = "or set TOKEN_BROKER_INTAKE_KEY to what `token-broker keys public` prints on the \
            broker's host";
        let location = self.location.as_ref().context("the database is unknown")?;
        let known = self.known_keys().with_context(|| format!("set it, {ELSE}"))?;
        let compared = known.compare(&location.to_string(), location.database(), published).with_context(|| {
            format!(
                "the intake key cannot be remembered in {}: set TOKEN_BROKER_KNOWN_KEYS_FILE, {ELSE}",
                shown(known.file())
            )
        })?;
        match compared {
            Outcome::Known => Ok(()),
            Outcome::FirstUse => {
                output::note(format_args!(
                    "trusting the intake key {published} of {location}, from now on (in {}): compare it with what \
                     `token-broker keys public` prints on the broker's host",
                    shown(known.file())
                ));
                Ok(())
            }
            Outcome::Changed { remembered } => bail!(
                "the intake key of {location} has changed\n  remembered  {remembered} (in {})\n  published   \
                 {published}\n{COMPARE}. If that is the published one, run this command once more with \
                 --intake-key {published}, which remembers it",
                shown(known.file())
            ),
        }
    }
}
