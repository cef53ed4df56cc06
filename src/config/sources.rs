//! The sources of values: flags, the environment and the TOML file. The first one that has a value for a
//! setting takes precedence.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt, io, mem,
    path::{Path, PathBuf},
};

use toml::{Table, Value};
use zeroize::Zeroizing;

use super::{
    characters::odd_character,
    table::{self, CONFIG_ENV, ENV_PREFIX, Setting},
};
use crate::files::{
    given_path::{self, shown},
    text,
};

/// Everything that is wrong with the settings, one line each. No line contains a value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InvalidSettings(pub Vec<String>);

impl fmt::Display for InvalidSettings {
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

impl std::error::Error for InvalidSettings {}

/// The values from all sources, not parsed yet.
#[derive(Clone)]
pub struct Sources {
    /// The flags, by [`Setting::key`], or for secrets by [`Setting::file_key`].
    pub flags: BTreeMap<String, String>,
    /// The environment variables, by name.
    pub env: BTreeMap<String, String>,
    /// The path and the content of the TOML file.
    pub file: Option<(PathBuf, Table)>,
    /// The function that reads the file named by the `…_file` form of a setting. Tests replace it.
    pub read_file: fn(&Path) -> io::Result<String>,
}

impl Sources {
    /// Returns the values of `flags`, of this process's environment, and of the file at `config`, or
    /// else at `TOKEN_BROKER_CONFIG`. Blocks while it reads the file.
    ///
    /// # Errors
    /// When the file cannot be read or is not TOML, or when one of the broker's variables is not UTF-8.
    pub fn of_process(
        flags: BTreeMap<String, String>,
        config: Option<PathBuf>,
    ) -> Result<Self, InvalidSettings> {
        let env = environment()?;
        let from_env = || {
            let path = env.get(CONFIG_ENV).map(given_path::parse).transpose();
            path.map_err(|fault| {
                InvalidSettings(vec![format!("{CONFIG_ENV} (environment): {fault}")])
            })
        };
        let file = match config.map_or_else(from_env, |path| Ok(Some(path)))? {
            Some(path) => {
                let table = read_table(&path)?;
                Some((path, table))
            }
            None => None,
        };
        let read_file = |path: &Path| text::read(path).map(|mut text| mem::take(&mut *text));
        Ok(Self { flags, env, file, read_file })
    }

    /// Returns the keys of the TOML file whose values have changed since it was read, except those of the database's
    /// URL, which is read again by itself. Blocks while it reads the file.
    ///
    /// # Errors
    /// When the file cannot be read or is not TOML.
    pub fn changed_in_file(&self) -> Result<Vec<String>, InvalidSettings> {
        let Some((path, known)) = &self.file else { return Ok(Vec::new()) };
        let now = read_table(path)?;
        let keys: BTreeSet<_> = known.keys().chain(now.keys()).collect();
        let changed = keys.into_iter().filter(|key| known.get(*key) != now.get(*key));
        Ok(changed.filter(|key| !key.contains("database_url")).cloned().collect())
    }

    /// Returns sources without any value.
    pub(super) fn empty() -> Self {
        Self {
            flags: BTreeMap::new(),
            env: BTreeMap::new(),
            file: None,
            read_file: |_| Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns a line for each environment variable that has the broker's prefix and is not a setting. It
    /// may be a typing error, or a variable that Kubernetes sets for a service called `token-broker`.
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

    /// Returns a line for each key of the file that is not a setting.
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

    /// Returns the value of `setting` in the first source that has one.
    ///
    /// # Errors
    /// A line for the user, when a source has both the value and a file for it, when that file cannot be
    /// read, or when the value in the TOML file is a date or a table.
    pub(super) fn find(&self, setting: &Setting) -> Result<Option<GivenValue>, String> {
        for source in [Source::Flags, Source::Environment, Source::File] {
            let inline = self.get(source, setting, Form::Inline)?;
            let path = if setting.secret { self.get(source, setting, Form::Path)? } else { None };
            match (inline, path) {
                (None, None) => {}
                (Some(value), None) => return Ok(Some(value)),
                (None, Some(path)) => return self.read(path).map(Some),
                (Some(value), Some(path)) => {
                    return Err(value.fault_line(&format!("set together with {}", path.name)));
                }
            }
        }
        Ok(None)
    }

    /// Returns the path of the file that has the value of `setting`, if the first source that has one names a file.
    pub(super) fn file_of(&self, setting: &Setting) -> Option<PathBuf> {
        for source in [Source::Flags, Source::Environment, Source::File] {
            let given = |form| self.get(source, setting, form).ok().flatten();
            if given(Form::Inline).is_some() {
                return None;
            }
            if let Some(path) = given(Form::Path) {
                return Some(PathBuf::from(path.value.as_str()));
            }
        }
        None
    }

    /// Returns the values of `settings` alone, for [`Self::find_again`].
    pub(super) fn only(&self, settings: &[&Setting]) -> Self {
        let mut only = Self { file: self.file.clone(), read_file: self.read_file, ..Self::empty() };
        for key in settings.iter().flat_map(|it| [it.key.to_owned(), it.file_key()]) {
            only.flags.extend(self.flags.get_key_value(&key).map(|(k, v)| (k.clone(), v.clone())));
        }
        for name in settings.iter().flat_map(|it| [it.env(), it.file_env()]) {
            only.env.extend(self.env.get_key_value(&name).map(|(k, v)| (k.clone(), v.clone())));
        }
        only
    }

    /// Returns the value of the first of `settings` that has one, as [`Self::find`] does, but reads all files
    /// again. Blocks.
    pub(super) fn find_again(&self, settings: &[&Setting]) -> Result<Option<GivenValue>, String> {
        for setting in settings {
            let without_file = Self { file: None, ..self.clone() };
            if let Some(given) = without_file.find(setting)? {
                return Ok(Some(given));
            }
            let Some((path, _)) = &self.file else { continue };
            let table = read_table(path).map_err(|invalid| invalid.to_string())?;
            let with_file = Self { file: Some((path.clone(), table)), ..without_file };
            if let Some(given) = with_file.find(setting)? {
                return Ok(Some(given));
            }
        }
        Ok(None)
    }

    /// Reads the file that `path` names. Returns its content, without one newline at the end, under the name
    /// of `path`.
    fn read(&self, path: GivenValue) -> Result<GivenValue, String> {
        let file = given_path::parse(path.value.as_str())
            .map_err(|fault| path.fault_line(&fault.to_string()))?;
        match (self.read_file)(&file) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                Ok(GivenValue { value: Zeroizing::new(text.to_owned()), ..path })
            }
            Err(error) => Err(path.fault_line(&format!("cannot read the file: {error}"))),
        }
    }

    fn get(
        &self,
        source: Source,
        setting: &Setting,
        form: Form,
    ) -> Result<Option<GivenValue>, String> {
        let key = match form {
            Form::Inline => setting.key.to_owned(),
            Form::Path => setting.file_key(),
        };
        let given = |name, origin, value: String| {
            Ok(Some(GivenValue { name, origin, value: Zeroizing::new(value) }))
        };
        match source {
            Source::Flags => match self.flags.get(&key) {
                Some(value) => given(format!("--{}", setting.flag()), "flag".into(), value.clone()),
                None => Ok(None),
            },
            Source::Environment => {
                let name = match form {
                    Form::Inline => setting.env(),
                    Form::Path => setting.file_env(),
                };
                match self.env.get(&name) {
                    Some(value) => given(name, "environment".into(), value.clone()),
                    None => Ok(None),
                }
            }
            Source::File => {
                let Some((path, table)) = &self.file else { return Ok(None) };
                let Some(value) = table.get(&key) else { return Ok(None) };
                let origin = path.display().to_string();
                match text_of(value) {
                    Some(value) => given(key, origin, value),
                    None => Err(format!("{key} ({origin}): not a text, number, true or false")),
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

/// How a source gives a value.
#[derive(Clone, Copy)]
enum Form {
    /// The value itself.
    Inline,
    /// The path of a file that contains the value.
    Path,
}

/// A value, with its source and its name in that source.
pub(super) struct GivenValue {
    /// The name of the flag, of the environment variable, or of the key in the TOML file.
    name: String,
    /// `flag`, `environment`, or the path of the TOML file.
    origin: String,
    pub(super) value: Zeroizing<String>,
}

impl GivenValue {
    /// Returns a line for the user that says where the value is and that it has this fault.
    pub(super) fn fault_line(&self, fault: &str) -> String {
        format!("{} ({}): {fault}", self.name, self.origin)
    }
}

/// Returns a value of the TOML file as it would be written in an environment variable. The texts of a list
/// are joined by commas. Returns `None` for a date or a table, and for a list of anything but texts.
fn text_of(value: &Value) -> Option<String> {
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

/// Returns the environment. Variables that are not UTF-8 are left out, but are an error if they may be
/// settings of the broker.
fn environment() -> Result<BTreeMap<String, String>, InvalidSettings> {
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
    if faults.is_empty() { Ok(texts) } else { Err(InvalidSettings(faults)) }
}

fn read_table(path: &Path) -> Result<Table, InvalidSettings> {
    let wrong = |fault: String| InvalidSettings(vec![format!("{}: {fault}", shown(path))]);
    let text =
        text::read(path).map_err(|error| wrong(format!("cannot read the settings: {error}")))?;
    text.parse().map_err(|error: toml::de::Error| {
        // The message of `error` quotes the line, which may contain a secret.
        let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or_default();
        let number = before.matches('\n').count();
        let odd = text.lines().nth(number).map(odd_character).unwrap_or_default();
        wrong(format!("line {} is not TOML{odd}", 1 + number))
    })
}
