//! Where values come from: flags, the environment, the file; the first that has a setting wins.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt, fs, io,
    path::{Path, PathBuf},
};

use toml::{Table, Value};
use zeroize::Zeroizing;

use super::table::{self, CONFIG_ENV, ENV_PREFIX, Setting};

/// All that is wrong with the settings, a line each; no line holds a value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Report(pub Vec<String>);

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [line] => f.write_str(line),
            lines => {
                write!(f, "{} settings are wrong", lines.len())?;
                lines.iter().try_for_each(|line| write!(f, "\n  {line}"))
            }
        }
    }
}

impl std::error::Error for Report {}

/// The values as they were given, not yet read.
#[derive(Clone)]
pub struct Sources {
    /// By key, or by [`Setting::file_key`] for secrets.
    pub flags: BTreeMap<String, String>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// The settings' file and where it lies.
    pub file: Option<(PathBuf, Table)>,
    /// Reads the file that a `…_FILE` names.
    pub read_file: fn(&Path) -> io::Result<String>,
}

impl Sources {
    /// What `flags`, this process's environment, and the file at `config` or at
    /// `TOKEN_BROKER_CONFIG` say.
    pub fn of_process(
        flags: BTreeMap<String, String>,
        config: Option<PathBuf>,
    ) -> Result<Self, Report> {
        let env = environment()?;
        let file = match config.or_else(|| env.get(CONFIG_ENV).map(PathBuf::from)) {
            Some(path) => {
                let table = read_table(&path)?;
                Some((path, table))
            }
            None => None,
        };
        Ok(Self { flags, env, file, read_file: |path| fs::read_to_string(path) })
    }

    /// The variables that look like the broker's and are none: a typing error, or what Kubernetes
    /// sets for a service called `token-broker`.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let known: BTreeSet<_> = table::all()
            .flat_map(|setting| [Some(setting.env()), setting.secret.then(|| setting.file_env())])
            .flatten()
            .collect();
        self.env
            .keys()
            .filter(|name| name.starts_with(ENV_PREFIX))
            .filter(|name| *name != CONFIG_ENV && !known.contains(*name))
            .map(|name| format!("{name} (environment): no such setting; ignored"))
            .collect()
    }

    /// A line for each key of the file that is no setting.
    pub(super) fn unknown_keys(&self) -> Vec<String> {
        let known: BTreeSet<_> = table::all()
            .flat_map(|setting| {
                [Some(setting.key.to_owned()), setting.secret.then(|| setting.file_key())]
            })
            .flatten()
            .collect();
        let Some((path, table)) = &self.file else { return Vec::new() };
        table
            .keys()
            .filter(|key| !known.contains(*key))
            .map(|key| format!("{key:?} ({}): no such setting", path.display()))
            .collect()
    }

    /// The value of `setting` in the first source that has one.
    pub(super) fn find(&self, setting: &Setting) -> Result<Option<Found>, String> {
        for source in [Source::Flags, Source::Environment, Source::File] {
            let direct = self.get(source, setting, Which::Value)?;
            let twin = if setting.secret { self.get(source, setting, Which::File)? } else { None };
            match (direct, twin) {
                (None, None) => {}
                (Some(value), None) => return Ok(Some(value)),
                (None, Some(path)) => return self.read(path).map(Some),
                (Some(value), Some(path)) => {
                    return Err(value.wrong(&format!("set together with {}", path.name)));
                }
            }
        }
        Ok(None)
    }

    fn read(&self, path: Found) -> Result<Found, String> {
        match (self.read_file)(Path::new(path.value.as_str())) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                Ok(Found { value: Zeroizing::new(text.to_owned()), ..path })
            }
            Err(error) => Err(path.wrong(&format!("cannot read the file: {error}"))),
        }
    }

    fn get(
        &self,
        source: Source,
        setting: &Setting,
        which: Which,
    ) -> Result<Option<Found>, String> {
        let key = match which {
            Which::Value => setting.key.to_owned(),
            Which::File => setting.file_key(),
        };
        let found = |name, place, value: String| {
            Ok(Some(Found { name, place, value: Zeroizing::new(value) }))
        };
        match source {
            Source::Flags => match self.flags.get(&key) {
                Some(value) => found(format!("--{}", setting.flag()), "flag".into(), value.clone()),
                None => Ok(None),
            },
            Source::Environment => {
                let name = match which {
                    Which::Value => setting.env(),
                    Which::File => setting.file_env(),
                };
                match self.env.get(&name) {
                    Some(value) => found(name, "environment".into(), value.clone()),
                    None => Ok(None),
                }
            }
            Source::File => {
                let Some((path, table)) = &self.file else { return Ok(None) };
                let Some(value) = table.get(&key) else { return Ok(None) };
                let place = path.display().to_string();
                match plain(value) {
                    Some(value) => found(key, place, value),
                    None => Err(format!("{key} ({place}): not a text, number, true or false")),
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Source {
    Flags,
    Environment,
    File,
}

#[derive(Clone, Copy)]
enum Which {
    Value,
    File,
}

/// A value, the name under which it was given, and where.
pub(super) struct Found {
    name: String,
    place: String,
    pub(super) value: Zeroizing<String>,
}

impl Found {
    /// The report's line that says so.
    pub(super) fn wrong(&self, fault: &str) -> String {
        format!("{} ({}): {fault}", self.name, self.place)
    }
}

/// A value of the file as a flag would give it; the texts of a list are joined by commas.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(yes) => Some(yes.to_string()),
        Value::Array(values) => {
            let texts: Option<Vec<_>> = values.iter().map(Value::as_str).collect();
            texts.map(|texts| texts.join(","))
        }
        Value::Datetime(_) | Value::Table(_) => None,
    }
}

/// The environment, without what is not the broker's and no text.
fn environment() -> Result<BTreeMap<String, String>, Report> {
    let mut texts = BTreeMap::new();
    let mut faults = Vec::new();
    for (name, value) in env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                texts.insert(name, value);
            }
            (Ok(name), Err(_)) if name.starts_with(ENV_PREFIX) || name.starts_with("DATABASE_") => {
                faults.push(format!("{name} (environment): not UTF-8"));
            }
            _ => {}
        }
    }
    if faults.is_empty() { Ok(texts) } else { Err(Report(faults)) }
}

fn read_table(path: &Path) -> Result<Table, Report> {
    let wrong = |fault: String| Report(vec![format!("{}: {fault}", path.display())]);
    let text = fs::read_to_string(path)
        .map_err(|error| wrong(format!("cannot read the settings: {error}")))?;
    text.parse().map_err(|error: toml::de::Error| {
        // The error's own words quote the line, which may hold a secret.
        let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or_default();
        wrong(format!("line {} is not TOML", 1 + before.matches('\n').count()))
    })
}
