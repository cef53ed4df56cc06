//! An embedded `PostgreSQL` server for `dev`, the tests and the benchmarks. Its programs are found on
//! the machine or downloaded; the server stops when the process that started it ends.
//!
//! The server listens on a Unix socket only, in a directory that only its user may enter. Several
//! servers therefore never compete for a port, and other users of the machine cannot connect. If
//! this process runs as root, the server runs as an unprivileged user, because `PostgreSQL` refuses
//! to run as root.
//!
//! Three processes are involved:
//!
//! | process | ends when |
//! |---|---|
//! | the parent: `token-broker dev`, a test or a benchmark | it is done, or is killed |
//! | the [guard](guard()): the `token-broker` program, run with the hidden command [`GUARD_COMMAND`] | its standard input, a pipe that the parent holds, is closed; or the server ends |
//! | the server | the guard stops it |
//!
//! The kernel closes the pipe however the parent ends, SIGKILL included. The guard then stops the
//! server and removes a temporary directory. Guard and server each lead a process group of their
//! own, so that Ctrl-C in a terminal reaches neither. If the guard itself is killed by SIGKILL, the
//! next start removes the temporary directory, and a server without its directory ends by itself
//! within a minute.
//!
//! | file | contents |
//! |---|---|
//! | `server.rs` | [`EmbeddedPostgres`]: starts the guard and waits until the server is ready |
//! | `guard.rs` | the guard process: runs `initdb` and the server, and stops the server |
//! | `cluster.rs` | the directory of one server, its lock, and the command lines of the programs |
//! | `installation.rs` | finding or downloading the programs |

mod cluster;
mod guard;
mod installation;
mod server;

pub use self::{
    cluster::DATABASE,
    guard::{GUARD_COMMAND, guard},
    installation::{Installation, InstallationError},
    server::{DataLocation, EmbeddedPostgres, EmbeddedPostgresError},
};
