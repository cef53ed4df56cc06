//! Reads settings one after another and keeps all faults, so that one report has them all.

use std::collections::BTreeSet;

use super::{
    parse::Fault,
    sources::{Report, Sources},
    table::Setting,
};

/// What `read` makes of `sources`, unless it met a fault or the file has an unknown key.
pub(super) fn read<T>(
    sources: &Sources,
    read: impl FnOnce(&mut Reader<'_>) -> T,
) -> Result<T, Report> {
    let mut reader =
        Reader { sources, faults: sources.unknown_keys(), faulty: BTreeSet::default() };
    let value = read(&mut reader);
    if reader.faults.is_empty() { Ok(value) } else { Err(Report(reader.faults)) }
}

/// Reads on after a fault: a stand-in takes the value's place, and [`read`] never lets it out.
pub(super) struct Reader<'a> {
    sources: &'a Sources,
    faults: Vec<String>,
    faulty: BTreeSet<&'static str>,
}

impl Reader<'_> {
    /// The value, if one was given.
    pub(super) fn optional<T>(
        &mut self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, Fault>,
    ) -> Option<T> {
        let found = match self.sources.find(setting) {
            Ok(found) => found?,
            Err(line) => {
                self.fault(setting, line);
                return None;
            }
        };
        let parsed =
            if found.value.is_empty() { Err("is empty".into()) } else { parse(&found.value) };
        parsed.map_err(|fault| self.fault(setting, found.wrong(&fault))).ok()
    }

    /// The value, or the table's default.
    pub(super) fn or_default<T>(
        &mut self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, Fault>,
    ) -> T {
        self.optional(setting, &parse).unwrap_or_else(|| stand_in(setting, parse))
    }

    /// The value, which must be given.
    pub(super) fn required<T>(
        &mut self,
        setting: &'static Setting,
        example: &'static str,
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
        parse(example).expect("an example can be read")
    }

    /// Refuses `setting` for `fault`, which lies between it and `other`, if both are sound so far.
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
            Ok(Some(found)) => found.wrong(fault),
            _ => format!("{} (default): {fault}", setting.env()),
        };
        self.fault(setting, line);
    }

    fn fault(&mut self, setting: &'static Setting, line: String) {
        self.faulty.insert(setting.key);
        self.faults.push(line);
    }
}

fn stand_in<T>(setting: &Setting, parse: impl Fn(&str) -> Result<T, Fault>) -> T {
    let default = setting.default.expect("the setting has a default");
    parse(default).expect("a default can be read")
}
