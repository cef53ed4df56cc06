use chrono::{DateTime, TimeDelta};
use proptest::prelude::*;

use super::*;
use crate::cli::{
    bulk::{Format, Mode, parse, write},
    caller::setup::cells,
};

const HEADER: &str = "name,enabled,rate_limit,description,spiffe_ids,dns_names,grants";

fn now() -> Timestamp {
    DateTime::UNIX_EPOCH + TimeDelta::days(20_000)
}

fn certificate_name(kind: CallerKind, identity: &str) -> CertificateName {
    CertificateName {
        kind: kind.as_str().into(),
        identity: identity.into(),
        ends_at: None,
        revoked: false,
    }
}

fn stored() -> Vec<CallerSetup> {
    let revoked =
        CertificateName { revoked: true, ..certificate_name(CallerKind::Dns, "old.example.com") };
    let over = GrantSetup {
        pattern: "over".into(),
        rights: vec!["get".into()],
        ends_at: Some(DateTime::UNIX_EPOCH),
    };
    let grant = GrantSetup {
        pattern: "acme-*".into(),
        rights: vec!["list".into(), "get".into()],
        ends_at: None,
    };
    let shop = CallerSetup {
        name: "shop".into(),
        enabled: true,
        rate_limit: Some(5),
        description: "old".into(),
        certificate_names: vec![certificate_name(CallerKind::Dns, "shop.example.com"), revoked],
        grants: vec![grant, over],
    };
    let other = CallerSetup {
        name: "other".into(),
        certificate_names: vec![certificate_name(CallerKind::Spiffe, "spiffe://a/other")],
        grants: vec![],
        ..shop.clone()
    };
    vec![other, shop]
}

fn plan(rows: &str) -> Plan {
    plan_of(rows, false)
}

fn plan_of(rows: &str, prune: bool) -> Plan {
    let content = parse(Format::Csv, &format!("{HEADER}\n{rows}\n"), COLUMNS).unwrap();
    assert!(content.faults.is_empty(), "{:?}", content.faults);
    Plan::new(&content.rows, &stored(), now(), Mode { update: true, prune })
}

#[test]
fn a_row_changes_the_columns_in_which_it_differs() {
    for (row, changed) in [
        ("shop,true,5,old,,shop.example.com,\"acme-*=get,list\"", None),
        ("shop,true,5,old,,shop.example.com,\"acme-*=list,get x@2001-01-01T00:00:00Z\"", None),
        (
            "shop,FALSE,,new,,shop.example.com,\"acme-*=get,list\"",
            Some("enabled rate_limit description"),
        ),
        (
            "shop,true,5,old,spiffe://a/b,shop.example.com@2200-01-01T00:00:00Z,\"acme-*=get\"",
            Some("spiffe_ids dns_names grants"),
        ),
        ("shop,true,5,old,,shop.example.com,\"acme-*=get,list\tdemo\"", Some("grants")),
    ] {
        let plan = plan(row);
        assert!(plan.faults.is_empty(), "{:?}", plan.faults);
        let found = plan.updates.first().map(|update| update.changed.join(" "));
        assert_eq!(found.as_deref(), changed, "{row}");
    }
}

#[test]
fn each_fault_of_a_row_is_named_by_line_and_column_and_never_by_a_value() {
    for (rows, faults) in [
        (
            "Canary,,,,,,",
            vec!["line 2, column name: account name must match [a-z0-9][a-z0-9._-]{0,62}"],
        ),
        (
            "new,canary,0,,canary,Canary,canary=canary",
            vec![
                "line 2, column enabled: it must be true or false",
                "line 2, column rate_limit: it must be 1 to 1000000, or empty for the broker's default",
                "line 2, column spiffe_ids: SPIFFE ID must match spiffe://trust-domain/path",
                "line 2, column dns_names: DNS name must match a DNS name in lower case",
                "line 2, column grants: right must be get, report or list",
            ],
        ),
        (
            "new,true,,,,,a@canary",
            vec![
                "line 2, column grants: after @ there must be a time of RFC 3339, such as 2027-01-31T09:00:00+09:00",
            ],
        ),
        (
            "new,true,,,,shop.example.com,",
            vec!["line 2, column dns_names: a name belongs to caller shop already"],
        ),
        (
            "shop,true,,,,old.example.com,",
            vec![
                "line 2, column dns_names: a name was revoked: `caller identity add` makes it valid again",
            ],
        ),
        (
            "new,true,,,,a.example.com,\nnewer,true,,,,a.example.com,",
            vec!["line 3, column dns_names: line 2 has the same name"],
        ),
        ("new,true,,,,,\nnew,true,,,,,", vec!["line 3, column name: line 2 has the same"]),
    ] {
        let plan = plan(rows);
        let found: Vec<_> = plan.faults.iter().map(ToString::to_string).collect();
        assert_eq!(found, faults, "{rows}");
    }
    let found = plan("new,true,,,,,\"a=get,get b b Canary*\"").faults;
    let found: Vec<_> = found.iter().map(|fault| fault.text.clone()).collect();
    assert_eq!(found[..2], ["a right is there twice", "a pattern is there twice"]);
    assert!(found[2].starts_with("account pattern must match"), "{found:?}");
}

#[test]
fn what_the_file_lacks_is_left_unless_it_is_pruned() {
    let rows = "shop,true,5,old,,,demo";
    let lacking = Lacking { callers: 1, grants: 1, names: 1 };
    let left = plan(rows);
    assert_eq!((left.lacking, &*left.updates[0].changed), (lacking, &["grants"][..]));
    let write = &left.updates[0].write;
    assert!(write.removed_grants.is_empty() && write.removed_names.is_empty());
    let pruned = plan_of(rows, true);
    assert_eq!(pruned.lacking, lacking);
    assert_eq!(pruned.removable, ["other"]);
    let write = &pruned.updates[0].write;
    assert_eq!(write.removed_grants, ["acme-*"]);
    assert_eq!(write.removed_names, [(CallerKind::Dns, "shop.example.com".to_owned())]);
    assert_eq!(pruned.updates[0].changed, ["dns_names", "grants"]);
}

#[test]
fn a_row_that_only_lacks_something_is_changed_by_pruning_alone() {
    let rows = "shop,true,5,old,,shop.example.com,";
    let (left, pruned) = (plan(rows), plan_of(rows, true));
    assert_eq!((left.updates.len(), left.unchanged), (0, 1));
    assert_eq!((pruned.updates.len(), pruned.unchanged), (1, 0));
    assert_eq!(pruned.updates[0].changed, ["grants"]);
}

#[test]
fn a_name_that_is_pruned_can_be_given_to_another_caller_unless_it_was_revoked() {
    let moved = |name: &str| {
        let rows = format!("shop,true,5,old,,,\"acme-*=get,list\"\nnew,true,,,,{name},");
        let faults = |prune| {
            plan_of(&rows, prune).faults.into_iter().map(|fault| fault.text).collect::<Vec<_>>()
        };
        (faults(false), faults(true))
    };
    let (left, pruned) = moved("shop.example.com");
    assert_eq!(left, ["a name belongs to caller shop already"]);
    assert!(pruned.is_empty(), "{pruned:?}");
    let (left, pruned) = moved("old.example.com");
    assert!(left == pruned && left[0].starts_with("a name was revoked"), "{left:?}");
}

proptest! {
    #[test]
    fn importing_an_export_changes_nothing(
        callers in prop::collection::btree_map(
            "[a-z0-9][a-z0-9._-]{0,8}",
            (any::<bool>(), prop::option::of(1..=1_000_000), "[a-z,;\"\n가]{0,8}",
                prop::collection::btree_map("[a-z]{1,4}\\*?", (1_u8..8, prop::option::of(1_u32..2_000_000_000)), 0..3)),
            0..4,
        )
    ) {
        let time = |seconds: u32| DateTime::UNIX_EPOCH + TimeDelta::microseconds(i64::from(seconds) * 1_000_003);
        let stored: Vec<_> = callers.into_iter().map(|(name, (enabled, rate_limit, description, grants))| CallerSetup {
            certificate_names: vec![
                certificate_name(CallerKind::Dns, &format!("{}.x", name.replace(['.', '_', '-'], "0"))),
                CertificateName {
                    ends_at: Some(time(2_000_000_000)),
                    ..certificate_name(CallerKind::Spiffe, &format!("spiffe://a/{name}"))
                },
            ],
            grants: grants.into_iter().map(|(pattern, (rights, end))| GrantSetup {
                pattern,
                rights: Right::ALL.into_iter().enumerate()
                    .filter(|(bit, _)| rights & (1 << bit) != 0)
                    .map(|(_, right)| right.as_str().to_owned()).rev().collect(),
                ends_at: end.map(time),
            }).collect(),
            name, enabled, rate_limit, description,
        }).collect();
        prop_assume!({
            let names: HashSet<_> = stored.iter().map(|it| it.certificate_names[0].identity.clone()).collect();
            names.len() == stored.len()
        });
        let columns: Vec<_> = COLUMNS.iter().map(|column| column.name).collect();
        for format in [Format::Csv, Format::Jsonl] {
            let file = write(format, &columns, stored.iter().map(|caller| cells(caller, now())));
            let content = parse(format, &file, COLUMNS).unwrap();
            let mode = Mode { update: true, prune: true };
            let plan = Plan::new(&content.rows, &stored, now(), mode);
            prop_assert!(content.faults.is_empty() && plan.faults.is_empty(), "{file}: {plan:?}");
            prop_assert!(!plan.lacking.any(), "{file}: {plan:?}");
            prop_assert!(plan.updates.is_empty(), "{file}: {plan:?}");
        }
    }
}
