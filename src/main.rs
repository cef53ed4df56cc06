//! Parses the command line, runs the command, and exits with its code.

use std::process::ExitCode;

use clap::Parser;
use token_broker::cli::{self, Cli};

fn main() -> ExitCode {
    // `dev` runs this program as its guard process, which stops Postgres when `dev` ends. The command
    // is hidden, so clap does not know it, and the guard builds its own runtime.
    #[cfg(feature = "embedded-postgres")]
    if std::env::args_os().nth(1).is_some_and(|it| it == token_broker::dev::postgres::GUARD_COMMAND)
    {
        return token_broker::dev::postgres::guard(std::env::args_os().skip(2));
    }
    run()
}

#[tokio::main]
async fn run() -> ExitCode {
    cli::run(Cli::parse()).await
}
