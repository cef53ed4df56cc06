//! Parses the command line, runs the command, and exits with its code.

use std::{process::ExitCode, time::Duration};

use token_broker::{cli, lifecycle};
use tokio::runtime::Runtime;

/// How long the process waits at its end for threads that read or write files. One that waits for a file which never
/// answers, such as a named pipe without a writer or a file of a server that is gone, must not keep the process.
const LAST_WAIT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    // `dev` runs this program as its guard process, which stops Postgres when `dev` ends. The command
    // is hidden, so clap does not know it, and the guard builds its own runtime.
    #[cfg(feature = "embedded-postgres")]
    if std::env::args_os().nth(1).is_some_and(|it| it == token_broker::dev::postgres::GUARD_COMMAND)
    {
        return token_broker::dev::postgres::guard(std::env::args_os().skip(2));
    }
    lifecycle::block_real_time_signals();
    let cli = cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return cli::failed_to_start(&error),
    };
    let code = runtime.block_on(cli::run(cli));
    runtime.shutdown_timeout(LAST_WAIT);
    code
}
