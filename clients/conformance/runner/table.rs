//! The results as a table of scenarios and languages.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    sync::Arc,
    time::Duration,
};

use super::{arguments::Arguments, run::Figures, scenario::Scenario};

/// How a run ended.
pub(crate) enum Outcome {
    /// With what was measured.
    Passed(Figures),
    /// With the reason.
    Failed(String),
    Skipped(String),
}

/// The result of one run.
pub(crate) struct Cell {
    pub(crate) outcome: Outcome,
    pub(crate) took: Duration,
}

impl Display for Cell {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Passed(_) => write!(f, "passed in {:.1?}", self.took),
            Outcome::Failed(why) => write!(f, "FAILED: {why}"),
            Outcome::Skipped(why) => write!(f, "skipped: {why}"),
        }
    }
}

/// The results of all runs.
pub(crate) struct Table {
    scenarios: Vec<String>,
    languages: Vec<String>,
    /// By scenario and language; the runs with several adapters are in one list.
    cells: BTreeMap<(String, String), Vec<String>>,
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Table {
    /// Makes a table of these scenarios, with the results of the languages that cannot be tested.
    pub(crate) fn new(scenarios: &[Arc<Scenario>], arguments: &Arguments) -> Self {
        let Arguments { languages, skipped, failed, .. } = arguments;
        let tested = languages.iter().map(|language| &language.name);
        let mut table = Self {
            scenarios: scenarios.iter().map(|scenario| scenario.name.clone()).collect(),
            languages: tested.chain(skipped).chain(failed).cloned().collect(),
            cells: BTreeMap::new(),
            passed: 0,
            failed: 0,
            skipped: 0,
        };
        for scenario in scenarios {
            let mut add = |languages: &[String], outcome| {
                let languages: Vec<_> = languages.iter().map(String::as_str).collect();
                table.add(&scenario.name, &languages, &Cell { outcome, took: Duration::ZERO });
            };
            add(skipped, Outcome::Skipped("the toolchain is missing".to_owned()));
            add(failed, Outcome::Failed("it could not be built".to_owned()));
        }
        table
    }

    /// Adds the result of a run with these languages.
    pub(crate) fn add(&mut self, scenario: &str, languages: &[&str], cell: &Cell) {
        let seconds = format!("{:.1} s", cell.took.as_secs_f64());
        let (count, text) = match &cell.outcome {
            Outcome::Passed(figures) => {
                let text = [vec![seconds], figures.clone()].concat().join(", ");
                (&mut self.passed, text)
            }
            Outcome::Failed(_) => (&mut self.failed, "FAILED".to_owned()),
            Outcome::Skipped(_) => (&mut self.skipped, "skipped".to_owned()),
        };
        for language in languages {
            *count += 1;
            let key = (scenario.to_owned(), (*language).to_owned());
            self.cells.entry(key).or_default().push(text.clone());
        }
    }

    pub(crate) fn failed(&self) -> usize {
        self.failed
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
        let header = [String::from("scenario")].into_iter().chain(self.languages.iter().cloned());
        table.set_header(header);
        for scenario in &self.scenarios {
            let cells = self.languages.iter().map(|language| {
                let cells = self.cells.get(&(scenario.clone(), language.clone()));
                cells.map(|cells| cells.join(" / ")).unwrap_or_default()
            });
            table.add_row([scenario.clone()].into_iter().chain(cells));
        }
        let Self { passed, failed, skipped, .. } = self;
        write!(f, "{table}\n\n{passed} passed, {failed} failed, {skipped} skipped")
    }
}
