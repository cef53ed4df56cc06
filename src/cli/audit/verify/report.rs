//! The result of a verification, as text and as JSON.

use serde_json::{Value, json};

use crate::{
    audit::verify::VerificationReport,
    cli::{
        output::{self, Table, or_dash},
        time::LocalTime,
    },
};

/// Prints the report, and then how rows differ from what was recorded of them.
pub(super) fn print(report: &VerificationReport, differences: &[String]) -> anyhow::Result<()> {
    for finding in &report.findings {
        match finding.chain.as_str() {
            "" => output::line(&finding.fault)?,
            chain => output::line(format_args!("chain {chain}: {}", finding.fault))?,
        }
    }
    let unlisted = report.faults - report.findings.len() as u64;
    if unlisted > 0 {
        output::line(format_args!("and {unlisted} more"))?;
    }
    let mut table =
        Table::new(["CHAIN", "RECORDS", "REMOVED", "LAST", "SIGNED TO", "FROM", "TO", "HOLDS"]);
    for chain in &report.chains {
        table.row([
            chain.chain.clone(),
            chain.records.to_string(),
            chain.removed.to_string(),
            chain.last_seq.to_string(),
            or_dash(Some(chain.signed_seq).filter(|seq| *seq > 0)),
            or_dash(chain.times.map(|(from, _)| LocalTime(from))),
            or_dash(chain.times.map(|(_, to)| LocalTime(to))),
            if chain.faults == 0 { "yes" } else { "NO" }.into(),
        ]);
    }
    table.print("there are no chains")?;
    for difference in differences {
        output::line(difference)?;
    }
    for notice in &report.notices {
        output::note(format_args!("note: {notice}"));
    }
    let (records, chains) = (report.records(), report.chains.len());
    let holds = match (report.holds(), report.signatures_checked) {
        (false, _) => "it does NOT hold",
        (true, _) if !differences.is_empty() => {
            "the records hold, but the tables are NOT as they were recorded"
        }
        (true, true) => "all of it holds",
        (true, false) => "it holds as far as can be checked without keys",
    };
    output::note(format_args!("{records} records in {chains} chains: {holds}"));
    Ok(())
}

pub(super) fn in_json(report: &VerificationReport, differences: &[String]) -> Value {
    let findings = report.findings.iter().map(|finding| {
        json!({
            "chain": finding.chain, "seq": finding.fault.seq(), "fault": finding.fault.name(),
            "says": finding.fault.to_string(),
        })
    });
    json!({
        "holds": report.holds() && differences.is_empty(), "signatures_checked": report.signatures_checked,
        "records": report.records(), "faults": report.faults,
        "findings": findings.collect::<Vec<_>>(), "notices": report.notices,
        "chains": report.chains, "unrecorded_changes": differences,
    })
}
