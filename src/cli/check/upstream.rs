//! The way to the upstream, and a trial of it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::bail;
use tokio::net::{TcpSocket, lookup_host};
use url::Url;

use super::{
    super::{
        Global,
        account::wait::{describe, outcome_by},
    },
    Finding,
};
use crate::{
    config::Settings,
    domain::{
        account::AccountName,
        clock::{Clock, delta},
    },
    store::admin::Selection,
    upstream::{self, Client},
};

/// How long a connection to the upstream may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Whether the upstream, or the proxy before it, takes connections, and whether TLS comes about with
/// it. No credential is sent.
pub(super) async fn way(settings: &Settings) -> Vec<Finding> {
    const SUBJECT: &str = "reach";
    let reached = match reach(settings).await {
        Ok(reached) => Finding::good(SUBJECT, reached),
        Err(fault) => return vec![Finding::bad(SUBJECT, fault)],
    };
    let https = settings.upstream.base_url().starts_with("https://");
    let secured = if https { Some(secured(settings).await) } else { None };
    [reached].into_iter().chain(secured).collect()
}

/// The first step: a connection to the first host on the way.
async fn reach(settings: &Settings) -> Result<String, String> {
    let proxy = settings.upstream_proxy.as_ref().map(|proxy| &proxy.0);
    let target = Url::parse(settings.upstream.base_url()).ok();
    let (host, port) = proxy
        .or(target.as_ref())
        .and_then(host_and_port)
        .ok_or("the upstream's URL has no host")?;
    let what = if proxy.is_some() { "the proxy" } else { "the upstream" };
    let connecting = connect(&host, port, settings.upstream_bind_address);
    match tokio::time::timeout(CONNECT_WITHIN, connecting).await {
        Ok(Ok(from)) => Ok(format!("{what} at {host}:{port} takes connections from {}", from.ip())),
        Ok(Err(error)) => Err(format!("{what} at {host}:{port} cannot be reached: {error}")),
        Err(_) => Err(format!("{what} at {host}:{port} does not answer")),
    }
}

/// The second: TLS with the upstream itself, its certificate checked as for every call.
async fn secured(settings: &Settings) -> Finding {
    const SUBJECT: &str = "tls";
    let client = Client::new(
        upstream::Settings {
            target: settings.upstream.clone(),
            bind_address: settings.upstream_bind_address,
            proxy: settings.upstream_proxy.clone().map(|proxy| proxy.0),
            timeout: settings.upstream_timeout,
        },
        Clock::System,
    );
    match client {
        Err(error) => Finding::bad(SUBJECT, error.to_string()),
        Ok(client) => match client.probe().await {
            Ok(status) => Finding::good(
                SUBJECT,
                format!("the upstream's certificate is accepted; it answers, with {status}"),
            ),
            Err(error) => Finding::bad(SUBJECT, error.to_string()),
        },
    }
}

/// Has the brokers issue a new token of `account`, and tells what became of it.
pub(super) async fn trial(global: &Global, account: &AccountName, within: Duration) -> Finding {
    const SUBJECT: &str = "issue";
    match issue(global, account, within).await {
        Ok(issued) => Finding::good(SUBJECT, issued),
        Err(error) => Finding::bad(SUBJECT, format!("{error:#}")),
    }
}

async fn issue(global: &Global, account: &AccountName, within: Duration) -> anyhow::Result<String> {
    let admin = global.admin(Some("check --issue")).await?;
    let pattern = Some(account.as_str().parse()?);
    if admin.reissue(&Selection { pattern, state: None }).await?.is_empty() {
        bail!("there is no enabled account {account}");
    }
    let end = Clock::System.now() + delta(within);
    let (issued, outcome) = outcome_by(end, &admin, account).await?;
    let told = describe(&outcome).replace('\n', "; ");
    match issued {
        Some(true) => Ok(told),
        Some(false) => bail!(told),
        None => {
            let within = humantime::format_duration(within);
            bail!("no broker issued within {within}: is one running? {told}")
        }
    }
}

fn host_and_port(url: &Url) -> Option<(String, u16)> {
    let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
    Some((host, url.port_or_known_default()?))
}

async fn connect(host: &str, port: u16, from: Option<IpAddr>) -> io::Result<SocketAddr> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        if let Some(from) = from.filter(|from| from.is_ipv4() == address.is_ipv4()) {
            socket.bind((from, 0).into())?;
        }
        match socket.connect(address).await {
            Ok(stream) => return stream.local_addr(),
            Err(error) => last = error,
        }
    }
    Err(last)
}
