//! Reads settings one after another and collects all faults, so that one report lists them all.

use std::collections::BTreeSet;

use super::{
    characters::{check_characters, odd_character},
    parse::Fault,
    sources::{InvalidSettings, Sources},
    table::{Setting, WhenUnset},
};

/// Calls `read` with a reader of `sources`, and returns its result.
///
/// # Errors
/// When the reader found a fault, or the file has an unknown key.
pub(super) fn read<T>(
    sources: &Sources,
    read: impl FnOnce(&mut Reader<'_>) -> T,
) -> Result<T, InvalidSettings> {
    let mut reader = Reader { faults: sources.unknown_keys(), ..Reader::new(sources) };
    let value = read(&mut reader);
    if reader.faults.is_empty() { Ok(value) } else { Err(InvalidSettings(reader.faults)) }
}

/// Reads values from the sources. After a fault it goes on, with the default or the example of the table
/// instead of the missing value, so that it can check the other settings. [`read`] returns an error if
/// there was a fault.
pub(super) struct Reader<'a> {
    sources: &'a Sources,
    /// The lines of the error message.
    faults: Vec<String>,
    /// The keys of the settings for which a fault was reported.
    faulty: BTreeSet<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(sources: &'a Sources) -> Self {
        Self { sources, faults: Vec::new(), faulty: BTreeSet::new() }
    }

    /// Returns the sources of the values.
    pub(super) fn sources(&self) -> &'a Sources {
        self.sources
    }

    /// Returns the value, if one is given.
    pub(super) fn optional<T>(
        &mut self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, Fault>,
    ) -> Option<T> {
        let given = match self.sources.find(setting) {
            Ok(given) => given?,
            Err(line) => {
                self.fault(setting, line);
                return None;
            }
        };
        let parsed = if given.value.is_empty() {
            Err("is empty".into())
        } else {
            check_characters(&given.value)
                .and_then(|()| parse(&given.value))
                .map_err(|fault| fault + &odd_character(&given.value))
        };
        parsed.map_err(|fault| self.fault(setting, given.fault_line(&fault))).ok()
    }

    /// Returns the value, or the table's default.
    ///
    /// # Panics
    /// When the table has no default for `setting`, or one that `parse` refuses.
    pub(super) fn or_default<T>(
        &mut self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, Fault>,
    ) -> T {
        self.optional(setting, &parse).unwrap_or_else(|| {
            let default = setting.default().expect("the table has a default for this setting");
            parse(default).expect("the table's defaults are valid")
        })
    }

    /// Returns the value. Reports a fault if it is not given.
    ///
    /// # Panics
    /// When the table does not say that `setting` is required, or has an example that `parse` refuses.
    pub(super) fn required<T>(
        &mut self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, Fault>,
    ) -> T {
        if let Some(value) = self.optional(setting, &parse) {
            return value;
        }
        if !self.faulty.contains(setting.key) {
            let line = format!(
                "{}: required; set it, --{}, or {} in the file of --config",
                setting.env(),
                setting.flag(),
                setting.key
            );
            self.fault(setting, line);
        }
        let WhenUnset::Required { example } = setting.when_unset else {
            unreachable!("the table says that this setting is required")
        };
        parse(example).expect("the table's examples are valid")
    }

    /// Reports that `setting` contradicts `other`; `fault` says how. Does nothing if one of them has a fault
    /// already, because its value is only a default or an example then.
    pub(super) fn contradiction(
        &mut self,
        setting: &'static Setting,
        other: &'static Setting,
        fault: &str,
    ) {
        if self.faulty.contains(setting.key) || self.faulty.contains(other.key) {
            return;
        }
        let line = match self.sources.find(setting) {
            Ok(Some(given)) => given.fault_line(fault),
            _ => format!("{} (default): {fault}", setting.env()),
        };
        self.fault(setting, line);
    }

    fn fault(&mut self, setting: &'static Setting, line: String) {
        self.faulty.insert(setting.key);
        self.faults.push(line);
    }
}
