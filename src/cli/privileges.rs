//! What is said when Postgres answers "permission denied": who the login is, and which role it lacks. Postgres itself
//! says neither.

use std::collections::BTreeMap;

use super::global::{APPLICATION_NAME, GlobalArgs};
use crate::{
    config,
    domain::printable::printable,
    store::{
        StoreError,
        admin::{Admin, Attribution, Login},
    },
};

/// What a command has to be allowed to do in the database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Needs {
    /// What this role of `deploy/roles.sql` may do.
    Role(&'static str),
    /// What both of these roles may do.
    Roles([&'static str; 2]),
    /// What the owner of the tables may do.
    Owner,
}

/// The role of the broker itself, and of commands that do what it does.
pub(super) const RUNTIME: Needs = Needs::Role("token_broker_runtime");
/// The role of `account …`.
pub(super) const ACCOUNTS: Needs = Needs::Role("token_broker_accounts");
/// The role of `caller …`.
pub(super) const ACCESS: Needs = Needs::Role("token_broker_access");
/// The roles of `caller review`, which reads callers and the audit log.
pub(super) const REVIEW: Needs = Needs::Roles(["token_broker_access", "token_broker_auditor"]);
/// The role of `audit …`.
pub(super) const AUDITOR: Needs = Needs::Role("token_broker_auditor");

/// Returns a line about the login, if `error` is that a privilege is missing, for a command that needs `needs`. Asks the
/// database.
pub(super) async fn hint(
    global: &GlobalArgs,
    needs: Option<Needs>,
    error: &anyhow::Error,
) -> Option<String> {
    let lacking = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<StoreError>().is_some_and(StoreError::lacks_grant)
    };
    let needs = needs?;
    if !error.chain().any(lacking) {
        return None;
    }
    let sources = global.sources(BTreeMap::new()).ok()?;
    let url = match needs {
        Needs::Role(_) | Needs::Roles(_) => config::database_url(&sources).ok()?,
        Needs::Owner => config::migrate_database_url(&sources).ok()?,
    };
    let database = url.database(APPLICATION_NAME).ok()?.only_reads();
    let admin = Admin::connect_unchecked(&database, Attribution::default()).await.ok()?;
    of_login(&admin, needs).await
}

/// Returns a line about the login of `admin`.
pub(super) async fn of_login(admin: &Admin, needs: Needs) -> Option<String> {
    let (role, second) = match needs {
        Needs::Role(role) => (role, None),
        Needs::Roles([role, second]) => (role, Some(second)),
        Needs::Owner => return Some(owner_advice(&admin.login("").await.ok()?)),
    };
    let login = admin.login(role).await.ok()?;
    match second {
        Some(second) if login.has_role => Some(advice(second, &admin.login(second).await.ok()?)),
        _ => Some(advice(role, &login)),
    }
}

fn owner_advice(login: &Login) -> String {
    format!(
        "{} is not the owner of the tables, which this command needs: use the login that runs `migrate`",
        who(login)
    )
}

/// Returns what to do about the role `role`, of which `login` says what the session has.
fn advice(role: &str, login: &Login) -> String {
    let who = who(login);
    if !login.role_exists {
        return format!(
            "{who} may not do this, and the role {role}, which may, does not exist: run deploy/roles.sql as the \
             owner of the tables"
        );
    }
    if login.has_role {
        return format!(
            "{who} has the role {role}, which this command needs: run deploy/roles.sql again as the owner of the \
             tables, as after each migration"
        );
    }
    let name = quoted(&login.current);
    format!(
        "{who} lacks the role {role}, which this command needs: an admin says `grant {role} to {name}`"
    )
}

/// Names the login, and the role as which it acts if that is another one.
fn who(login: &Login) -> String {
    let name = quoted(&login.current);
    if login.login == login.current {
        return format!("the login {name}");
    }
    format!("the login {}, as the role {name},", quoted(&login.login))
}

/// Returns a role's name as SQL writes it.
fn quoted(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.bytes().all(plain) && !name.starts_with(|it: char| it.is_ascii_digit()) {
        return name.to_owned();
    }
    format!("\"{}\"", printable(&name.replace('"', "\"\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_the_login_and_what_it_lacks() {
        let login = |current: &str, role_exists, has_role| Login {
            login: "jane".into(),
            current: current.into(),
            role_exists,
            has_role,
        };
        for (role, login, expected) in [
            (
                "token_broker_accounts",
                login("jane", true, false),
                "`grant token_broker_accounts to jane`",
            ),
            ("r", login("Other \"x", true, false), "`grant r to \"Other \"\"x\"`"),
            ("r", login("other", true, false), "the login jane, as the role other, lacks the role"),
            ("r", login("jane", true, true), "run deploy/roles.sql again"),
            ("r", login("jane", false, false), "does not exist: run deploy/roles.sql"),
        ] {
            let advice = advice(role, &login);
            assert!(advice.contains(expected), "{advice}");
        }
        let advice = owner_advice(&login("jane", false, false));
        assert!(advice.starts_with("the login jane is not the owner of the tables"), "{advice}");
    }
}
