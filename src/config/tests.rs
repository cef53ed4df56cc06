use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    time::Duration,
};

use proptest::prelude::*;

use super::*;
use crate::audit::journal::SyncMode;

const CANARY: &str = "canary";

fn read_file(path: &Path) -> io::Result<String> {
    match path.to_str() {
        Some("/secrets/url") => Ok("postgresql://broker:canary@localhost/from_file\n".into()),
        Some("/secrets/bad") => Ok("canary\n".into()),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

fn sources(env: &[(&str, &str)]) -> Sources {
    Sources {
        flags: BTreeMap::new(),
        env: env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        file: None,
        read_file,
    }
}

/// Sources that have every required setting, with the variables of `env` added or replaced.
fn valid_sources(env: &[(&str, &str)]) -> Sources {
    let mut sources = sources(&[
        ("DATABASE_URL", "postgresql://broker:canary@localhost/broker"),
        ("TOKEN_BROKER_KEYRING_FILE", "/keyring"),
        ("TOKEN_BROKER_UPSTREAM", "staging"),
    ]);
    for (name, value) in env {
        sources.env.insert((*name).into(), (*value).into());
    }
    sources
}

fn lines(sources: &Sources) -> Vec<String> {
    Settings::resolve(sources).map_or_else(|report| report.0, |_| Vec::new())
}

#[test]
fn the_documented_defaults_apply() {
    let (settings, warnings) = Settings::resolve(&valid_sources(&[])).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(settings.listen.to_string(), "127.0.0.1:50051");
    assert_eq!(settings.ops_listen.to_string(), "127.0.0.1:9464");
    assert_eq!(settings.state_dir, Path::new("/var/lib/token-broker"));
    assert!(settings.new_token_ends_older && !settings.plaintext);
    assert_eq!(settings.min_issue_interval.as_secs(), 30);
    assert_eq!(settings.upstream_timeout.as_secs(), 10);
    assert_eq!((settings.upstream_concurrency, settings.caller_rate), (8, 1_000));
    assert_eq!(settings.audit_sync, SyncMode::Fsync);
    assert_eq!(settings.journal_max_bytes, 8 << 30);
    let (default, longest) = (settings.deadline_default, settings.deadline_max);
    assert_eq!((default.as_secs(), longest.as_secs(), settings.drain.as_secs()), (5, 60, 20));
    assert_eq!(settings.max_authorization_staleness, Duration::from_hours(24));
}

#[test]
fn every_bad_setting_gets_its_one_line() {
    let range = "must be a number from";
    for (name, value, fault) in [
        ("DATABASE_URL", "mysql://canary@localhost/x", "another server than Postgres"),
        ("DATABASE_URL", "", "is empty"),
        ("DATABASE_URL_FILE", "/secrets/url", "set together with"),
        ("TOKEN_BROKER_LISTEN", "canary", "not an address and port"),
        ("TOKEN_BROKER_LISTEN", "localhost:50051", "not an address and port"),
        ("TOKEN_BROKER_LISTEN", "0.0.0.0:50051", "beyond loopback without TLS"),
        ("TOKEN_BROKER_LISTEN", "[::]:50051", "beyond loopback without TLS"),
        ("TOKEN_BROKER_LISTEN", "[::ffff:10.0.0.1]:50051", "beyond loopback without TLS"),
        ("TOKEN_BROKER_LISTEN", "127.1:50051", "not an address and port"),
        ("TOKEN_BROKER_LISTEN", "LOCALHOST:50051", "not an address and port"),
        ("TOKEN_BROKER_LISTEN", "", "is empty"),
        ("TOKEN_BROKER_OPS_LISTEN", "9464", "not an address and port"),
        ("TOKEN_BROKER_OPS_LISTEN", "127.0.0.1:50051", "the same address"),
        ("TOKEN_BROKER_UPSTREAM", "https://canary.example.com", "loopback"),
        ("TOKEN_BROKER_UPSTREAM", "Production", "must be `production`"),
        ("TOKEN_BROKER_UPSTREAM_BIND_ADDRESS", "eth0", "not an IP address"),
        ("TOKEN_BROKER_UPSTREAM_PROXY", "socks5://canary", "not an http://"),
        ("TOKEN_BROKER_UPSTREAM_PROXY_FILE", "/secrets/bad", "not an http://"),
        ("TOKEN_BROKER_UPSTREAM_PROXY_FILE", "/nowhere", "cannot read the file"),
        ("TOKEN_BROKER_EXPECTED_EGRESS", "192.0.2.0/40", "not a list of addresses"),
        ("TOKEN_BROKER_NEW_TOKEN_ENDS_OLDER", "yes", "must be true or false"),
        ("TOKEN_BROKER_REFRESH_AT", "0.95", range),
        ("TOKEN_BROKER_REFRESH_AT", "NaN", range),
        ("TOKEN_BROKER_MIN_ISSUE_INTERVAL", "30", "not a duration with its unit"),
        ("TOKEN_BROKER_MIN_ISSUE_INTERVAL", "0s", "must be 100ms to 1day"),
        ("TOKEN_BROKER_UPSTREAM_TIMEOUT", "2m", "must be 100ms to 1m"),
        ("TOKEN_BROKER_UPSTREAM_RATE", "0", range),
        ("TOKEN_BROKER_UPSTREAM_CONCURRENCY", "-1", range),
        ("TOKEN_BROKER_AUDIT_SYNC", "none", "must be fsync or write"),
        ("TOKEN_BROKER_AUDIT_RETENTION", "23h", "must be 1day to"),
        ("TOKEN_BROKER_AUDIT_RETENTION", "400", "or never"),
        ("TOKEN_BROKER_CHANGE_RETENTION", "400d", "shorter than the retention of call records"),
        ("TOKEN_BROKER_JOURNAL_MAX_BYTES", "8GB", "must be a size"),
        ("TOKEN_BROKER_CALLER_RATE", "1.5", range),
        ("TOKEN_BROKER_DEADLINE_DEFAULT", "90s", "longer than the longest deadline"),
        ("TOKEN_BROKER_DEADLINE_MAX", "soon", "not a duration"),
        ("TOKEN_BROKER_DRAIN", "-1s", "not a duration"),
        ("TOKEN_BROKER_MAX_AUTHORIZATION_STALENESS", "0s", "must be 1s to"),
        ("TOKEN_BROKER_PLAINTEXT", "1", "must be true or false"),
        ("TOKEN_BROKER_LOG_FORMAT", "xml", "must be pretty or json"),
        ("TOKEN_BROKER_TLS_CERT", "/cert.pem", "set without its key"),
        ("TOKEN_BROKER_TLS_KEY", "/key.pem", "set without its certificate"),
        ("TOKEN_BROKER_TLS_CLIENT_CA", "/ca.pem", "set without TOKEN_BROKER_TLS_CERT"),
        ("TOKEN_BROKER_TLS_CLIENT_CRL", "/crl.pem", "set without TOKEN_BROKER_TLS_CLIENT_CA"),
        ("TOKEN_BROKER_PROXY_PROTOCOL_FROM", "balancer", "not a list of addresses"),
        ("TOKEN_BROKER_PROXY_PROTOCOL_FROM", "0.0.0.0/0", "not all addresses"),
        ("TOKEN_BROKER_TRUST_DOMAIN", "example.com", "set without TOKEN_BROKER_TLS_CLIENT_CA"),
        ("TOKEN_BROKER_TRUST_DOMAIN", "spiffe://example.com", "must be a trust domain"),
    ] {
        let lines = lines(&valid_sources(&[(name, value)]));
        let [line] = lines.as_slice() else { panic!("{name}={value}: {lines:?}") };
        let named = line.starts_with(&format!("{name} (environment): "))
            || name == "DATABASE_URL_FILE" && line.contains(name);
        assert!(named && line.contains(fault), "{name}={value}: {line}");
        assert!(!line.contains(CANARY), "{line}");
    }
}

/// What people give instead of a path, each with the canary.
const CONTENTS: [&str; 7] = [
    "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY----- canary -----END PRIVATE KEY-----",
    "[[key]]\nid = \"k1\"\nkey = \"canary\"",
    "tls_key = \"canary\"\n",
    "postgresql://u:canary@h/d",
    "{\"secret\": \"canary\"}",
    "canary\t1",
];

/// The settings that are paths.
const PATHS: [&str; 16] = [
    "DATABASE_URL_FILE",
    "TOKEN_BROKER_BEARER_FILE",
    "TOKEN_BROKER_CA_FILE",
    "TOKEN_BROKER_CLIENT_CERT",
    "TOKEN_BROKER_CLIENT_KEY",
    "TOKEN_BROKER_KEYRING_FILE",
    "TOKEN_BROKER_KNOWN_KEYS_FILE",
    "TOKEN_BROKER_MIGRATE_DATABASE_URL_FILE",
    "TOKEN_BROKER_SIGNAL_PID_FILE",
    "TOKEN_BROKER_STATE_DIR",
    "TOKEN_BROKER_TLS_CERT",
    "TOKEN_BROKER_TLS_CLIENT_CA",
    "TOKEN_BROKER_TLS_CLIENT_CRL",
    "TOKEN_BROKER_TLS_KEY",
    "TOKEN_BROKER_TOKEN_DIR",
    "TOKEN_BROKER_UPSTREAM_PROXY_FILE",
];

#[test]
fn no_setting_that_is_a_path_takes_or_quotes_content() {
    /// Returns all that any command has to say about `sources`.
    fn faults(sources: &Sources) -> Vec<String> {
        let resolved = [
            Settings::resolve(sources).err(),
            AgentSettings::resolve(sources).err(),
            migrate_database_url(sources).err(),
            known_keys_file(sources).err(),
        ];
        resolved.into_iter().flatten().flat_map(|invalid| invalid.0).collect()
    }
    let names = table::all()
        .flat_map(|it| [Some(it.env()), it.secret.then(|| it.file_env())])
        .flatten()
        .collect::<BTreeSet<_>>();
    let given = |name: &str, value: &str| {
        let mut sources = valid_sources(&[(name, value)]);
        if name == "DATABASE_URL_FILE" {
            sources.env.remove("DATABASE_URL");
        }
        sources.read_file = |_| Err(io::ErrorKind::NotFound.into());
        faults(&sources).into_iter().filter(|line| line.starts_with(name)).collect::<Vec<_>>()
    };
    let long = "canary 123".repeat(1_000);
    for name in names.iter().map(String::as_str) {
        for content in CONTENTS.into_iter().chain([long.as_str()]) {
            let lines = given(name, content);
            assert!(!lines.concat().contains(CANARY), "{name}: {lines:?}");
            let refused = lines.iter().any(|line| line.contains("looks like the content"));
            assert!(refused || !PATHS.contains(&name), "{name}={content:?}: {lines:?}");
        }
    }
    assert!(PATHS.iter().all(|path| names.contains(*path)));
}

#[test]
fn all_faults_are_in_one_report() {
    let mut all = sources(&[
        ("TOKEN_BROKER_LISTEN", "here"),
        ("TOKEN_BROKER_DEADLINE_MAX", "soon"),
        // This contradicts the default of DEADLINE_MAX, which is used instead of the malformed value. The
        // contradiction must not be reported.
        ("TOKEN_BROKER_DEADLINE_DEFAULT", "90s"),
    ]);
    all.flags.insert("drain".into(), "long".into());
    let table = "lisen = \"127.0.0.1:1\"\nrefresh_at = 2\ncaller_rate = { a = 1 }".parse().unwrap();
    all.file = Some(("/etc/broker.toml".into(), table));
    let report = lines(&all);
    let starts: Vec<_> = report.iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(
        starts,
        [
            "\"lisen\" (/etc/broker.toml)",
            "DATABASE_URL",
            "TOKEN_BROKER_LISTEN (environment)",
            "TOKEN_BROKER_KEYRING_FILE",
            "TOKEN_BROKER_UPSTREAM",
            "refresh_at (/etc/broker.toml)",
            "caller_rate (/etc/broker.toml)",
            "TOKEN_BROKER_DEADLINE_MAX (environment)",
            "--drain (flag)",
        ]
    );
    let printed = InvalidSettings(report).to_string();
    assert!(printed.starts_with("9 settings are wrong\n  "), "{printed}");
}

#[test]
fn flags_take_precedence_over_the_environment_and_that_over_the_file() {
    let mut sources = valid_sources(&[("TOKEN_BROKER_DRAIN", "2s")]);
    let table = "drain = \"3s\"\nplaintext = true\nexpected_egress = [\"192.0.2.1\", \"::1\"]\n";
    sources.file = Some(("/f".into(), table.parse().unwrap()));
    let (settings, _) = Settings::resolve(&sources).unwrap();
    assert_eq!(settings.drain.as_secs(), 2);
    assert!(settings.plaintext);
    assert_eq!(settings.expected_egress.len(), 2);
    sources.flags.insert("drain".into(), "1s".into());
    assert_eq!(Settings::resolve(&sources).unwrap().0.drain.as_secs(), 1);
}

#[test]
fn a_secret_is_read_from_the_file_that_its_file_setting_names() {
    let mut sources = sources(&[("DATABASE_URL", "postgresql://broker@localhost/from_env")]);
    sources.flags.insert("database_url_file".into(), "/secrets/url".into());
    let url = database_url(&sources).unwrap();
    assert!(url.expose().ends_with("/from_file"));
}

#[test]
fn debug_output_contains_no_secret() {
    let proxy = ("TOKEN_BROKER_UPSTREAM_PROXY", "http://user:canary@127.0.0.1:3128");
    let (settings, _) = Settings::resolve(&valid_sources(&[proxy])).unwrap();
    let printed = format!("{settings:?} {settings:#?}");
    assert!(!printed.contains(CANARY), "{printed}");
}

#[test]
fn unknown_variables_with_the_prefix_cause_warnings_only() {
    let kubernetes = ("TOKEN_BROKER_PORT", "tcp://10.0.0.1:50051");
    let (_, warnings) = Settings::resolve(&valid_sources(&[kubernetes])).unwrap();
    assert_eq!(warnings, ["TOKEN_BROKER_PORT (environment): no such setting; ignored"]);
    for known in ["TOKEN_BROKER_CONFIG", "TOKEN_BROKER_BEARER_FILE", "TOKEN_BROKER_ENDPOINT"] {
        assert!(valid_sources(&[(known, "x")]).warnings().is_empty(), "{known}");
    }
}

#[test]
fn loopback_needs_no_tls_in_either_form_of_the_address() {
    for listen in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert_eq!(lines(&valid_sources(&[("TOKEN_BROKER_LISTEN", listen)])), [""; 0], "{listen}");
    }
}

#[test]
fn plaintext_allows_grpc_to_listen_beyond_loopback() {
    let beyond = [("TOKEN_BROKER_LISTEN", "0.0.0.0:1"), ("TOKEN_BROKER_PLAINTEXT", "true")];
    assert_eq!(lines(&valid_sources(&beyond)), [""; 0]);
    assert_eq!(lines(&valid_sources(&[("TOKEN_BROKER_OPS_LISTEN", "0.0.0.0:9464")])), [""; 0]);
}

#[test]
fn tls_allows_grpc_to_listen_beyond_loopback_and_excludes_plaintext() {
    let tls = [("TOKEN_BROKER_TLS_CERT", "/c"), ("TOKEN_BROKER_TLS_KEY", "/k")];
    let beyond = [&tls[..], &[("TOKEN_BROKER_LISTEN", "0.0.0.0:1")]].concat();
    assert_eq!(lines(&valid_sources(&beyond)), [""; 0]);
    let both = [&tls[..], &[("TOKEN_BROKER_PLAINTEXT", "true")]].concat();
    assert!(lines(&valid_sources(&both))[0].contains("set to true although TLS is configured"));
    let callers =
        [("TOKEN_BROKER_TLS_CLIENT_CA", "/a"), ("TOKEN_BROKER_TRUST_DOMAIN", "a.example")];
    assert_eq!(lines(&valid_sources(&[&tls[..], &callers[..]].concat())), [""; 0]);
}

#[test]
fn a_client_certificate_needs_its_key() {
    let report = ClientSettings::resolve(&sources(&[("TOKEN_BROKER_CLIENT_CERT", "/c")]));
    let line = report.unwrap_err().to_string();
    assert_eq!(line, "TOKEN_BROKER_CLIENT_CERT (environment): set without its key");
}

#[test]
fn settings_with_defaults_are_those_of_a_file_with_only_the_required_ones() {
    let (resolved, _) = Settings::resolve(&valid_sources(&[])).unwrap();
    let built = Settings::with_defaults(
        resolved.database_url.clone(),
        resolved.keyring_file.clone(),
        resolved.upstream.clone(),
        resolved.state_dir.clone(),
    );
    assert_eq!(format!("{built:?}"), format!("{resolved:?}"));
}

#[test]
fn an_upstream_without_the_path_of_its_api_causes_a_warning() {
    for (upstream, warns) in [
        ("production", false),
        ("http://127.0.0.1:8080/api/1.1", false),
        ("http://127.0.0.1:8080/api/1.1/", false),
        ("http://127.0.0.1:8080", true),
        ("http://127.0.0.1:8080/", true),
        ("http://127.0.0.1:8080/api", true),
        ("http://127.0.0.1:8080/api/1.1/token", true),
    ] {
        let sources = valid_sources(&[("TOKEN_BROKER_UPSTREAM", upstream)]);
        let (_, warnings) = Settings::resolve(&sources).unwrap();
        let found = warnings.iter().any(|line| line.contains("does not end in /api/1.1"));
        assert_eq!(found, warns, "{upstream}: {warnings:?}");
    }
}

#[test]
fn health_asks_readyz_where_it_cannot_speak_to_grpc() {
    let endpoint = |settings: &[(&str, &str)]| health_endpoint(&sources(settings)).unwrap();
    let (grpc, readyz) = (
        HealthEndpoint::Grpc("127.0.0.1:50051".parse().unwrap()),
        HealthEndpoint::Readyz("127.0.0.1:9464".parse().unwrap()),
    );
    let balancers = |from| ("TOKEN_BROKER_PROXY_PROTOCOL_FROM", from);
    let listen = |on| ("TOKEN_BROKER_LISTEN", on);
    assert_eq!(endpoint(&[]), grpc);
    assert_eq!(endpoint(&[balancers("10.0.0.0/8")]), grpc);
    assert_eq!(endpoint(&[balancers("127.0.0.0/8")]), readyz);
    assert_eq!(endpoint(&[balancers("10.0.0.1, 127.0.0.1")]), readyz);
    assert_eq!(endpoint(&[balancers("127.0.0.1"), listen("0.0.0.0:50051")]), readyz);
    assert_eq!(endpoint(&[balancers("10.0.0.0/8"), listen("10.0.0.7:1")]), readyz);
    assert_eq!(endpoint(&[balancers("::1"), listen("[::]:1")]), readyz);
    assert_eq!(endpoint(&[("TOKEN_BROKER_TLS_CERT", "/c")]), readyz);
    for (on, called) in
        [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1"), ("192.0.2.1:1", "192.0.2.1:1")]
    {
        assert_eq!(endpoint(&[listen(on)]), HealthEndpoint::Grpc(called.parse().unwrap()));
    }
}

#[test]
fn each_key_is_in_the_table_once() {
    let mut keys: Vec<_> = table::all().map(|setting| setting.key).collect();
    let count = keys.len();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), count);
}

proptest! {
    #[test]
    fn the_report_repeats_no_value(nth in 0_usize..64, tail in "[!-~]{0,8}") {
        let settings: Vec<_> = table::all().collect();
        let value = format!("{CANARY}{tail}");
        let report = lines(&valid_sources(&[(&settings[nth % settings.len()].env(), &value)]));
        prop_assert!(report.iter().all(|line| !line.contains(CANARY)), "{:?}", report);
    }
}
