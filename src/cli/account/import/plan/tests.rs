use proptest::prelude::*;

use super::*;
use crate::cli::{
    account::{
        columns::{COLUMNS, EXPORTED},
        export::cells,
    },
    bulk::{Format, Mode, parse, write},
};

fn stored() -> Vec<StoredAccount> {
    let account = |name: &str, client_id: &str| StoredAccount {
        name: name.into(),
        client_id: client_id.into(),
        enabled: true,
        description: "old".into(),
        credential_version: 1,
    };
    vec![account("acme", "acme-id"), account("beta", "beta-id")]
}

const UPDATE: Mode = Mode { update: true, prune: false };

fn plan(csv: &str, update: bool) -> Plan {
    plan_of(csv, Mode { update, prune: false })
}

fn plan_of(csv: &str, mode: Mode) -> Plan {
    let content = parse(Format::Csv, csv, COLUMNS).unwrap();
    assert!(content.faults.is_empty());
    Plan::new(&content.rows, &stored(), mode)
}

#[test]
fn a_new_account_needs_its_login_and_is_enabled_unless_the_file_says_otherwise() {
    let plan = plan(
        "name,client_id,client_secret,enabled\nnew,new-id,SK,FALSE\nnewer,newer-id,SK,true\n",
        false,
    );
    assert!(plan.faults.is_empty(), "{:?}", plan.faults);
    let enabled: Vec<_> = plan.inserts.iter().map(|insert| insert.enabled).collect();
    assert_eq!(enabled, [false, true]);
    assert!(self::plan("name,client_id,client_secret\nnew,new-id,SK\n", false).inserts[0].enabled);
}

#[test]
fn each_fault_of_a_row_is_named_by_line_and_column_and_never_by_a_value() {
    for (rows, faults) in [
        (
            "Canary,canary id,,canary",
            vec![
                "line 2, column name: account name must match [a-z0-9][a-z0-9._-]{0,62}",
                "line 2, column client_id: client id must have visible ASCII and Hangul only; character 7 is a space",
                "line 2, column enabled: it must be true or false",
            ],
        ),
        (
            "new,,,true",
            vec![
                "line 2, column client_id: a new account needs it",
                "line 2, column client_secret: a new account needs it",
            ],
        ),
        (
            "new,new-id,canary-canary-canary,",
            vec![
                "line 2, column client_secret: client secret is longer than 18 characters",
                "line 2, column enabled: it must be true or false",
            ],
        ),
        (
            "new,new-id,SK\u{200b}canary,true",
            vec![
                "line 2, column client_secret: client secret must have visible ASCII and Hangul only; \
             character 3 is a zero width space (U+200B)",
            ],
        ),
        ("new,id-1,SK,true\nnew,id-2,SK,true", vec!["line 3, column name: line 2 has the same"]),
        (
            "new,id-1,SK,true\nnewer,id-1,SK,true",
            vec!["line 3, column client_id: line 2 has the same"],
        ),
        (
            "new,acme-id,SK,true",
            vec!["line 2, column client_id: it belongs to account acme already"],
        ),
        (
            "acme,beta-id,SK,true",
            vec!["line 2, column client_id: it belongs to account beta already"],
        ),
        (
            "acme,other-id,,true",
            vec!["line 2, column client_id: it can only be changed together with client_secret"],
        ),
    ] {
        let plan = plan(&format!("name,client_id,client_secret,enabled\n{rows}\n"), true);
        let found: Vec<_> = plan.faults.iter().map(ToString::to_string).collect();
        assert_eq!(found, faults, "{rows}");
    }
}

#[test]
fn a_known_account_is_refused_unless_it_is_to_be_changed() {
    let rows = "name,client_id,client_secret\nacme,acme-id,SK\nnew,new-id,SK\n";
    let refused = plan(rows, false);
    let text = refused.faults[0].to_string();
    assert_eq!(text, "line 2, column name: there is such an account already: --update changes it");
    assert_eq!(refused.inserts.len(), 1);
    let changed = plan(rows, true);
    // Whether it is another secret, only a broker can tell.
    assert!(changed.updates[0].changed.is_empty() && changed.updates[0].secret.is_some());
}

#[test]
fn an_update_names_the_columns_that_differ_and_leaves_the_others() {
    for (rows, changed) in [
        ("name\nacme\n", None),
        ("name,client_id,client_secret,enabled,description\nacme,acme-id,,true,old\n", None),
        ("name,enabled\nacme,false\n", Some(vec!["enabled"])),
        ("name,description\nacme,\n", Some(vec!["description"])),
        ("name,client_id,client_secret\nacme,other,SK\n", Some(vec!["client_id", "client_secret"])),
    ] {
        let plan = plan(rows, true);
        assert!(plan.faults.is_empty(), "{:?}", plan.faults);
        assert_eq!(plan.updates.into_iter().next().map(|update| update.changed), changed, "{rows}");
    }
}

#[test]
fn an_account_that_the_file_lacks_keeps_its_login_unless_it_is_pruned() {
    let rows = "name,client_id,client_secret\nacme,,\nnew,beta-id,SK\n";
    let left = plan(rows, true);
    assert_eq!(
        left.faults[0].to_string(),
        "line 3, column client_id: it belongs to account beta already"
    );
    let pruned = plan_of(rows, Mode { update: true, prune: true });
    assert!(pruned.faults.is_empty(), "{pruned:?}");
    assert_eq!(pruned.lacking, ["beta"]);
    assert_eq!(pruned.inserts[0].client_id.as_str(), "beta-id");
    // A row with a fault is in the file too.
    assert!(plan("name,enabled\nacme,\nbeta,\n", true).lacking.is_empty());
}

proptest! {
    #[test]
    fn importing_an_export_changes_nothing(
        accounts in prop::collection::btree_map(
            "[a-z0-9][a-z0-9._-]{0,8}",
            // An older release took characters that are refused now.
            ("[!-~가\u{200b}]{1,6}", any::<bool>(), "[a-z,;\"\n\t 가\u{200b}]{0,12}"),
            0..5,
        )
    ) {
        let stored: Vec<_> = accounts.into_iter().enumerate()
            .map(|(nth, (name, (client_id, enabled, description)))| StoredAccount {
                name, client_id: format!("{client_id}{nth}"), enabled, description, credential_version: 1,
            })
            .collect();
        for format in [Format::Csv, Format::Jsonl] {
            let file = write(format, &EXPORTED, stored.iter().map(cells));
            let content = parse(format, &file, COLUMNS).unwrap();
            let plan = Plan::new(&content.rows, &stored, UPDATE);
            prop_assert!(content.faults.is_empty() && plan.faults.is_empty(), "{file}: {plan:?}");
            prop_assert!(plan.inserts.is_empty() && plan.updates.is_empty(), "{plan:?}");
            prop_assert_eq!(plan.unchanged, stored.len());
            prop_assert!(plan.lacking.is_empty(), "{plan:?}");
        }
    }
}
