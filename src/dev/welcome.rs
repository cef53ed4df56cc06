//! The text that `dev` prints when the broker is ready. It has commands to try.

use std::{env, time::Duration};

use super::{demo::UNREGISTERED_LOGINS, local_environment::LocalEnvironment};
use crate::{app::App, crypto::bearer::Bearer, dev::simulator::Simulator};

/// Returns the text. Its commands work as they are printed, in any shell and directory.
pub(super) fn welcome(
    environment: &LocalEnvironment,
    app: &App,
    upstream: &Simulator,
    bearer: &Bearer,
    token_life: Duration,
) -> String {
    let LocalEnvironment { database_label, psql_argument: psql, .. } = environment;
    let (grpc, ops) = (app.grpc_address, app.ops_address);
    let base_url = upstream.base_url();
    let life = humantime::format_duration(token_life);
    let bearer = bearer.expose();
    let [acme, typo] = UNREGISTERED_LOGINS;
    let (acme, acme_id, acme_secret) = (acme.account, acme.client_id, acme.client_secret);
    let (typo, typo_id, typo_secret) = (typo.account, typo.client_id, typo.client_secret);
    let program = program();
    let end = if environment.persistent {
        format!("Ctrl-C ends it; {} keeps what it knows.", environment.directory.display())
    } else {
        "Ctrl-C ends it and leaves nothing behind.".to_owned()
    };
    format!(
        r#"
Token Broker runs, all of it on this machine:

  gRPC       {grpc} (plaintext)
  operators  http://{ops}/readyz and http://{ops}/metrics
  upstream   {base_url} (simulated; a token lives {life})
  database   {database_label}

Get a token, with grpcurl or without:

  grpcurl -plaintext -H 'authorization: Bearer {bearer}' -d '{{"account": "demo-master"}}' {grpc} token_broker.v1.TokenService/GetToken

  TOKEN_BROKER_ENDPOINT=http://{grpc} TOKEN_BROKER_BEARER={bearer} {program} token get demo-master

Register an account with plain SQL, and get its token in the same way. Then register one with a wrong
secret, which the `update` corrects. (The simulated upstream knows these two logins and those of demo-….)

  psql {psql} -c "insert into accounts (name, client_id, client_secret) values ('{acme}', '{acme_id}', '{acme_secret}')"

  psql {psql} -c "insert into accounts (name, client_id, client_secret) values ('{typo}', '{typo_id}', 'SK.wrong')"

  psql {psql} -c "update accounts set client_secret = '{typo_secret}' where name = '{typo}'"

See the state of the accounts, and who did what:

  psql {psql} -c 'select name, state, time_left, last_error, hint from account_status'

  psql {psql} -c 'select at, event, caller, account, outcome, reason from audit_events order by at desc limit 20'

{end}
"#
    )
}

/// Returns the path of this program, quoted for a shell if necessary.
fn program() -> String {
    let needs_no_quotes = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    match env::current_exe() {
        Ok(path) => match path.to_str() {
            Some(path) if path.chars().all(needs_no_quotes) => path.to_owned(),
            _ => format!("'{}'", path.display().to_string().replace('\'', r"'\''")),
        },
        Err(_) => "token-broker".into(),
    }
}
