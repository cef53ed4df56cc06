//! Flags made from the table, so that no setting lacks one and each help text names its variable.

use std::{collections::BTreeMap, marker::PhantomData};

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use super::table::{self, Setting};

/// The settings that a command takes as flags.
pub trait Group {
    /// Which.
    const SETTINGS: &'static [&'static Setting];
    /// Their heading in the help.
    const HEADING: &'static str = "Settings";
}

/// What `serve` and `check` take.
#[derive(Clone, Copy, Debug)]
pub struct Broker;

impl Group for Broker {
    const SETTINGS: &'static [&'static Setting] = table::BROKER;
}

/// What calls a broker.
#[derive(Clone, Copy, Debug)]
pub struct Client;

impl Group for Client {
    const SETTINGS: &'static [&'static Setting] = table::CLIENT;
}

/// The intake key alone.
#[derive(Clone, Copy, Debug)]
pub struct Intake;

impl Group for Intake {
    const SETTINGS: &'static [&'static Setting] = &[&table::INTAKE_KEY];
}

/// The keyring alone.
#[derive(Clone, Copy, Debug)]
pub struct Keys;

impl Group for Keys {
    const SETTINGS: &'static [&'static Setting] = &[&table::KEYRING_FILE];
}

/// The address of gRPC alone.
#[derive(Clone, Copy, Debug)]
pub struct Listen;

impl Group for Listen {
    const SETTINGS: &'static [&'static Setting] = &[&table::LISTEN];
}

/// The database's URL for `migrate`, beside the one that every command takes.
#[derive(Clone, Copy, Debug)]
pub struct Migrate;

impl Group for Migrate {
    const SETTINGS: &'static [&'static Setting] = &[&table::MIGRATE_DATABASE_URL];
}

/// The flags of a group that were given, by key, or by [`Setting::file_key`] for secrets.
#[derive(Clone, Debug)]
pub struct Flags<G> {
    /// The values as given.
    pub given: BTreeMap<String, String>,
    group: PhantomData<G>,
}

impl<G: Group> FromArgMatches for Flags<G> {
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

impl<G: Group> Args for Flags<G> {
    fn augment_args(command: Command) -> Command {
        G::SETTINGS
            .iter()
            .fold(command, |command, setting| command.arg(arg(setting).help_heading(G::HEADING)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn id(setting: &Setting) -> String {
    if setting.secret { setting.file_key() } else { setting.key.to_owned() }
}

/// The flag of `setting`. Clap itself reads no variable: its help would print their values.
pub(super) fn arg(setting: &Setting) -> Arg {
    let env = if setting.secret {
        format!("{} or {}", setting.env(), setting.file_env())
    } else {
        setting.env()
    };
    let default = setting.default.map(|text| format!(" [default: {text}]")).unwrap_or_default();
    let arg = Arg::new(id(setting))
        .long(setting.flag())
        .help(format!("{} [env: {env}]{default}", setting.help))
        .value_name(value_name(setting));
    if matches!(setting.default, Some("true" | "false")) {
        return arg.num_args(0..=1).default_missing_value("true");
    }
    arg
}

fn value_name(setting: &Setting) -> &'static str {
    match setting.key {
        _ if setting.secret => "FILE",
        key if key.ends_with("listen") => "ADDRESS:PORT",
        "keyring_file" | "ca_file" | "client_cert" | "client_key" => "FILE",
        "state_dir" => "DIR",
        _ => "VALUE",
    }
}
