//! Checks of the connection to the upstream, and a test issue.

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
        account::wait::{describe, outcome_by, reasons},
        global::GlobalArgs,
    },
    result::CheckResult,
};
use crate::{
    config::Settings,
    domain::{
        account::AccountName,
        clock::{Clock, delta},
    },
    store::admin::{Admin, Outcome, Selection},
    upstream::UpstreamClient,
};

/// How long connecting to the upstream may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Checks that the upstream, or the proxy before it, accepts connections, and that TLS with the upstream
/// works. No credential is sent.
pub(super) async fn connection(settings: &Settings) -> Vec<CheckResult> {
    const SUBJECT: &str = "reach";
    let mut results = match connect_to_first_host(settings).await {
        Ok(text) => vec![CheckResult::ok(SUBJECT, text)],
        Err(fault) => return vec![CheckResult::failure(SUBJECT, fault)],
    };
    if settings.upstream.base_url().starts_with("https://") {
        results.push(tls(settings).await);
    }
    results
}

/// Connects to the proxy if there is one, or else to the upstream.
async fn connect_to_first_host(settings: &Settings) -> Result<String, String> {
    let proxy = settings.upstream_proxy.as_ref().map(|proxy| &proxy.0);
    let target = Url::parse(settings.upstream.base_url()).ok();
    let (host, port) = proxy
        .or(target.as_ref())
        .and_then(host_and_port)
        .ok_or("the upstream's URL has no host")?;
    let name = if proxy.is_some() { "the proxy" } else { "the upstream" };
    let connecting = connect(&host, port, settings.upstream_bind_address);
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(from)) => Ok(format!("{name} at {host}:{port} takes connections from {}", from.ip())),
        Ok(Err(error)) => Err(format!("{name} at {host}:{port} cannot be reached: {error}")),
        Err(_) => Err(format!("{name} at {host}:{port} does not answer")),
    }
}

/// Performs the TLS handshake with the upstream itself. Its certificate is checked as for every call.
async fn tls(settings: &Settings) -> CheckResult {
    const SUBJECT: &str = "tls";
    match UpstreamClient::new(settings.upstream_client(), Clock::System) {
        Err(error) => CheckResult::failure(SUBJECT, error.to_string()),
        Ok(client) => match client.probe().await {
            Ok(status) => CheckResult::ok(
                SUBJECT,
                format!("the upstream's certificate is accepted; it answers, with {status}"),
            ),
            Err(error) => CheckResult::failure(SUBJECT, error.to_string()),
        },
    }
}

/// Requests a new token for `account` from the running brokers, and waits for the outcome.
pub(super) async fn issue(
    global: &GlobalArgs,
    settings: &Settings,
    account: &AccountName,
    within: Duration,
) -> CheckResult {
    const SUBJECT: &str = "issue";
    match request_issue(global, account, within, settings.min_issue_interval).await {
        Ok(issued) => CheckResult::ok(SUBJECT, issued),
        Err(error) => CheckResult::failure(SUBJECT, format!("{error:#}")),
    }
}

async fn request_issue(
    global: &GlobalArgs,
    account: &AccountName,
    within: Duration,
    least: Duration,
) -> anyhow::Result<String> {
    let admin = global.admin(Some("check --issue")).await?;
    let pattern = Some(account.as_str().parse()?);
    if admin.reissue(&Selection { pattern, state: None }).await?.is_empty() {
        bail!("there is no enabled account {account}");
    }
    let end = Clock::System.now() + delta(within);
    let (issued, outcome) = outcome_by(end, &admin, account).await?;
    let text = describe(&outcome).replace('\n', "; ");
    match issued {
        Some(true) => Ok(text),
        Some(false) => bail!(text),
        None => {
            let within = humantime::format_duration(within);
            bail!(
                "no broker issued within {within}; {}; {text}",
                why(&admin, &outcome, least).await
            )
        }
    }
}

/// Returns why no broker has issued yet.
async fn why(admin: &Admin, outcome: &Outcome, least: Duration) -> String {
    let now = Clock::System.wall();
    let is_over = outcome.status.last_issued_at.is_none_or(|at| at + delta(least) <= now);
    // An admin of accounts may not see which brokers there are.
    let live = admin.instances().await.map(|all| all.iter().filter(|it| it.live).count());
    match live {
        Ok(live @ 1..) if !is_over => format!(
            "{live} brokers are running, and the minimum issue interval of {} since the last token is not over",
            humantime::format_duration(least)
        ),
        Ok(live @ 1..) => format!("{live} brokers are running"),
        Ok(0) => "no broker is running".into(),
        Err(_) => reasons(outcome),
    }
}

fn host_and_port(url: &Url) -> Option<(String, u16)> {
    let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
    Some((host, url.port_or_known_default()?))
}

/// Connects to the first of the host's addresses that accepts, from the local address `from` if it is of
/// the same family. Returns the local address of the connection.
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
