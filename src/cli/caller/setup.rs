//! A caller as a row of a file describes it: without its bearers.
//!
//! Lists are words separated by white space. A name in a certificate is `NAME[@END]`, a grant `PATTERN[=RIGHTS][@END]`,
//! such as `acme-*=get,list@2027-01-01T00:00:00Z`. Neither names nor patterns have `=` or `@`.

use chrono::{DateTime, Datelike, SecondsFormat, SubsecRound};

use crate::{
    cli::bulk::{Cell, Column, Kind},
    domain::{
        account::InvalidValue,
        caller::{AccountPattern, CallerKind, Right},
        clock::Timestamp,
    },
    store::admin::CallerSetup,
};

/// The columns of a file of callers.
pub(super) const COLUMNS: &[Column] = &[
    Column { name: "name", kind: Kind::Text, aliases: &["이름"] },
    Column { name: "enabled", kind: Kind::Flag, aliases: &["사용"] },
    Column { name: "rate_limit", kind: Kind::Number, aliases: &[] },
    Column { name: "description", kind: Kind::Text, aliases: &["설명"] },
    Column { name: "spiffe_ids", kind: Kind::List, aliases: &[] },
    Column { name: "dns_names", kind: Kind::List, aliases: &[] },
    Column { name: "grants", kind: Kind::List, aliases: &[] },
];
pub(super) const NAME: usize = 0;
pub(super) const ENABLED: usize = 1;
pub(super) const RATE_LIMIT: usize = 2;
pub(super) const DESCRIPTION: usize = 3;
pub(super) const SPIFFE_IDS: usize = 4;
pub(super) const DNS_NAMES: usize = 5;
pub(super) const GRANTS: usize = 6;

/// The kinds of names in certificates, each with the column that lists them.
pub(super) const NAMES: [(CallerKind, usize); 2] =
    [(CallerKind::Spiffe, SPIFFE_IDS), (CallerKind::Dns, DNS_NAMES)];

/// A grant, with its rights in the order of [`Right::ALL`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Grant {
    pub(super) rights: Vec<Right>,
    pub(super) ends_at: Option<Timestamp>,
}

/// Returns whether something that ends at `end` is over at `now`.
pub(super) fn has_ended(end: Option<Timestamp>, now: Timestamp) -> bool {
    end.is_some_and(|end| end <= now)
}

/// Returns the cells of [`COLUMNS`]. What was revoked or is over at `now` is left out.
pub(super) fn cells(caller: &CallerSetup, now: Timestamp) -> Vec<Cell> {
    let names = |kind: CallerKind| {
        let names = caller.certificate_names.iter();
        let names = names
            .filter(|it| it.kind == kind.as_str() && !it.revoked && !has_ended(it.ends_at, now));
        Cell::List(names.map(|it| format!("{}{}", it.identity, end(it.ends_at))).collect())
    };
    let grants = caller.grants.iter().filter(|grant| !has_ended(grant.ends_at, now)).map(|grant| {
        let rights = Right::ALL.map(Right::as_str);
        let rights = rights.into_iter().filter(|right| grant.rights.iter().any(|it| it == right));
        let rights = rights.collect::<Vec<_>>().join(",");
        format!("{}={rights}{}", grant.pattern, end(grant.ends_at))
    });
    vec![
        Cell::Text(caller.name.clone()),
        Cell::Flag(caller.enabled),
        Cell::Number(caller.rate_limit),
        Cell::Text(caller.description.clone()),
        names(CallerKind::Spiffe),
        names(CallerKind::Dns),
        Cell::List(grants.collect()),
    ]
}

fn end(ends_at: Option<Timestamp>) -> String {
    ends_at
        .map(|at| format!("@{}", at.to_rfc3339_opts(SecondsFormat::AutoSi, true)))
        .unwrap_or_default()
}

/// Reads a name in a certificate, with its end.
///
/// # Errors
/// The rule that it breaks, without the name.
pub(super) fn parse_name(
    kind: CallerKind,
    word: &str,
) -> Result<(&str, Option<Timestamp>), String> {
    let (name, ends_at) = split_end(word)?;
    kind.check_identity(name).map_err(|error| error.to_string())?;
    Ok((name, ends_at))
}

/// Reads a grant and its pattern.
///
/// # Errors
/// The rule that it breaks, without the grant.
pub(super) fn parse_grant(word: &str) -> Result<(String, Grant), String> {
    let text = |error: InvalidValue| error.to_string();
    let (grant, ends_at) = split_end(word)?;
    let (pattern, rights) = match grant.split_once('=') {
        Some((pattern, rights)) => {
            let given: Vec<Right> =
                rights.split(',').map(str::parse).collect::<Result<_, _>>().map_err(text)?;
            let rights: Vec<_> =
                Right::ALL.into_iter().filter(|right| given.contains(right)).collect();
            if rights.len() != given.len() {
                return Err("a right is there twice".into());
            }
            (pattern, rights)
        }
        None => (grant, Right::ALL.to_vec()),
    };
    let pattern: AccountPattern = pattern.parse().map_err(text)?;
    Ok((pattern.to_string(), Grant { rights, ends_at }))
}

fn split_end(word: &str) -> Result<(&str, Option<Timestamp>), String> {
    let Some((word, end)) = word.split_once('@') else { return Ok((word, None)) };
    let end = DateTime::parse_from_rfc3339(end).ok().map(|end| end.to_utc());
    match end.filter(|end| (1970..9999).contains(&end.year())) {
        // The database keeps microseconds.
        Some(end) => Ok((word, Some(end.trunc_subsecs(6)))),
        None => {
            Err("after @ there must be a time of RFC 3339, such as 2027-01-31T09:00:00+09:00"
                .into())
        }
    }
}
