//! The table of all settings: what each is called, what it means, and what holds without it.
#![expect(missing_docs, reason = "each setting says in its help what it means")]

/// One setting. Its key is its name in the file; flag and environment name follow from it.
#[derive(Debug, Eq, PartialEq)]
pub struct Setting {
    /// The name in the TOML file: lower case, words joined by `_`.
    pub key: &'static str,
    /// What it means, with its unit.
    pub help: &'static str,
    /// What holds when nothing is said.
    pub default: Option<&'static str>,
    /// A secret, or a URL that may hold a password: it has no flag for its value and is never shown,
    /// but may be read from a file.
    pub secret: bool,
}

impl Setting {
    const fn new(key: &'static str, help: &'static str) -> Self {
        Self { key, help, default: None, secret: false }
    }

    const fn or(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    /// The environment variable.
    #[must_use]
    pub fn env(&self) -> String {
        // Known under this name to every tool around Postgres.
        if self.key == DATABASE_URL.key {
            return "DATABASE_URL".into();
        }
        format!("{ENV_PREFIX}{}", self.key.to_uppercase())
    }

    /// The key, in the file, of the file that holds the value.
    #[must_use]
    pub fn file_key(&self) -> String {
        format!("{}_file", self.key)
    }

    /// The environment variable that names the file that holds the value.
    #[must_use]
    pub fn file_env(&self) -> String {
        format!("{}_FILE", self.env())
    }

    /// The flag, without its dashes: of a secret, the one that names the file that holds it.
    #[must_use]
    pub fn flag(&self) -> String {
        let key = self.key.replace('_', "-");
        if self.secret { format!("{key}-file") } else { key }
    }
}

/// What the names of the broker's environment variables begin with.
pub const ENV_PREFIX: &str = "TOKEN_BROKER_";
/// Names the settings' file.
pub const CONFIG_ENV: &str = "TOKEN_BROKER_CONFIG";

pub const DATABASE_URL: Setting = Setting::new(
    "database_url",
    "Postgres: postgresql://user@host/database; off loopback by verified TLS unless sslmode says \
     otherwise",
)
.secret();
pub const MIGRATE_DATABASE_URL: Setting = Setting::new(
    "migrate_database_url",
    "For `migrate`, where the owner of the tables is another role than the broker's",
)
.secret();
pub const LISTEN: Setting =
    Setting::new("listen", "Address and port of gRPC").or("127.0.0.1:50051");
pub const OPS_LISTEN: Setting =
    Setting::new("ops_listen", "Address and port of HTTP: /livez, /readyz, /metrics")
        .or("127.0.0.1:9464");
pub const STATE_DIR: Setting = Setting::new(
    "state_dir",
    "Directory of the audit journal and the instance's id; for one process at a time",
)
.or("/var/lib/token-broker");
pub const KEYRING_FILE: Setting = Setting::new(
    "keyring_file",
    "The keyring, as `keys generate` writes it; refused if others may read it",
);
pub const UPSTREAM: Setting = Setting::new(
    "upstream",
    "`production`, `staging`, or the loopback URL of a simulator; any other host is refused",
);
pub const UPSTREAM_BIND_ADDRESS: Setting =
    Setting::new("upstream_bind_address", "Local address to call the upstream from");
pub const UPSTREAM_PROXY: Setting = Setting::new(
    "upstream_proxy",
    "Forward proxy to the upstream, an http:// or https:// URL; HTTP(S)_PROXY are ignored",
)
.secret();
pub const EXPECTED_EGRESS: Setting = Setting::new(
    "expected_egress",
    "Addresses or CIDRs, joined by commas, that tokens' allowIp is compared with",
);
pub const NEW_TOKEN_ENDS_OLDER: Setting =
    Setting::new("new_token_ends_older", "Whether a new token ends an account's older ones")
        .or("true");
pub const REFRESH_AT: Setting =
    Setting::new("refresh_at", "Share of a token's life after which it is replaced, 0.1 to 0.9")
        .or("0.75");
pub const MIN_ISSUE_INTERVAL: Setting =
    Setting::new("min_issue_interval", "Least time between two issues of one account").or("30s");
pub const UPSTREAM_TIMEOUT: Setting =
    Setting::new("upstream_timeout", "Limit of one call of the upstream, 100ms to 60s").or("10s");
pub const UPSTREAM_RATE: Setting =
    Setting::new("upstream_rate", "Calls of the upstream a second, of all replicas together")
        .or("20");
pub const UPSTREAM_CONCURRENCY: Setting = Setting::new(
    "upstream_concurrency",
    "Calls of the upstream at one time, of all replicas together",
)
.or("8");
pub const AUDIT_SYNC: Setting = Setting::new(
    "audit_sync",
    "Before an answer leaves, its record is on disk (`fsync`) or with the kernel (`write`)",
)
.or("fsync");
pub const AUDIT_RETENTION: Setting = Setting::new(
    "audit_retention",
    "How long records of calls are kept: `400d`, or `never` to end",
)
.or("never");
pub const CHANGE_RETENTION: Setting = Setting::new(
    "change_retention",
    "How long records of changes to accounts, callers, grants and keys are kept",
)
.or("never");
pub const JOURNAL_MAX_BYTES: Setting =
    Setting::new("journal_max_bytes", "Size of the audit journal, at least 1MiB").or("8GiB");
pub const CALLER_RATE: Setting =
    Setting::new("caller_rate", "Calls a second of each caller without a limit of its own")
        .or("1000");
pub const DEADLINE_DEFAULT: Setting =
    Setting::new("deadline_default", "Limit of a call that brings no deadline").or("5s");
pub const DEADLINE_MAX: Setting =
    Setting::new("deadline_max", "The longest deadline that a call gets").or("60s");
pub const DRAIN: Setting =
    Setting::new("drain", "How long a stop waits for the calls under way").or("20s");
pub const MAX_AUTHORIZATION_STALENESS: Setting = Setting::new(
    "max_authorization_staleness",
    "How long grants are trusted while the database is away",
)
.or("24h");
pub const PLAINTEXT: Setting =
    Setting::new("plaintext", "Lets gRPC listen beyond loopback without TLS").or("false");
pub const LOG_FORMAT: Setting = Setting::new(
    "log_format",
    "`pretty` or `json`; without it, pretty on a terminal and JSON elsewhere",
);
pub const TLS_CERT: Setting = Setting::new(
    "tls_cert",
    "Our certificate and what links it to its CA, PEM; read anew when it changes",
);
pub const TLS_KEY: Setting = Setting::new("tls_key", "Its private key, PEM");
pub const TLS_CLIENT_CA: Setting = Setting::new(
    "tls_client_ca",
    "The CAs of callers' certificates, PEM; without it, bearers alone count",
);
pub const TRUST_DOMAIN: Setting =
    Setting::new("trust_domain", "The SPIFFE trust domain of callers, such as example.com");

pub const INTAKE_KEY: Setting = Setting::new(
    "intake_key",
    "The public key to seal a secret to, as `keys public` prints it; without it, the database's",
);
pub const ENDPOINT: Setting =
    Setting::new("endpoint", "The broker, http:// or https://").or("http://127.0.0.1:50051");
pub const BEARER: Setting = Setting::new("bearer", "The caller's bearer, tbk_…").secret();
pub const CA_FILE: Setting =
    Setting::new("ca_file", "The CA of the broker's certificate, PEM; else the system's");
pub const CLIENT_CERT: Setting = Setting::new("client_cert", "The caller's certificate chain, PEM");
pub const CLIENT_KEY: Setting = Setting::new("client_key", "Its private key, PEM");

pub const PROXY_PROTOCOL_FROM: Setting = Setting::new(
    "proxy_protocol_from",
    "Addresses or CIDRs, joined by commas, of balancers that speak the PROXY protocol (1 or 2)",
);
/// What every command that meets the database needs.
pub const DATABASE: &[&Setting] = &[&DATABASE_URL];

/// What `serve` runs by, beside [`DATABASE`].
pub const BROKER: &[&Setting] = &[
    &LISTEN,
    &OPS_LISTEN,
    &STATE_DIR,
    &KEYRING_FILE,
    &UPSTREAM,
    &UPSTREAM_BIND_ADDRESS,
    &UPSTREAM_PROXY,
    &EXPECTED_EGRESS,
    &NEW_TOKEN_ENDS_OLDER,
    &REFRESH_AT,
    &MIN_ISSUE_INTERVAL,
    &UPSTREAM_TIMEOUT,
    &UPSTREAM_RATE,
    &UPSTREAM_CONCURRENCY,
    &AUDIT_SYNC,
    &AUDIT_RETENTION,
    &CHANGE_RETENTION,
    &JOURNAL_MAX_BYTES,
    &CALLER_RATE,
    &DEADLINE_DEFAULT,
    &DEADLINE_MAX,
    &DRAIN,
    &MAX_AUTHORIZATION_STALENESS,
    &PLAINTEXT,
    &LOG_FORMAT,
    &TLS_CERT,
    &TLS_KEY,
    &TLS_CLIENT_CA,
    &TRUST_DOMAIN,
    &PROXY_PROTOCOL_FROM,
];

/// What `token get` calls a broker by.
pub const CLIENT: &[&Setting] = &[&ENDPOINT, &BEARER, &CA_FILE, &CLIENT_CERT, &CLIENT_KEY];

/// What single commands take beside.
pub const ADMIN: &[&Setting] = &[&MIGRATE_DATABASE_URL, &INTAKE_KEY];

/// Every setting there is.
pub fn all() -> impl Iterator<Item = &'static Setting> {
    [DATABASE, BROKER, CLIENT, ADMIN].into_iter().flatten().copied()
}
