//! The forms of a database's URL: which are supported, and what is said of the others. No text quotes the URL, which
//! may hold a password.

use std::path::Path;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use url::{Host, ParseError, Url};

use crate::files::bounded::may_never_end;

/// Why a URL cannot be used: what is not supported, and how to write it.
pub(super) type Fault = &'static str;

/// Returns the fault that `$form`, the name of another tool's form, is not supported.
macro_rules! unsupported {
    ($form:literal) => {
        concat!(
            $form,
            " is not supported: write postgresql://user:password@host:port/database, in which special characters \
             of the password are percent-encoded"
        )
    };
}

const FORM: Fault = "not a postgresql://user@host/database URL, in which special characters of the password are \
     percent-encoded";
const QUOTED: Fault = "begins with a quotation mark: write the URL without quotation marks";
const ASSIGNMENT: Fault = "begins with the name of a variable or a command: write the URL alone";
const VARIABLE: Fault =
    "is the name of a variable, which nothing has replaced by its value: write the URL";
const JDBC: Fault = unsupported!("a JDBC URL (jdbc:postgresql:…)");
const R2DBC: Fault = unsupported!("an R2DBC URL (r2dbc:postgresql:…)");
const PDO: Fault = unsupported!("the form of PHP (pgsql:host=…;dbname=… or pgsql://…)");
const DBI: Fault = unsupported!("the form of Perl (dbi:Pg:dbname=…;host=…)");
const ODBC: Fault = unsupported!("an ODBC URL");
const SEMICOLONS: Fault = unsupported!(
    "a connection string with semicolons, as of .NET and ODBC (Host=…;Port=…;Database=…),"
);
const ECTO: Fault = unsupported!("the scheme ecto://, as of Elixir,");
const POSTGIS: Fault = unsupported!("the scheme postgis://");
const SHORT_SCHEME: Fault = unsupported!("a short form of the scheme, such as pg:// or psql://,");
const PRISMA: Fault = unsupported!("the scheme prisma://");
const OTHER_SERVER: Fault = unsupported!("another server than Postgres");
const DRIVER: Fault = unsupported!(
    "the name of a driver or of another tool within the scheme (postgresql+driver://…)"
);
const KEYWORDS: Fault = "the form `host=… dbname=…` is not supported: write \
     postgresql://user:password@host:port/database, with further parameters after a question mark";
const SEVERAL_HOSTS: Fault = "several hosts are not supported: name one address that leads to the primary, such as a \
     load balancer's, a virtual IP, or a name in the DNS that follows it";
const NO_HOST: Fault = "has a user or a port, but no host: write postgresql://user@localhost/database, or \
     postgresql:///database?host=/directory&user=user for a Unix socket";
const BRACKETS: Fault = "an IPv6 address is written in brackets, and without a zone: postgresql://user@[::1]:5432/database";
const WHITE_SPACE: Fault =
    "has white space or more than one line: write the URL alone, and %20 for a space in it";
const ADDRESS: Fault =
    "an IPv4 address is written as four numbers from 0 to 255, such as 127.0.0.1";
const NUL: Fault =
    "has a %00: a user, a password and a database of Postgres cannot have this character";
const PORT: Fault = "the port must be a number from 1 to 65535";
const SSLMODE: Fault = "sslmode must be disable, allow, prefer, require, verify-ca or verify-full";
const PEM: Fault = "sslrootcert, sslcert and sslkey must be paths of PEM files, or PEM";
const PEM_FILE: Fault = "sslrootcert, sslcert and sslkey must name regular files";
const PRIMARY: Fault =
    "target_session_attrs must be any, read-write or primary: the broker needs the primary";

/// The schemes of other tools that a colon ends, with what is said of them.
const OTHER_FORMS: &[(&str, Fault)] = &[
    ("jdbc", JDBC),
    ("r2dbc", R2DBC),
    ("r2dbcs", R2DBC),
    ("pgsql", PDO),
    ("pdo_pgsql", PDO),
    ("pdo-pgsql", PDO),
    ("dbi", DBI),
    ("odbc", ODBC),
];

/// The schemes of other tools that `://` ends, with what is said of them. Without the slashes, such a word may be a user.
const OTHER_SCHEMES: &[(&str, Fault)] = &[
    ("ecto", ECTO),
    ("postgis", POSTGIS),
    ("psql", SHORT_SCHEME),
    ("pg", SHORT_SCHEME),
    ("pgx", SHORT_SCHEME),
    ("pgx5", SHORT_SCHEME),
    ("pq", SHORT_SCHEME),
    ("prisma", PRISMA),
    ("cockroachdb", OTHER_SERVER),
    ("cockroach", OTHER_SERVER),
    ("redshift", OTHER_SERVER),
    ("mysql", OTHER_SERVER),
    ("mysql2", OTHER_SERVER),
    ("mariadb", OTHER_SERVER),
    ("mssql", OTHER_SERVER),
    ("sqlserver", OTHER_SERVER),
    ("oracle", OTHER_SERVER),
    ("sqlite", OTHER_SERVER),
    ("sqlite3", OTHER_SERVER),
    ("mongodb", OTHER_SERVER),
    ("redis", OTHER_SERVER),
    ("http", OTHER_SERVER),
    ("https", OTHER_SERVER),
    ("tcp", OTHER_SERVER),
    ("unix", OTHER_SERVER),
];

/// The keys with which a connection string of .NET or ODBC begins, in lower case without spaces.
const SEMICOLON_KEYS: &[&str] = &[
    "host",
    "server",
    "servername",
    "datasource",
    "address",
    "addr",
    "port",
    "database",
    "initialcatalog",
    "db",
    "dbname",
    "user",
    "username",
    "userid",
    "uid",
    "password",
    "pwd",
    "driver",
    "provider",
    "dsn",
    "filedsn",
    "pooling",
    "sslmode",
    "searchpath",
];

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
    (
        "ssl",
        &[],
        "the parameter ssl is not supported: write sslmode=verify-full, or sslmode=require to encrypt without \
         verifying the server, or sslmode=disable",
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
    // Percent-encoded or not, and in whichever part: the parser has encoded it.
    if url.as_str().contains("%00") {
        return Err(NUL);
    }
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
    for (key, mut value) in pairs {
        if key == "host" || key == "hostaddr" {
            value = full_address(&value)?.unwrap_or(value);
        }
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
    if text.starts_with('$') || text.starts_with('%') && text.ends_with('%') {
        return Some(VARIABLE);
    }
    if begins_with_command(text) {
        return Some(ASSIGNMENT);
    }
    let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
    let said_of = |forms: &[(&str, Fault)]| {
        forms.iter().find(|(name, _)| *name == scheme).map(|(_, fault)| *fault)
    };
    if let Some(fault) = said_of(OTHER_FORMS) {
        return Some(fault);
    }
    if has_semicolons(text) {
        return Some(SEMICOLONS);
    }
    if text[scheme.len()..].starts_with("://") {
        if scheme.contains("postgres") && scheme.contains('+') {
            return Some(DRIVER);
        }
        if let Some(fault) = said_of(OTHER_SCHEMES) {
            return Some(fault);
        }
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

/// Whether a line of a shell or of a file with variables was pasted.
fn begins_with_command(text: &str) -> bool {
    let before = text.split_once("postgres").map_or("", |(before, _)| before);
    let before = before.trim_end_matches(['"', '\'']);
    // A colon alone may end a scheme in capital letters.
    let name = before.trim_end().strip_suffix('=').or_else(|| before.strip_suffix(": "));
    let is_name = |name: &str| {
        let name = name.trim_end().strip_prefix("export ").unwrap_or(name).trim();
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
    };
    name.is_some_and(is_name) || ["psql ", "export ", "set "].iter().any(|it| text.starts_with(it))
}

/// Whether `text` consists of `Key=value` pairs between semicolons, or begins with such a pair that libpq does not have.
fn has_semicolons(text: &str) -> bool {
    let key = |part: &str| {
        let (key, _) = part.split_once('=')?;
        let plain: String = key.chars().filter(|it| !matches!(it, ' ' | '_')).collect();
        SEMICOLON_KEYS.contains(&&*plain.to_ascii_lowercase()).then(|| key.trim().to_owned())
    };
    let mut keys = text.split(';').map(key);
    let Some(Some(first)) = keys.next() else { return false };
    let of_libpq = ["host", "port", "dbname", "user", "password", "sslmode"];
    !of_libpq.contains(&&*first) || keys.any(|key| key.is_some())
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
        "sslrootcert" | "ssl-root-cert" | "ssl-ca" | "sslcert" | "ssl-cert" | "sslkey"
        | "ssl-key"
            if !is_pem(value) && may_never_end(Path::new(value)) =>
        {
            return Err(PEM_FILE);
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
        return full_address(host);
    }
    let decoded = percent_decode(host).ok_or(FORM)?;
    if decoded.contains(',') {
        return Err(SEVERAL_HOSTS);
    }
    Ok(Some(full_address(&decoded)?.unwrap_or(decoded)))
}

/// Returns the address for which `host` stands, if its last part is a number: the system, and so libpq, takes `127.1` and
/// `0x7f.1` for `127.0.0.1`. It is given to the driver in full, so that the address that is checked is the one that the driver connects to.
fn full_address(host: &str) -> Result<Option<String>, Fault> {
    let last = host.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_number = match last.strip_prefix("0x") {
        Some(digits) => digits.bytes().all(|it| it.is_ascii_hexdigit()),
        None => !last.is_empty() && last.bytes().all(|it| it.is_ascii_digit()),
    };
    // The rest are paths of sockets, and IPv6 addresses, which may end in the form of IPv4.
    if !is_number || host.contains(['/', ':']) {
        return Ok(None);
    }
    match Host::parse(host) {
        Ok(Host::Ipv4(address)) => Ok(Some(address.to_string())),
        _ => Err(ADDRESS),
    }
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
            ("r2dbc:postgresql://u:canary@h/db", R2DBC),
            ("r2dbc:pool:postgresql://u:canary@h/db", R2DBC),
            ("pgsql:host=h;port=5432;dbname=db;user=u;password=canary", PDO),
            ("pgsql://u:canary@h/db", PDO),
            ("pdo-pgsql://u:canary@h/db", PDO),
            ("dbi:Pg:dbname=db;host=h;password=canary", DBI),
            ("Host=h;Port=5432;Database=db;Username=u;Password=canary", SEMICOLONS),
            ("Host=h", SEMICOLONS),
            ("host=h;database=db;password=canary", SEMICOLONS),
            ("Server=h;Database=db;User Id=u;Password=canary;", SEMICOLONS),
            ("Server = h; Database = db", SEMICOLONS),
            ("Data Source=h;Initial Catalog=db;Pwd=canary", SEMICOLONS),
            ("User ID=u;Password=canary;Host=h;Port=5432", SEMICOLONS),
            ("Username=u;Password=a://canary;Host=h", SEMICOLONS),
            ("Driver={PostgreSQL Unicode};Server=h;Uid=u;Pwd=canary", SEMICOLONS),
            ("DSN=canary", SEMICOLONS),
            ("ecto://u:canary@h/db", ECTO),
            ("postgis://u:canary@h/db", POSTGIS),
            ("pg://u:canary@h/db", SHORT_SCHEME),
            ("pgx5://u:canary@h/db", SHORT_SCHEME),
            ("prisma://accelerate.prisma-data.net/?api_key=canary", PRISMA),
            ("prisma+postgres://h/?api_key=canary", DRIVER),
            ("sqlite:///canary", OTHER_SERVER),
            ("cockroachdb://u:canary@h/db", OTHER_SERVER),
            ("DATABASE_URL=postgresql://u:canary@h/db", ASSIGNMENT),
            ("export DATABASE_URL='postgresql://u:canary@h/db'", ASSIGNMENT),
            ("DATABASE_URL: postgresql://u:canary@h/db", ASSIGNMENT),
            ("psql postgresql://u:canary@h/db", ASSIGNMENT),
            ("$DATABASE_URL", VARIABLE),
            ("${DATABASE_URL}", VARIABLE),
            ("%DATABASE_URL%", VARIABLE),
            ("user=u host=h password=canary", KEYWORDS),
            ("host='h' dbname='a;b' password=canary", KEYWORDS),
            ("service=canary", KEYWORDS),
            ("postgresql://u:canary@h1,[::1]:5432/db", SEVERAL_HOSTS),
            ("postgresql://u:canary@%2Ftmp,h2/db", SEVERAL_HOSTS),
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
            ("postgresql://u:canary@256.1.1.1/db", ADDRESS),
            ("postgresql://u:canary@1.2.3.4.5/db", ADDRESS),
            ("postgresql://u:canary@127.0.0.08/db", ADDRESS),
            ("postgresql:///db?host=1.2.3.256&password=canary", ADDRESS),
            ("postgresql://u%00:canary@h/db", NUL),
            ("postgresql://u:canary%00@h/db", NUL),
            ("postgresql://u:canary@h/d%00b", NUL),
            ("postgresql://u:canary@h%00/db", NUL),
            ("postgresql://u:canary@h/db?user=a%00", NUL),
            ("postgresql://u:canary@h/db?options=-c%20role%3Dr%00", NUL),
            ("postgresql://u:canary@h/db?connect_timeout=%00", NUL),
            ("postgresql://u:canary@h/d\0b", NUL),
            ("postgresql://u:canary@h:port/db", PORT),
            ("postgresql://u:canary@h:99999/db", PORT),
            ("postgresql://u@h/db?port=canary", PORT),
            ("mysql://u:canary@h/db", OTHER_SERVER),
            ("psql://u:canary@h/db", SHORT_SCHEME),
            ("https://u:canary@h/db", OTHER_SERVER),
            ("pg:canary@h/db", FORM),
            ("postgresql:/u:canary@h/db", FORM),
            ("postgresql//u:canary@h/db", FORM),
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
            ("sslmode=no-verify", SSLMODE),
            ("sslmode=Require", SSLMODE),
            ("sslmode=true", SSLMODE),
            ("ssl=true", "write sslmode=verify-full"),
            ("ssl=false", "the parameter ssl is not supported"),
            ("sslrootcert=/dev/zero", PEM_FILE),
            ("sslrootcert=/dev/null", "obeyed"),
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
