//! The parsers of values. Their errors say what was expected, and never quote the value, which may be a
//! secret.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use rustix::process::Signal;
use url::Url;

use super::urls::ProxyUrl;
use crate::{
    audit::journal::SyncMode,
    crypto::{IntakeError, IntakePublicKey, bearer::Bearer},
    domain::caller::AccountPattern,
    files::{bounded, given_path},
    telemetry::LogFormat,
    upstream::{Target, TargetError},
};

/// What is wrong with a value, or what was expected instead.
pub(super) type Fault = String;

pub(super) fn address(text: &str) -> Result<SocketAddr, Fault> {
    text.parse().map_err(|_| "not an address and port such as 127.0.0.1:50051".into())
}

pub(super) fn ip(text: &str) -> Result<IpAddr, Fault> {
    text.parse().map_err(|_| "not an IP address".into())
}

pub(super) fn path(text: &str) -> Result<PathBuf, Fault> {
    given_path::parse(text).map_err(|error| error.to_string())
}

/// Parses the path of a file that the client library reads, again and again and without a limit.
pub(super) fn regular_file(text: &str) -> Result<PathBuf, Fault> {
    let path = path(text)?;
    // A file that cannot be found is the library's to report.
    let found = fs::metadata(&path).ok();
    if found.as_ref().is_some_and(|found| !found.is_file()) {
        return Err("must be a regular file".into());
    }
    if found.is_some_and(|found| found.len() > bounded::FILE.bytes as u64) {
        return Err(format!("is larger than {} KiB", bounded::FILE.bytes >> 10));
    }
    Ok(path)
}

pub(super) fn target(text: &str) -> Result<Target, Fault> {
    text.parse().map_err(|error: TargetError| error.to_string())
}

pub(super) fn proxy(text: &str) -> Result<ProxyUrl, Fault> {
    http_url(text).map(ProxyUrl)
}

/// Parses a URL to which paths are appended: it must not have a path, a query or a user of its own.
pub(super) fn endpoint(text: &str) -> Result<Url, Fault> {
    let url = http_url(text)?;
    let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    // A parsed URL lacks the port that its scheme implies.
    let port = text.trim_end_matches('/').rsplit_once(':').map_or("", |(_, port)| port);
    let has_port = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if !bare || !has_port || !url.username().is_empty() || url.password().is_some() {
        return Err("must be a scheme, a host and a port, and nothing else".into());
    }
    Ok(url)
}

/// Parses one or more endpoints, separated by commas, all with the same scheme.
pub(super) fn endpoints(text: &str) -> Result<Vec<Url>, Fault> {
    let urls = text.split(',').map(|url| endpoint(url.trim())).collect::<Result<Vec<_>, _>>()?;
    if urls.iter().any(|url| url.scheme() != urls[0].scheme()) {
        return Err("must all be http, or all be https".into());
    }
    Ok(urls)
}

fn http_url(text: &str) -> Result<Url, Fault> {
    // The parser would drop line breaks and tabs.
    let text = Some(text).filter(|text| !text.contains(char::is_whitespace)).unwrap_or_default();
    Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| "not an http:// or https:// URL with a host".into())
}

pub(super) fn bearer(text: &str) -> Result<Bearer, Fault> {
    Bearer::parse(text).map_err(|error| error.to_string())
}

pub(super) fn intake_key(text: &str) -> Result<IntakePublicKey, Fault> {
    text.parse().map_err(|error: IntakeError| error.to_string())
}

/// Parses a list of addresses and CIDRs, separated by commas or white space.
pub(super) fn networks(text: &str) -> Result<Vec<IpNet>, Fault> {
    text.split([',', ' ', '\t', '\r', '\n'])
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().or_else(|_| part.parse().map(|ip: IpAddr| ip.into())))
        .collect::<Result<_, _>>()
        .map_err(|_| "not a list of addresses or CIDRs such as 192.0.2.1,198.51.100.0/24".into())
}

/// Parses the networks of load balancers. The broker believes the client addresses that they send, so a
/// network that contains all addresses is refused.
pub(super) fn load_balancers(text: &str) -> Result<Vec<IpNet>, Fault> {
    let networks = networks(text)?;
    if networks.iter().any(|network| network.prefix_len() == 0) {
        return Err("must be the load balancers' addresses, not all addresses".into());
    }
    Ok(networks)
}

pub(super) fn boolean(text: &str) -> Result<bool, Fault> {
    text.parse().map_err(|_| "must be true or false".into())
}

/// Returns a parser of numbers from `least` to `most`.
pub(super) fn number<T>(least: T, most: T) -> impl Fn(&str) -> Result<T, Fault>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    move |text| {
        text.parse()
            .ok()
            .filter(|number| *number >= least && *number <= most)
            .ok_or_else(|| format!("must be a number from {least} to {most}"))
    }
}

/// Like [`number`], but a value may end in `/s` (per second).
pub(super) fn rate<T>(least: T, most: T) -> impl Fn(&str) -> Result<T, Fault>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    let number = number(least, most);
    move |text| number(text.strip_suffix("/s").unwrap_or(text))
}

/// Returns a parser of durations with a unit, from `least` to `most`.
pub(super) fn duration(
    least: Duration,
    most: Duration,
) -> impl Fn(&str) -> Result<Duration, Fault> {
    move |text| {
        let read = humantime::parse_duration(text)
            .map_err(|_| "not a duration with its unit, such as 500ms, 30s or 24h".to_owned())?;
        if read < least || read > most {
            let (least, most) =
                (humantime::format_duration(least), humantime::format_duration(most));
            return Err(format!("must be {least} to {most}"));
        }
        Ok(read)
    }
}

/// Parses a SPIFFE trust domain: 1 to 255 lower case letters, digits, dots, dashes and underscores
/// (SPIFFE ID specification, section 2.1).
pub(super) fn trust_domain(text: &str) -> Result<String, Fault> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    if text.len() <= 255 && !text.is_empty() && text.bytes().all(plain) {
        return Ok(text.to_owned());
    }
    Err("must be a trust domain such as example.com, without spiffe://".into())
}

/// Parses how long audit records are kept. This is at least a day, because the records of a whole UTC
/// day are deleted at once. `None` means without limit.
pub(super) fn retention(text: &str) -> Result<Option<Duration>, Fault> {
    const DAY: Duration = Duration::from_hours(24);
    const LONGEST: Duration = Duration::from_hours(100 * 365 * 24);
    if text == "never" {
        return Ok(None);
    }
    duration(DAY, LONGEST)(text).map(Some).map_err(|fault| format!("{fault}, or never"))
}

/// Parses a size of at least 1 MiB: a number of bytes, or one with the unit B, KiB, MiB, GiB or TiB.
pub(super) fn bytes(text: &str) -> Result<u64, Fault> {
    const UNITS: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];
    const LEAST: u64 = 1 << 20;
    let (number, shift) = UNITS
        .into_iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))
        .unwrap_or((text, 0));
    number
        .trim_end()
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes >= LEAST)
        .ok_or_else(|| "must be a size of 1MiB at least, such as 512MiB or 8GiB".into())
}

pub(super) fn audit_sync(text: &str) -> Result<SyncMode, Fault> {
    match text {
        "fsync" => Ok(SyncMode::Fsync),
        "write" => Ok(SyncMode::Write),
        _ => Err("must be fsync or write".into()),
    }
}

/// Parses names and patterns of accounts, separated by commas or white space.
pub(super) fn accounts(text: &str) -> Result<Vec<AccountPattern>, Fault> {
    let parts = text.split([',', ' ', '\t', '\r', '\n']).filter(|part| !part.is_empty());
    let accounts = parts.map(str::parse).collect::<Result<Vec<_>, _>>();
    accounts
        .ok()
        .filter(|accounts| !accounts.is_empty())
        .ok_or_else(|| "must be names or patterns of accounts such as acme,shop-*".into())
}

/// Parses permissions of a file with a secret: an octal number that allows nothing to others, and nobody to run it.
pub(super) fn secret_mode(text: &str) -> Result<u32, Fault> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o660 == 0 && mode & 0o400 != 0)
        .ok_or_else(|| {
            "must be an octal number such as 0600 or 0640, without rights for others".into()
        })
}

/// Parses a group: its number, or a name that is in `/etc/group`.
pub(super) fn group(text: &str) -> Result<u32, Fault> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(text)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    named.ok_or_else(|| "no group has this name".into())
}

pub(super) fn signal(text: &str) -> Result<Signal, Fault> {
    match text.strip_prefix("SIG").unwrap_or(text) {
        "HUP" => Ok(Signal::HUP),
        "INT" => Ok(Signal::INT),
        "TERM" => Ok(Signal::TERM),
        "USR1" => Ok(Signal::USR1),
        "USR2" => Ok(Signal::USR2),
        _ => Err("must be HUP, INT, TERM, USR1 or USR2".into()),
    }
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, Fault> {
    match text {
        "pretty" => Ok(LogFormat::Pretty),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be pretty or json".into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("1048576"), Ok(1 << 20));
        assert_eq!(bytes("2 MiB"), Ok(2 << 20));
        for wrong in ["", "8", "8GB", "-1GiB", "1.5GiB", "99999999TiB", "1MiB1", "GiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn files_with_secrets_allow_nothing_to_others() {
        assert_eq!((secret_mode("0600"), secret_mode("640")), (Ok(0o600), Ok(0o640)));
        for wrong in ["", "0644", "0700", "0200", "-600", "rw-------", "0o600", "10600"] {
            assert!(secret_mode(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_group_is_a_number_or_a_name_of_this_machine() {
        assert_eq!((group("7"), group("root")), (Ok(7), Ok(0)));
        assert!(group("no-such-group").is_err() && group("").is_err());
    }

    #[test]
    fn accounts_are_names_and_patterns() {
        assert_eq!(accounts("acme, shop-*").unwrap().len(), 2);
        assert!(accounts(",").is_err() && accounts("Acme").is_err());
    }

    #[test]
    fn endpoints_have_one_scheme() {
        assert_eq!(endpoints("https://a:1, https://b:2").unwrap().len(), 2);
        assert_eq!(endpoints("https://a:443/,https://[::1]:50051").unwrap().len(), 2);
        for wrong in [
            "http://a:1,https://b:1",
            "http://a:1,",
            "a:1",
            "",
            "https://a",
            "https://a:",
            "https://[::1]",
        ] {
            assert!(endpoints(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn urls_have_no_white_space() {
        for space in [" ", "\t", "\n", "\r", "\r\n", "\u{b}"] {
            for url in [
                "http://a:5{}0051",
                "http://a{}b:1",
                "ht{}tp://a:1",
                "http://a:1{}",
                "{}http://a:1",
            ] {
                let url = url.replace("{}", space);
                assert!(endpoint(&url).is_err() && proxy(&url).is_err(), "{url:?}");
                let target = url.replace("//a", "//127.0.0.1");
                assert!(target.parse::<Target>().is_err(), "{target:?}");
            }
        }
    }

    #[test]
    fn networks_are_addresses_or_cidrs() {
        assert_eq!(networks("192.0.2.1, 198.51.100.0/24").unwrap().len(), 2);
        assert_eq!(networks("2001:db8::1").unwrap()[0].prefix_len(), 128);
        assert!(networks("192.0.2.1/33").is_err());
        assert!(networks("example.com").is_err());
    }

    #[test]
    fn a_rate_may_name_its_unit_and_is_a_number_in_range() {
        assert_eq!(rate(0.01, 100.0)("20/s"), Ok(20.0));
        assert!(rate(0.01, 100.0)("NaN").is_err());
        assert!(rate(0.01, 100.0)("0").is_err());
        assert!(rate(1_u32, 10)("11").is_err());
    }

    proptest! {
        #[test]
        fn sizes_survive_being_written_in_mebibytes(mib in 1_u64..1 << 40) {
            prop_assert_eq!(bytes(&format!("{mib}MiB")), Ok(mib << 20));
        }

        #[test]
        fn durations_survive_being_written(seconds in 1_u64..1_000_000) {
            let written = Duration::from_secs(seconds);
            let text = humantime::format_duration(written).to_string();
            prop_assert_eq!(duration(Duration::ZERO, Duration::MAX)(&text), Ok(written));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in any::<String>()) {
            let _ = (bytes(&text), networks(&text), retention(&text), proxy(&text), address(&text));
        }
    }
}
