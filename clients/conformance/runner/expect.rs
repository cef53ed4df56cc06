//! Compares the answer of a driver with what a step expects.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::scenario::Expect;

/// The answer of a driver, and how long it took.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) result: Result<Value, Value>,
    pub(crate) took: Duration,
}

/// The generations of the answers that were saved, by their names.
pub(crate) type Generations = BTreeMap<String, u64>;

/// Checks everything but `live`, which needs the upstream.
pub(crate) fn check(answer: &Answer, expect: &Expect, saved: &Generations) -> anyhow::Result<()> {
    let Answer { result, took } = answer;
    if let Some(within) = expect.within {
        ensure!(*took <= within, "the answer took {took:?}");
    }
    if let Some(after) = expect.after {
        ensure!(*took >= after, "the answer took only {took:?}");
    }
    match result {
        _ if expect.anything => Ok(()),
        Ok(ok) => check_ok(ok, expect, saved),
        Err(error) => check_error(error, expect),
    }
}

fn check_ok(ok: &Value, expect: &Expect, saved: &Generations) -> anyhow::Result<()> {
    ensure!(expect.error.is_empty(), "no error, but {} was expected", expect.error.join(" or "));
    if let Some(name) = &expect.same_as {
        let (is, was) = (generation(ok)?, find(saved, name)?);
        ensure!(is == was, "generation {is}, but that of `{name}` is {was}");
    }
    if let Some(name) = &expect.newer_than {
        let (is, was) = (generation(ok)?, find(saved, name)?);
        ensure!(is > was, "generation {is}, but that of `{name}` is {was}");
    }
    if !expect.outcome.is_empty() {
        let outcome = text(ok, "outcome")?;
        ensure!(
            expect.outcome.iter().any(|expected| expected == outcome),
            "the outcome is {outcome}"
        );
    }
    if let Some(status) = expect.status {
        ensure!(ok["status"] == status, "the status is {}: {}", ok["status"], ok["body"]);
    }
    if let Some(contained) = &expect.contains {
        let within = ok.get("body").or_else(|| ok.get("text")).and_then(Value::as_str);
        let within = within.context("the answer has neither `body` nor `text`")?;
        ensure!(within.contains(contained), "{within:?} does not contain {contained:?}");
    }
    Ok(())
}

fn check_error(error: &Value, expect: &Expect) -> anyhow::Result<()> {
    let kind = text(error, "kind")?;
    if !expect.error.iter().any(|expected| expected == kind) {
        bail!("the error is {error}");
    }
    let fields = [
        ("code", &expect.code),
        ("reason", &expect.reason),
        ("upstream_code", &expect.upstream_code),
    ];
    for (name, expected) in fields {
        let is = error.get(name).and_then(Value::as_str);
        ensure!(expected.is_none() || is == expected.as_deref(), "`{name}` is {is:?} in {error}");
    }
    // What the broker sent is passed on.
    let is_the_brokers = error.get("reason").is_some();
    ensure!(!is_the_brokers || !text(error, "message")?.is_empty(), "no text in {error}");
    Ok(())
}

/// Returns the generation in an answer, which is text because not all languages have numbers of 64 bits in JSON.
pub(crate) fn generation(ok: &Value) -> anyhow::Result<u64> {
    let text = text(ok, "generation")?;
    text.parse().with_context(|| format!("the generation is {text:?}"))
}

pub(crate) fn text<'a>(answer: &'a Value, name: &str) -> anyhow::Result<&'a str> {
    answer
        .get(name)
        .and_then(Value::as_str)
        .with_context(|| format!("no text `{name}` in {answer}"))
}

fn find(saved: &Generations, name: &str) -> anyhow::Result<u64> {
    saved.get(name).copied().with_context(|| format!("nothing was saved as `{name}`"))
}
