//! The command line.

use std::path::PathBuf;

use anyhow::{Context, ensure};

use super::driver::Language;

/// How many scenarios run at the same time, unless the command line says otherwise.
const JOBS: u32 = 2;

pub(crate) struct Arguments {
    /// The drivers: `--driver LANGUAGE=EXECUTABLE`.
    pub(crate) languages: Vec<Language>,
    /// Languages that cannot be tested: `--skipped LANGUAGE`, if its toolchain is missing, and `--failed LANGUAGE`.
    pub(crate) skipped: Vec<String>,
    pub(crate) failed: Vec<String>,
    /// `--jobs NUMBER`.
    pub(crate) jobs: u32,
    /// `--scenarios DIRECTORY`.
    pub(crate) scenarios: PathBuf,
    /// Parts of the names of scenarios.
    words: Vec<String>,
}

impl Arguments {
    pub(crate) fn parse(mut given: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let scenarios = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/conformance/scenarios");
        let mut arguments = Self {
            languages: vec![],
            skipped: vec![],
            failed: vec![],
            jobs: JOBS,
            scenarios: scenarios.into(),
            words: vec![],
        };
        while let Some(argument) = given.next() {
            let mut value = || given.next().with_context(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--driver" => arguments.languages.push(language(&value()?)?),
                "--skipped" => arguments.skipped.push(value()?),
                "--failed" => arguments.failed.push(value()?),
                "--jobs" => arguments.jobs = value()?.parse().context("--jobs")?,
                "--scenarios" => arguments.scenarios = value()?.into(),
                option if option.starts_with('-') => anyhow::bail!("unknown option {option}"),
                word => arguments.words.push(word.to_owned()),
            }
        }
        ensure!(arguments.jobs > 0, "--jobs must be at least 1");
        Ok(arguments)
    }

    /// Whether the scenario with this name is to run.
    pub(crate) fn chooses(&self, name: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word.as_str()))
    }
}

fn language(text: &str) -> anyhow::Result<Language> {
    let (name, executable) = text.split_once('=').context("--driver needs LANGUAGE=EXECUTABLE")?;
    let executable =
        std::path::absolute(executable).with_context(|| format!("the driver of {name}"))?;
    ensure!(executable.exists(), "there is no {}", executable.display());
    Ok(Language { name: name.to_owned(), executable })
}
