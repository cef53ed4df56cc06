//! Runs the scenarios of `clients/conformance/scenarios` against the real broker with the drivers of the clients.
//! `clients/test` builds the clients and starts this program; `cargo test` alone does not.
//!
//!     cargo test --test conformance -- --driver go=clients/go/driver [--jobs 2] [WORD …]
//!
//! It runs the scenarios whose names contain one of the words, or all, prints a table, and fails if a scenario fails.
//!
//! | module | contents |
//! |---|---|
//! | [`arguments`] | the command line |
//! | [`scenario`] | the files with scenarios |
//! | [`run`] | a scenario with its drivers, step by step |
//! | [`world`] | what surrounds the drivers in a scenario, and what an admin does |
//! | [`brokers`] | the brokers, which are stopped and started |
//! | [`callers`] | the callers with their credentials and files |
//! | [`session`] | the steps of a driver |
//! | [`driver`] | the protocol of drivers |
//! | [`expect`] | what an answer must be |
//! | [`stranger`] | a server that must not be sent a token |
//! | [`secrets`] | the search for secrets in what drivers print |
//! | [`table`] | the results |
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a runner of tests prints its results"
)]

mod arguments;
mod brokers;
mod callers;
mod driver;
mod expect;
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "the harness is of tests, which use more of it and fail by a panic"
)]
#[path = "../../../tests/harness/mod.rs"]
mod harness;
mod run;
mod scenario;
mod secrets;
mod session;
mod stranger;
mod table;
mod world;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{bail, ensure};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
};

use self::{
    arguments::Arguments,
    driver::{Driver, Language},
    harness::all_clients_required,
    run::{Run, logs_of},
    scenario::{Runs, Scenario},
    table::{Cell, Outcome, Table},
    world::Skipped,
};

/// One run of a scenario.
struct Job {
    scenario: Arc<Scenario>,
    /// The columns of the table that it fills.
    languages: Vec<Language>,
    adapter: Option<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what the command line says, and returns how many runs failed.
async fn run() -> anyhow::Result<usize> {
    let arguments = Arguments::parse(env::args().skip(1))?;
    let scenarios = scenario::read_all(&arguments.scenarios)?;
    let chosen = scenarios.into_iter().filter(|scenario| arguments.chooses(&scenario.name));
    let chosen: Vec<_> = chosen.map(Arc::new).collect();
    ensure!(!chosen.is_empty(), "no scenario has a name with one of these words");
    let jobs = jobs(&chosen, &arguments.languages).await;
    let mut table = Table::new(&chosen, &arguments);
    let (mut interrupted, mut terminated) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        () = run_all(jobs, arguments.jobs, &mut table) => {}
        // What runs is dropped, which ends the brokers and the drivers.
        _ = interrupted.recv() => bail!("interrupted"),
        _ = terminated.recv() => bail!("terminated"),
    }
    println!("\n{table}");
    Ok(table.failed())
}

/// Returns the runs: one for each scenario and driver, adapter, or for all drivers together.
async fn jobs(scenarios: &[Arc<Scenario>], languages: &[Language]) -> Vec<Job> {
    let mut jobs = vec![];
    for scenario in scenarios {
        let job = |languages: Vec<Language>, adapter| Job {
            scenario: scenario.clone(),
            languages,
            adapter,
        };
        match scenario.runs {
            Runs::EachDriver => {
                jobs.extend(languages.iter().map(|one| job(vec![one.clone()], None)));
            }
            Runs::AllDrivers => jobs.push(job(languages.to_vec(), None)),
            Runs::EachAdapter => {
                for language in languages {
                    // A driver that cannot say its adapters fails in a run, with its log.
                    let adapters = adapters(language).await.unwrap_or_else(|_| vec![None]);
                    jobs.extend(adapters.into_iter().map(|one| job(vec![language.clone()], one)));
                }
            }
        }
    }
    jobs
}

/// Asks a driver for the names of its adapters.
async fn adapters(language: &Language) -> anyhow::Result<Vec<Option<String>>> {
    let directory = tempfile::tempdir()?;
    let mut driver = Driver::start(language, directory.path().join("driver.log")).await?;
    let adapters: Vec<_> = driver.adapters.iter().cloned().map(Some).collect();
    driver.end().await?;
    ensure!(!adapters.is_empty(), "it has none");
    Ok(adapters)
}

/// Runs the jobs, a few at the same time. One with several drivers runs alone, because they all take their part of
/// the machine.
async fn run_all(jobs: Vec<Job>, at_once: u32, table: &mut Table) {
    let permits = Semaphore::new(at_once as usize);
    let run = async |job: Job| {
        let wanted = if job.languages.len() > 1 { at_once } else { 1 };
        let _permit = permits.acquire_many(wanted).await;
        let begun = Instant::now();
        let outcome = outcome(&job).await;
        (job, Cell { outcome, took: begun.elapsed() })
    };
    let mut running: FuturesUnordered<_> = jobs.into_iter().map(run).collect();
    while let Some((job, cell)) = running.next().await {
        let names: Vec<_> = job.languages.iter().map(|language| language.name.as_str()).collect();
        let adapter = job.adapter.map(|adapter| format!(" ({adapter})")).unwrap_or_default();
        println!("{} with {}{adapter}: {cell}", job.scenario.name, names.join(", "));
        table.add(&job.scenario.name, &names, &cell);
    }
}

/// Runs a job.
async fn outcome(job: &Job) -> Outcome {
    let column = if job.languages.len() > 1 { "all" } else { job.languages[0].name.as_str() };
    let base = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance");
    let directory: PathBuf = logs_of(&base, &job.scenario.name, column, job.adapter.as_deref());
    // What an earlier run has kept there is not about this one.
    let _ = fs::remove_dir_all(&directory);
    let run = Run {
        scenario: &job.scenario,
        languages: job.languages.clone(),
        adapter: job.adapter.clone(),
        directory: directory.clone(),
    };
    let result = run.run().await;
    match result {
        Ok(figures) => Outcome::Passed(figures),
        Err(error) => match error.downcast_ref::<Skipped>() {
            Some(skipped) if all_clients_required() => Outcome::Failed(skipped.to_string()),
            Some(skipped) => Outcome::Skipped(skipped.to_string()),
            None => Outcome::Failed(format!(
                "{}\n    {error:#}\n    logs: {}",
                job.scenario.title,
                directory.display()
            )),
        },
    }
}
