//! The brokers of a scenario: processes that are stopped, killed, paused and started again.

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use token_broker::tls::TlsFiles;

use super::{
    harness::process::{BrokerProcess, BrokerSetup},
    scenario::Given,
};

/// The replicas of a broker. Their numbers begin with 1; no number means all of them.
pub(crate) struct Brokers {
    scheme: &'static str,
    replicas: Vec<Replica>,
}

struct Replica {
    setup: BrokerSetup,
    process: Option<BrokerProcess>,
    paused: bool,
    /// The log of the processes that have ended.
    log: String,
}

impl Brokers {
    /// Makes replicas with the same settings, which do not run yet.
    pub(crate) fn new(mut setup: BrokerSetup, given: &Given, tls: Option<&TlsFiles>) -> Self {
        setup.set("TOKEN_BROKER_REFRESH_AT", &given.refresh_at.to_string());
        let text = |time| humantime::format_duration(time).to_string();
        setup.set("TOKEN_BROKER_MIN_ISSUE_INTERVAL", &text(given.min_issue_interval));
        setup.set("TOKEN_BROKER_UPSTREAM_TIMEOUT", &text(given.upstream_timeout));
        if let Some(files) = tls {
            setup.set_tls(files);
        }
        let others: Vec<_> = (1..given.replicas).map(|_| Replica::new(setup.replica())).collect();
        let replicas = [Replica::new(setup)].into_iter().chain(others).collect();
        Self { scheme: if tls.is_some() { "https" } else { "http" }, replicas }
    }

    pub(crate) async fn start(&mut self, number: Option<usize>) -> anyhow::Result<()> {
        for replica in self.chosen(number)? {
            replica.start().await?;
        }
        Ok(())
    }

    /// Ends brokers with SIGTERM or SIGKILL.
    pub(crate) async fn end(
        &mut self,
        number: Option<usize>,
        signal: Signal,
    ) -> anyhow::Result<()> {
        for replica in self.chosen(number)? {
            replica.end(signal).await?;
        }
        Ok(())
    }

    /// Pauses brokers with SIGSTOP, or lets them go on.
    pub(crate) fn pause(&mut self, number: Option<usize>, paused: bool) -> anyhow::Result<()> {
        for replica in self.chosen(number)? {
            let process = replica.process.as_ref().context("the broker does not run")?;
            process.signal(if paused { Signal::SIGSTOP } else { Signal::SIGCONT });
            replica.paused = paused;
        }
        Ok(())
    }

    pub(crate) async fn rolling_restart(&mut self) -> anyhow::Result<()> {
        for replica in &mut self.replicas {
            replica.end(Signal::SIGTERM).await?;
            replica.start().await?;
        }
        Ok(())
    }

    /// Returns the endpoints of these replicas, or of all.
    pub(crate) fn endpoints(&self, numbers: Option<&[usize]>) -> anyhow::Result<Vec<String>> {
        let all: Vec<_> = (1..=self.replicas.len()).collect();
        let endpoint = |number: &usize| {
            let replica = self.replicas.get(number.wrapping_sub(1)).context("no such replica")?;
            Ok(format!("{}://{}", self.scheme, replica.setup.grpc))
        };
        numbers.unwrap_or(&all).iter().map(endpoint).collect()
    }

    /// Returns the ports of the replicas that answer.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> {
        let answering = self.replicas.iter().filter(|replica| replica.answers());
        answering.map(|replica| replica.setup.grpc.port())
    }

    /// Returns what all replicas have logged.
    pub(crate) fn logs(&self) -> String {
        let log = |replica: &Replica| {
            let present = replica.process.as_ref().map(BrokerProcess::stderr).unwrap_or_default();
            format!("{}{present}", replica.log)
        };
        self.replicas.iter().map(log).collect()
    }

    fn chosen(&mut self, number: Option<usize>) -> anyhow::Result<&mut [Replica]> {
        let Some(number) = number else { return Ok(&mut self.replicas) };
        let chosen = self.replicas.get_mut(number.wrapping_sub(1)).context("no such replica")?;
        Ok(std::slice::from_mut(chosen))
    }
}

impl Replica {
    fn new(setup: BrokerSetup) -> Self {
        Self { setup, process: None, paused: false, log: String::new() }
    }

    fn answers(&self) -> bool {
        self.process.is_some() && !self.paused
    }

    async fn start(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "the broker runs already");
        self.process = Some(self.setup.serve().await);
        Ok(())
    }

    async fn end(&mut self, signal: Signal) -> anyhow::Result<()> {
        let mut process = self.process.take().context("the broker does not run")?;
        process.signal(signal);
        process.wait().await;
        self.log += &process.stderr();
        self.paused = false;
        Ok(())
    }
}
