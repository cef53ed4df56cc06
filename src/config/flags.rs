//! Command line flags that are derived from the table of settings, so that every setting has a flag whose
//! help names the environment variable.

use std::{collections::BTreeMap, marker::PhantomData};

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use super::table::{self, Setting};

/// The heading of the settings in the help of a command.
const HEADING: &str = "Settings";

/// The settings that a command accepts as flags.
pub trait FlagGroup {
    /// The settings, in the order in which the help lists them.
    const SETTINGS: &'static [&'static Setting];
}

/// The flags of `serve` and `check`.
#[derive(Clone, Copy, Debug)]
pub struct BrokerFlags;

impl FlagGroup for BrokerFlags {
    const SETTINGS: &'static [&'static Setting] = table::BROKER;
}

/// The flags of `token get` and `agent`.
#[derive(Clone, Copy, Debug)]
pub struct ClientFlags;

impl FlagGroup for ClientFlags {
    const SETTINGS: &'static [&'static Setting] = table::CLIENT;
}

/// The flags of `agent`, in addition to [`ClientFlags`].
#[derive(Clone, Copy, Debug)]
pub struct AgentFlags;

impl FlagGroup for AgentFlags {
    const SETTINGS: &'static [&'static Setting] = &[
        &table::ACCOUNTS,
        &table::TOKEN_DIR,
        &table::TOKEN_MODE,
        &table::TOKEN_GROUP,
        &table::SIGNAL_PID_FILE,
        &table::SIGNAL,
        &table::LOG_FORMAT,
    ];
}

/// The flag for the public key that secrets are sealed to.
#[derive(Clone, Copy, Debug)]
pub struct IntakeKeyFlag;

impl FlagGroup for IntakeKeyFlag {
    const SETTINGS: &'static [&'static Setting] = &[&table::INTAKE_KEY];
}

/// The flags that say which public key to trust.
#[derive(Clone, Copy, Debug)]
pub struct KnownKeyFlags;

impl FlagGroup for KnownKeyFlags {
    const SETTINGS: &'static [&'static Setting] = &[&table::INTAKE_KEY, &table::KNOWN_KEYS_FILE];
}

/// The flag for the keyring's path.
#[derive(Clone, Copy, Debug)]
pub struct KeyringFlag;

impl FlagGroup for KeyringFlag {
    const SETTINGS: &'static [&'static Setting] = &[&table::KEYRING_FILE];
}

/// The flag for gRPC's address.
#[derive(Clone, Copy, Debug)]
pub struct ListenFlag;

impl FlagGroup for ListenFlag {
    const SETTINGS: &'static [&'static Setting] = &[&table::LISTEN];
}

/// The flag for the database URL of `migrate`, in addition to `--database-url-file`, which every command
/// has.
#[derive(Clone, Copy, Debug)]
pub struct MigrateFlag;

impl FlagGroup for MigrateFlag {
    const SETTINGS: &'static [&'static Setting] = &[&table::MIGRATE_DATABASE_URL];
}

/// The flags of the group `G` that were given.
#[derive(Clone, Debug)]
pub struct Flags<G> {
    /// The values, not parsed yet, by [`Setting::key`], or for secrets by [`Setting::file_key`].
    pub given: BTreeMap<String, String>,
    group: PhantomData<G>,
}

impl<G: FlagGroup> FromArgMatches for Flags<G> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = G::SETTINGS
            .iter()
            .map(|setting| id(setting))
            .filter_map(|id| Some((id.clone(), matches.get_one::<String>(&id)?.clone())))
            .collect();
        Ok(Self { given, group: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.given.extend(Self::from_arg_matches(matches)?.given);
        Ok(())
    }
}

impl<G: FlagGroup> Args for Flags<G> {
    fn augment_args(command: Command) -> Command {
        G::SETTINGS
            .iter()
            .fold(command, |command, setting| command.arg(arg(setting).help_heading(HEADING)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn id(setting: &Setting) -> String {
    if setting.secret { setting.file_key() } else { setting.key.to_owned() }
}

/// Returns the flag of `setting`. Clap's own support for environment variables is not used, because its
/// help would print the current value of the variable.
fn arg(setting: &Setting) -> Arg {
    let env = if setting.secret {
        format!("{} or {}", setting.env(), setting.file_env())
    } else {
        setting.env()
    };
    let default = setting.default().map(|text| format!(" [default: {text}]")).unwrap_or_default();
    let arg = Arg::new(id(setting))
        .long(setting.flag())
        .help(format!("{} [env: {env}]{default}", setting.help))
        .value_name(value_name(setting));
    if matches!(setting.default(), Some("true" | "false")) {
        return arg.num_args(0..=1).default_missing_value("true");
    }
    arg
}

fn value_name(setting: &Setting) -> &'static str {
    match setting.key {
        _ if setting.secret => "FILE",
        key if key.ends_with("listen") => "ADDRESS:PORT",
        "keyring_file" | "known_keys_file" | "ca_file" | "client_cert" | "client_key" => "FILE",
        "state_dir" => "DIR",
        _ => "VALUE",
    }
}
