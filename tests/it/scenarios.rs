//! The parts of the runner of the clients' scenarios that need no driver, and the files with the scenarios.
//! `clients/test` runs them.

#[path = "../../clients/conformance/runner/expect.rs"]
mod expect;
#[expect(dead_code, reason = "these tests read the fields that the runner acts on only in part")]
#[path = "../../clients/conformance/runner/scenario.rs"]
mod scenario;
#[path = "../../clients/conformance/runner/secrets.rs"]
mod secrets;

use std::{path::Path, time::Duration};

use serde_json::{Value, json};

use self::{
    expect::{Answer, Generations},
    scenario::{Expect, Runs, Step, parse, read_all},
    secrets::Secrets,
};

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/conformance/scenarios");

/// Returns the message of the error that a scenario with this text has.
fn error(text: &str) -> String {
    format!("{:#}", parse("it", text).unwrap_err())
}

#[test]
fn each_scenario_can_be_read_and_opens_a_client() {
    let scenarios = read_all(Path::new(DIRECTORY)).unwrap();
    assert!(!scenarios.is_empty());
    for scenario in scenarios {
        assert!(!scenario.title.ends_with('.'), "{}: a title is no sentence", scenario.name);
        let opens = scenario.steps.iter().any(|step| matches!(step, Step::Open(_)));
        assert!(opens, "{}", scenario.name);
    }
}

#[test]
fn absent_keys_have_defaults() {
    let scenario = parse("it", "title = 'x'\n[[steps]]\ndo = 'token'").unwrap();
    assert_eq!((scenario.runs, scenario.given.accounts), (Runs::EachDriver, 1));
    let Step::Token(token) = &scenario.steps[0] else { panic!("{:?}", scenario.steps) };
    assert_eq!((token.client.as_str(), token.account.as_str()), ("main", "acme-1"));
}

#[test]
fn what_is_misspelt_is_an_error_that_names_the_step() {
    for (text, named) in [
        ("titel = 'x'", "titel"),
        ("title = 'x'\nsteps = []", "no steps"),
        ("title = 'x'\n[given]\nacounts = 2\n[[steps]]\ndo = 'mark'", "acounts"),
        ("title = 'x'\n[given]\ntoken_life = 'long'\n[[steps]]\ndo = 'mark'", "number"),
        ("title = 'x'\n[[steps]]\ndo = 'mark'\n[[steps]]\ndo = 'tokn'", "step 2 (tokn)"),
        ("title = 'x'\n[[steps]]\ndo = 'mark'\naccount = 'a'", "step 1 (mark)"),
        ("title = 'x'\n[[steps]]\ndo = 'open'\nclinet = 'a'", "clinet"),
        ("title = 'x'\n[[steps]]\ndo = 'token'\nexpect = { eror = 'A' }", "eror"),
        ("title = 'x'\n[[steps]]\ndo = 'count'\nevent = 'e'", "number"),
        ("title = 'x'\n[[steps]]\ndo = 'issues'\nnumber = { least = 1 }", "least"),
    ] {
        let error = error(text);
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn an_error_in_a_file_names_the_file() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("wrong.toml"), "title = 1").unwrap();
    let error = format!("{:#}", read_all(directory.path()).unwrap_err());
    assert!(error.contains("wrong.toml"), "{error}");
}

#[test]
fn a_number_is_exact_or_a_range() {
    let scenario = |number: &str| {
        parse("it", &format!("title = 'x'\n[[steps]]\ndo = 'issues'\nnumber = {number}")).unwrap()
    };
    for (number, allowed) in [
        ("2", vec![2]),
        ("{ at_least = 2 }", vec![2, 3, 4]),
        ("{ at_most = 2 }", vec![0, 1, 2]),
        ("{ at_least = 1, at_most = 3 }", vec![1, 2, 3]),
    ] {
        let scenario = scenario(number);
        let Step::Issues { number, .. } = &scenario.steps[0] else { panic!() };
        assert_eq!((0..=4).filter(|n| number.allows(*n)).collect::<Vec<_>>(), allowed);
    }
}

#[test]
fn secrets_are_found_whole_in_part_and_when_they_are_unknown() {
    let token = "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VySWQiOiJpZC0xIn0.LPpURrBB0IP5x9koVAvXNQqQy7BIxE5F";
    let mut secrets = Secrets::default();
    secrets.add(token);
    for (printed, is_secret) in [
        (format!("got {token}"), true),
        (format!("got …{}", &token[token.len() - 16..]), true),
        (token[..20].to_owned(), true),
        ("a bearer: tbk_0123456789".to_owned(), true),
        ("a bearer is tbk_… and a token is eyJ…".to_owned(), false),
        ("acme-1 generation=117706861429870239".to_owned(), false),
    ] {
        let found = secrets.find_in(&format!("first line\n{printed}\nlast line"));
        assert_eq!(found.is_some(), is_secret, "{printed}");
        assert!(!found.is_some_and(|line| line.contains("IxE5F")), "it is shown");
    }
}

#[test]
fn an_answer_is_compared_with_what_is_expected() {
    let saved = Generations::from([("old".to_owned(), 7)]);
    let check = |answer: Result<Value, Value>, expect: &str| {
        let answer = Answer { result: answer, took: Duration::from_secs(2) };
        expect::check(&answer, &toml::from_str::<Expect>(expect).unwrap(), &saved)
    };
    let ok =
        || Ok(json!({"generation": "8", "status": 200, "body": "acme", "outcome": "TOO_SOON"}));
    let error = || Err(json!({"kind": "UNAVAILABLE", "code": "UNAVAILABLE", "message": "gone"}));
    for right in [
        "newer_than = 'old'",
        "status = 200\ncontains = 'cm'",
        "outcome = ['REISSUING', 'TOO_SOON']",
        "within = '3s'\nafter = '1s'",
    ] {
        check(ok(), right).unwrap_or_else(|error| panic!("{right}: {error}"));
        check(error(), right).unwrap_err();
    }
    for wrong in [
        "same_as = 'old'",
        "newer_than = 'unknown'",
        "status = 201",
        "contains = 'x'",
        "outcome = 'REISSUING'",
        "error = 'UNAVAILABLE'",
        "within = '1s'",
        "after = '3s'",
    ] {
        check(ok(), wrong).unwrap_err();
    }
    for right in ["error = ['UNAVAILABLE', 'OVERLOADED']\ncode = 'UNAVAILABLE'", "anything = true"]
    {
        check(error(), right).unwrap_or_else(|error| panic!("{right}: {error}"));
    }
    for wrong in ["", "error = 'INTERNAL'", "error = 'UNAVAILABLE'\nreason = 'X'"] {
        check(error(), wrong).unwrap_err();
    }
}
