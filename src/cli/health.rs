//! The command `health`, for the probes of container platforms.

use std::{io, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::bail;
use clap::Args;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{global::GlobalArgs, output};
use crate::config::{self, Flags, HealthEndpoint, ListenFlag};

/// How many bytes of the response of `/readyz` are read at most.
const MAX_ANSWER_BYTES: u64 = 16 << 10;
/// How long a probe may take.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Asks the broker on this machine whether it serves: exit code 0 or 1
#[derive(Args, Debug)]
pub(super) struct HealthArgs {
    #[command(flatten)]
    settings: Flags<ListenFlag>,
}

pub(super) async fn run(global: &GlobalArgs, args: HealthArgs) -> anyhow::Result<ExitCode> {
    match config::health_endpoint(&global.sources(args.settings.given)?)? {
        HealthEndpoint::Grpc(address) => check_grpc(address).await,
        HealthEndpoint::Readyz(address) => check_readyz(address).await,
    }
}

/// Calls `/readyz`, and prints whether the broker is ready. `/readyz` answers with 200 when gRPC's health
/// service says `SERVING`.
async fn check_readyz(address: SocketAddr) -> anyhow::Result<ExitCode> {
    let request_readiness = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    match tokio::time::timeout(TIMEOUT, request_readiness).await {
        Ok(Ok(answer)) => {
            let ready = answer.starts_with("HTTP/1.1 200");
            output::line(if ready { "serving" } else { "not_serving" })?;
            Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Ok(Err(error)) => bail!("no broker answers at {address}: {error}"),
        Err(_) => bail!("no broker answers at {address} within {} s", TIMEOUT.as_secs()),
    }
}

/// Calls gRPC's health service, and prints its status.
async fn check_grpc(address: SocketAddr) -> anyhow::Result<ExitCode> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?
        .timeout(TIMEOUT)
        .connect_timeout(TIMEOUT);
    let answer = async {
        let channel = channel.connect().await?;
        HealthClient::new(channel).check(HealthCheckRequest::default()).await.map_err(Into::into)
    };
    let status = match tokio::time::timeout(TIMEOUT, answer).await {
        Ok(Ok(answer)) => answer.into_inner().status(),
        Ok(Err(error)) => {
            let error: anyhow::Error = error;
            return Err(error.context(format!("no broker answers at {address}")));
        }
        Err(_) => bail!("no broker answers at {address} within {} s", TIMEOUT.as_secs()),
    };
    output::line(status.as_str_name().to_lowercase())?;
    Ok(if status == ServingStatus::Serving { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
