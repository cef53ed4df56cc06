//! The forms of a database's URL: which are supported, and what is said of the others. No text quotes the URL, which
//! may hold a password.

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use url::{ParseError, Url};

/// Why a URL cannot be used: what is not supported, and how to write it.
pub(super) type Fault = &'static str;

const FORM: Fault = "not a postgresql://user@host/database URL, in which special characters of the password are \
     percent-encoded";
const QUOTED: Fault = "begins with a quotation mark: write the URL without quotation marks";
const JDBC: Fault = "a JDBC URL is not supported: write postgresql://user:password@host:port/database, with user and \
     password before the host";
const DRIVER: Fault = "the name of a driver after the scheme is not supported: write postgresql://, without `+driver`";
const KEYWORDS: Fault = "the form `host=… dbname=…` is not supported: write \
     postgresql://user:password@host:port/database, with further parameters after a question mark";
const SEVERAL_HOSTS: Fault = "several hosts are not supported: name one address that leads to the primary, such as a \
     load balancer's, a virtual IP, or a name in the DNS that follows it";
const NO_HOST: Fault = "has a user or a port, but no host: write postgresql://user@localhost/database, or \
     postgresql:///database?host=/directory&user=user for a Unix socket";
const BRACKETS: Fault = "an IPv6 address is written in brackets, and without a zone: postgresql://user@[::1]:5432/database";
const WHITE_SPACE: Fault =
    "has white space or more than one line: write the URL alone, and %20 for a space in it";
const PORT: Fault = "the port must be a number from 1 to 65535";
const SSLMODE: Fault = "sslmode must be disable, allow, prefer, require, verify-ca or verify-full";
const PEM: Fault = "sslrootcert, sslcert and sslkey must be paths of PEM files, or PEM";
const PRIMARY: Fault =
    "target_session_attrs must be any, read-write or primary: the broker needs the primary";

/// The parameters of a URL that the driver knows; in addition to them, `options[…]`.
const PARAMETERS: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// Parameters of libpq that say where to connect, or how securely, and that the driver does not know. To ignore them
/// would do something else than what was asked for. Each has the values that ask for nothing special.
const REFUSED: &[(&str, &[&str], Fault)] = &[
    (
        "service",
        &[],
        "the parameter service is not supported: write host, port, user and database into the URL",
    ),
    (
        "servicefile",
        &[],
        "the parameter servicefile is not supported: write host, port, user and database into the URL",
    ),
    (
        "passfile",
        &[],
        "the parameter passfile is not supported: name the password file in the environment variable PGPASSFILE",
    ),
    ("target_session_attrs", &["any", "read-write", "primary"], PRIMARY),
    (
        "sslcrl",
        &[],
        "the parameter sslcrl is not supported: the server's certificate is not checked for revocation",
    ),
    (
        "sslcrldir",
        &[],
        "the parameter sslcrldir is not supported: the server's certificate is not checked for revocation",
    ),
    (
        "sslpassword",
        &[],
        "the parameter sslpassword is not supported: sslkey must name a key that is not encrypted",
    ),
    (
        "sslnegotiation",
        &["postgres"],
        "sslnegotiation=direct is not supported: leave the parameter out",
    ),
    (
        "ssl_min_protocol_version",
        &["TLSv1", "TLSv1.1", "TLSv1.2"],
        "ssl_min_protocol_version can be TLSv1.2 at most",
    ),
    ("requiressl", &["0"], "the parameter requiressl is not supported: write sslmode=require"),
    ("require_auth", &[], "the parameter require_auth is not supported"),
    (
        "gssencmode",
        &["disable", "prefer"],
        "gssencmode=require is not supported: encrypt by sslmode=verify-full",
    ),
    (
        "replication",
        &["false", "off", "no", "0"],
        "the parameter replication is not supported: leave it out",
    ),
];

/// Refuses line breaks and tabs within `text`, and spaces before its parameters. The parser of URLs drops line breaks and
/// tabs, and so would take what follows them, such as a password in the next line of a file, for a part of the URL.
/// White space around the URL is harmless.
fn check_white_space(text: &str) -> Result<(), Fault> {
    let text = text.trim();
    let before_parameters = text.split('?').next().unwrap_or(text);
    if text.contains(|c: char| c.is_whitespace() && c != ' ') || before_parameters.contains(' ') {
        return Err(WHITE_SPACE);
    }
    Ok(())
}

/// Reads `text`. Returns the URL in a form that the driver understands, without the parameters that it does not know
/// (it would write them to the log with their values), and the names of those that are ignored.
///
/// # Errors
/// What is wrong, or not supported.
pub(super) fn parse(text: &str) -> Result<(Url, Vec<String>), Fault> {
    let mut url = match Url::parse(text) {
        Ok(url) => url,
        Err(error) => return Err(fault_of_text(text).unwrap_or_else(|| fault_of(error, text))),
    };
    if let Some(fault) = fault_of_text(text) {
        return Err(fault);
    }
    check_white_space(text)?;
    let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    // A `#`, `/` or `?` in a password ends the host's part of the URL, so the rest of the password would be
    // taken for something else. It has to be percent-encoded.
    if !matches!(url.scheme(), "postgres" | "postgresql")
        || url.cannot_be_a_base()
        || url.fragment().is_some()
        || url.path().contains('@')
        || pairs.iter().any(|(key, _)| !is_known(key) && !is_name(key))
    {
        return Err(FORM);
    }
    let (mut known, mut ignored) = (Vec::new(), Vec::new());
    for (key, value) in pairs {
        match judge(&key, &value)? {
            Parameter::Known => known.push((key, value)),
            Parameter::Ignored => ignored.push(key),
            Parameter::Void => {}
        }
    }
    // The driver neither takes brackets off nor decodes the name of a host.
    let in_query = known.iter().any(|(key, _)| key == "host" || key == "hostaddr");
    if let Some(host) = url.host_str().filter(|_| !in_query) {
        known.extend(plain_host(host)?.map(|host| ("host".to_owned(), host)));
    }
    if known.is_empty() {
        url.set_query(None);
    } else {
        url.query_pairs_mut().clear().extend_pairs(known);
    }
    Ok((url, ignored))
}

fn is_known(key: &str) -> bool {
    PARAMETERS.contains(&key) || key.starts_with("options[") && key.ends_with(']')
}

/// Whether `key` can be a parameter's name, and not the rest of a password.
fn is_name(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|it| it.is_ascii_alphanumeric() || b"-_".contains(&it))
}

/// Returns what is wrong with a text that is not a URL of Postgres, or that has a form of it which is not supported.
fn fault_of_text(text: &str) -> Option<Fault> {
    let text = text.trim();
    if text.starts_with(['"', '\'', '`']) {
        return Some(QUOTED);
    }
    let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
    if scheme == "jdbc" {
        return Some(JDBC);
    }
    if scheme.starts_with("postgres") && scheme.contains('+') {
        return Some(DRIVER);
    }
    let Some((_, rest)) = text.split_once("://") else {
        let is_keyword = |word: &str| {
            ["host", "hostaddr", "port", "dbname", "user", "password", "service", "sslmode"]
                .contains(&word)
        };
        let has_keyword = text
            .split('=')
            .any(|part| part.split_ascii_whitespace().next_back().is_some_and(is_keyword));
        return (text.contains('=') && has_keyword).then_some(KEYWORDS);
    };
    if ends_within_password(rest) {
        return None;
    }
    let authority = authority(rest);
    let (user, host) =
        authority.rsplit_once('@').map_or((None, authority), |it| (Some(it.0), it.1));
    if host.contains(',') {
        return Some(SEVERAL_HOSTS);
    }
    if host.is_empty() && user.is_some() || host.starts_with(':') && !host.starts_with("::") {
        return Some(NO_HOST);
    }
    let zone = host.starts_with('[') && host.contains('%');
    (zone || !host.starts_with('[') && host.matches(':').count() > 1).then_some(BRACKETS)
}

/// Returns what comes before the path and the query, of a URL without its scheme.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}

/// Whether a character that is not percent-encoded may have ended the authority within a password.
fn ends_within_password(rest: &str) -> bool {
    rest.contains('@') && !authority(rest).contains('@')
}

fn fault_of(error: ParseError, text: &str) -> Fault {
    let rest = text.split_once("://").map_or("", |(_, rest)| rest);
    match error {
        _ if ends_within_password(rest) => FORM,
        ParseError::EmptyHost => NO_HOST,
        ParseError::InvalidPort => PORT,
        ParseError::InvalidIpv6Address => BRACKETS,
        _ => FORM,
    }
}

/// What becomes of a parameter.
enum Parameter {
    /// The driver gets it.
    Known,
    /// It is left out, and that is said.
    Ignored,
    /// It is left out, since it asks for what is the case anyway.
    Void,
}

fn judge(key: &str, value: &str) -> Result<Parameter, Fault> {
    if let Some((_, usual, fault)) = REFUSED.iter().find(|(name, ..)| *name == key) {
        return if usual.contains(&value) { Ok(Parameter::Void) } else { Err(*fault) };
    }
    match key {
        "host" | "hostaddr" | "port" if value.contains(',') => return Err(SEVERAL_HOSTS),
        "port" if value.parse::<u16>().is_err() => return Err(PORT),
        "sslmode" | "ssl-mode" => {
            let modes = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
            if !modes.contains(&value) {
                return Err(SSLMODE);
            }
        }
        // The driver always trusts the CAs of the system too.
        "sslrootcert" | "ssl-root-cert" | "ssl-ca" if value == "system" => {
            return Ok(Parameter::Void);
        }
        "sslrootcert" | "ssl-root-cert" | "ssl-ca" | "sslcert" | "ssl-cert" if is_pem(value) => {
            let read: Result<Vec<_>, _> =
                CertificateDer::pem_slice_iter(value.as_bytes()).collect();
            if !read.is_ok_and(|read| !read.is_empty()) {
                return Err(PEM);
            }
        }
        "sslkey" | "ssl-key" if is_pem(value) => {
            PrivateKeyDer::from_pem_slice(value.as_bytes()).map_err(|_| PEM)?;
        }
        _ => {}
    }
    Ok(if is_known(key) { Parameter::Known } else { Parameter::Ignored })
}

/// Whether the value is PEM itself, for the driver too, and not the path of a file.
fn is_pem(value: &str) -> bool {
    value.contains("-----BEGIN")
}

/// Returns the host without brackets, or decoded, if it has to be given to the driver in another form.
fn plain_host(host: &str) -> Result<Option<String>, Fault> {
    if let Some(address) = host.strip_prefix('[') {
        return Ok(Some(address.trim_end_matches(']').to_owned()));
    }
    if !host.contains('%') {
        return Ok(None);
    }
    let decoded = percent_decode(host).ok_or(FORM)?;
    if decoded.contains(',') { Err(SEVERAL_HOSTS) } else { Ok(Some(decoded)) }
}

/// Decodes the percent-encoded bytes of `text`; `None` if they are not UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| first == b'%');
        if let Some(byte) = digits.and_then(|digits| hex::decode(digits).ok()) {
            decoded.extend(byte);
            rest = &after[2..];
        } else {
            decoded.push(first);
            rest = after;
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use sqlx::postgres::PgConnectOptions;

    use super::*;

    /// Where the driver connects: socket or host, port, user, database.
    fn leads_to(url: &str) -> String {
        let (url, _) = parse(url).unwrap_or_else(|fault| panic!("{url}: {fault}"));
        let options = PgConnectOptions::from_str(url.as_str()).unwrap();
        let socket = options.get_socket().map(|it| it.display().to_string());
        let host = socket.unwrap_or_else(|| options.get_host().to_owned());
        let (port, user) = (options.get_port(), options.get_username());
        format!("{host} {port} {user} {}", options.get_database().unwrap_or("-"))
    }

    #[test]
    fn each_supported_form_leads_where_psql_goes() {
        for (url, expected) in [
            ("postgresql://u@h/db", "h 5432 u db"),
            ("postgres://u:p@h:5433/db", "h 5433 u db"),
            ("POSTGRESQL://u@h/db", "h 5432 u db"),
            (" postgresql://u@h/db\n", "h 5432 u db"),
            ("postgresql://u@[::1]/db", "::1 5432 u db"),
            ("postgresql://u@[::1]:5433/db", "::1 5433 u db"),
            ("postgresql://u:p@[2001:db8::1]:5433/db?sslmode=require", "2001:db8::1 5433 u db"),
            ("postgresql://u@[::ffff:192.0.2.1]/db", "::ffff:c000:201 5432 u db"),
            ("postgresql://u@192.0.2.1/db", "192.0.2.1 5432 u db"),
            ("postgresql:///db?host=::1&user=u", "::1 5432 u db"),
            ("postgresql:///db?hostaddr=::1&user=u", "::1 5432 u db"),
            ("postgresql://u@name/db?hostaddr=192.0.2.1", "192.0.2.1 5432 u db"),
            ("postgresql://u@%2Fvar%2Frun%2Fpostgresql/db", "/var/run/postgresql 5432 u db"),
            ("postgresql://u@%2fvar%2frun:5433/db", "/var/run 5433 u db"),
            ("postgresql://%2Fvar%2Frun/db?user=u", "/var/run 5432 u db"),
            ("postgresql:///db?host=/var/run&port=5433&user=u", "/var/run 5433 u db"),
            ("postgresql://u@my%2Dhost/db", "my-host 5432 u db"),
            ("postgresql://u:a%23%2F%3F%40%25@h/d%20b", "h 5432 u d b"),
            ("postgresql://h/db?user=u&password=p&application_name=x", "h 5432 u db"),
        ] {
            assert_eq!(leads_to(url), expected, "{url}");
        }
    }

    #[test]
    fn each_other_form_is_refused_by_a_sentence_about_it_that_does_not_quote_it() {
        for (url, fault) in [
            ("host=h dbname=db user=u password=canary", KEYWORDS),
            ("dbname=db", KEYWORDS),
            ("host = h  password = canary", KEYWORDS),
            ("jdbc:postgresql://h/db?user=u&password=canary", JDBC),
            ("JDBC:postgresql:db", JDBC),
            ("postgresql+psycopg2://u:canary@h/db", DRIVER),
            ("postgresql+asyncpg://u:canary@h/db", DRIVER),
            ("postgres+ssl://u:canary@h/db", DRIVER),
            ("\"postgresql://u:canary@h/db\"", QUOTED),
            ("'postgresql://u:canary@h/db'", QUOTED),
            ("postgresql://u:canary@h1,h2/db", SEVERAL_HOSTS),
            ("postgresql://u:canary@h1:5432,h2:5432/db", SEVERAL_HOSTS),
            ("postgresql://u:canary@[::1]:5432,[::2]:5432/db", SEVERAL_HOSTS),
            ("postgresql://u:canary@h1%2Ch2/db", SEVERAL_HOSTS),
            ("postgresql:///db?host=h1,h2&password=canary", SEVERAL_HOSTS),
            ("postgresql://u:canary@h/db?port=5432,5433", SEVERAL_HOSTS),
            ("postgresql://u:canary@/db", NO_HOST),
            ("postgresql://:5432/db", NO_HOST),
            ("postgresql://u:canary@:5432/db", NO_HOST),
            ("postgresql://u:canary@::1/db", BRACKETS),
            ("postgresql://u:canary@::1:5432/db", BRACKETS),
            ("postgresql://u:canary@2001:db8::1/db", BRACKETS),
            ("postgresql://u:canary@[fe80::1%25eth0]/db", BRACKETS),
            ("postgresql://u:canary@[::g]/db", BRACKETS),
            ("postgresql://u:canary@h:port/db", PORT),
            ("postgresql://u:canary@h:99999/db", PORT),
            ("postgresql://u@h/db?port=canary", PORT),
            ("mysql://u:canary@h/db", FORM),
            ("psql://u:canary@h/db", FORM),
            ("https://u:canary@h/db", FORM),
            ("postgresql:db", FORM),
            ("u:canary@h/db", FORM),
            ("canary", FORM),
            ("", FORM),
            ("postgresql://u:1#canary@h/db", FORM),
            ("postgresql://u:1/canary@h/db", FORM),
            ("postgresql://u:1?canary@h/db", FORM),
            ("postgresql://u:a,b/canary@h/db", FORM),
        ] {
            assert_eq!(parse(url).unwrap_err(), fault, "{url}");
            assert!(!fault.contains("canary"));
        }
    }

    #[test]
    fn nothing_after_white_space_becomes_a_part_of_the_url() {
        for space in ["\n", "\r\n", "\t", "\r", " ", "\u{b}", "\n\n"] {
            for url in [
                "postgresql://broker@h/a{}SECONDpw",
                "postgresql://broker@h/a{}PGPASSWORD=x",
                "postgresql://broker@h{}/a",
                "postgresql://bro{}ker@h/a",
                "postgresql://u:p{}w@h/a",
                "postgres{}ql://u@h/a",
            ] {
                assert!(parse(&url.replace("{}", space)).is_err(), "{url} {space:?}");
            }
            leads_to(&format!("{space}postgresql://u@h/a{space}"));
        }
        for space in ["\n", "\t"] {
            let url = format!("postgresql://u@h/a?sslmode=disable{space}PGPASSWORD=x");
            assert_eq!(parse(&url).unwrap_err(), WHITE_SPACE);
        }
    }

    #[test]
    fn each_parameter_of_libpq_is_obeyed_ignored_by_name_or_refused_by_a_sentence() {
        let pem = "-----BEGIN CERTIFICATE-----canary-----END CERTIFICATE-----";
        for (parameter, expected) in [
            ("sslmode=verify-full", "obeyed"),
            ("sslmode=allow", "obeyed"),
            ("sslmode=canary", SSLMODE),
            ("sslmode=", SSLMODE),
            ("sslrootcert=/ca.pem", "obeyed"),
            ("sslrootcert=system", "is the case"),
            (&format!("sslrootcert={pem}"), PEM),
            (&format!("sslcert={pem}"), PEM),
            (&format!("sslkey={pem}"), PEM),
            ("sslcert=/c.pem&sslkey=/k.pem", "obeyed"),
            ("options=-c%20role%3Dr", "obeyed"),
            ("options[role]=r", "obeyed"),
            ("application_name=x", "obeyed"),
            ("connect_timeout=10", "ignored: connect_timeout"),
            ("channel_binding=require", "ignored: channel_binding"),
            ("keepalives_idle=30", "ignored: keepalives_idle"),
            ("tcp_user_timeout=30", "ignored: tcp_user_timeout"),
            ("client_encoding=utf8", "ignored: client_encoding"),
            ("fallback_application_name=x", "ignored: fallback_application_name"),
            ("krbsrvname=x", "ignored: krbsrvname"),
            ("load_balance_hosts=random", "ignored: load_balance_hosts"),
            ("pgbouncer=true", "ignored: pgbouncer"),
            ("target_session_attrs=read-write", "is the case"),
            ("target_session_attrs=primary", "is the case"),
            ("target_session_attrs=any", "is the case"),
            ("target_session_attrs=standby", PRIMARY),
            ("target_session_attrs=prefer-standby", PRIMARY),
            ("target_session_attrs=read-only", PRIMARY),
            ("gssencmode=prefer", "is the case"),
            ("ssl_min_protocol_version=TLSv1.2", "is the case"),
            ("sslnegotiation=postgres", "is the case"),
            ("service=x", "service is not supported"),
            ("passfile=/f", "PGPASSFILE"),
            ("sslcrl=/crl", "sslcrl is not supported"),
            ("sslcrldir=/crl", "sslcrldir is not supported"),
            ("sslpassword=canary", "sslpassword is not supported"),
            ("sslnegotiation=direct", "sslnegotiation=direct"),
            ("ssl_min_protocol_version=TLSv1.3", "TLSv1.2 at most"),
            ("gssencmode=require", "gssencmode=require"),
            ("requiressl=1", "write sslmode=require"),
            ("require_auth=scram-sha-256", "require_auth is not supported"),
            ("replication=database", "replication is not supported"),
        ] {
            let url = format!("postgresql://u@h/db?{parameter}");
            let end = match parse(&url) {
                Err(fault) => fault.to_owned(),
                Ok((_, ignored)) if !ignored.is_empty() => {
                    format!("ignored: {}", ignored.join(", "))
                }
                Ok((url, _)) if url.query().is_some() => "obeyed".to_owned(),
                Ok(_) => "is the case".to_owned(),
            };
            assert!(end.contains(expected), "{parameter}: {end}");
            assert!(!end.contains("canary"), "{parameter}: {end}");
        }
    }
}
