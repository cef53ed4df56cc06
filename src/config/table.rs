//! The table of all settings: the name, the meaning and the default of each one.
//!
//! Flags, environment variables, keys of the TOML file, help texts and defaults are all derived from
//! this table. A test compares it with the table in `docs/operations.md`.
#![expect(missing_docs, reason = "the help text of each setting says what it means")]

/// One setting. The key is its name in the TOML file; the names of its flag and of its environment
/// variable are derived from the key.
#[derive(Debug, Eq, PartialEq)]
pub struct Setting {
    /// The name in the TOML file: lower case, words joined by `_`.
    pub key: &'static str,
    /// The help text: what the setting means, with its unit.
    pub help: &'static str,
    /// What applies when no source has a value.
    pub when_unset: WhenUnset,
    /// Whether the value is a secret, or a URL that may contain a password. Such a setting has no
    /// flag for its value and is never printed, but its value may be read from a file.
    pub secret: bool,
}

/// What applies when no source has a value for a setting.
#[derive(Debug, Eq, PartialEq)]
pub enum WhenUnset {
    /// The setting is required: resolving fails.
    Required {
        /// A valid value. It stands in for the missing one while the other settings are checked.
        example: &'static str,
    },
    /// This value applies, written as in an environment variable.
    Default(&'static str),
    /// The value of this other setting applies.
    UseSetting(&'static Setting),
    /// The setting has no value.
    NoValue,
}

impl Setting {
    const fn new(key: &'static str, help: &'static str) -> Self {
        Self { key, help, when_unset: WhenUnset::NoValue, secret: false }
    }

    const fn required(self, example: &'static str) -> Self {
        Self { when_unset: WhenUnset::Required { example }, ..self }
    }

    const fn or_default(self, default: &'static str) -> Self {
        Self { when_unset: WhenUnset::Default(default), ..self }
    }

    const fn or_setting(self, other: &'static Setting) -> Self {
        Self { when_unset: WhenUnset::UseSetting(other), ..self }
    }

    const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    /// Returns the default, if the setting has one of its own.
    #[must_use]
    pub fn default(&self) -> Option<&'static str> {
        match self.when_unset {
            WhenUnset::Default(default) => Some(default),
            _ => None,
        }
    }

    /// Returns the name of the environment variable.
    #[must_use]
    pub fn env(&self) -> String {
        // Other tools read the database's URL from a variable of this name, without the prefix.
        if self.key == DATABASE_URL.key {
            return "DATABASE_URL".into();
        }
        format!("{ENV_PREFIX}{}", self.key.to_uppercase())
    }

    /// Returns the key, in the TOML file, that names the file which contains the value.
    #[must_use]
    pub fn file_key(&self) -> String {
        format!("{}_file", self.key)
    }

    /// Returns the name of the environment variable that names the file which contains the value.
    #[must_use]
    pub fn file_env(&self) -> String {
        format!("{}_FILE", self.env())
    }

    /// Returns the name of the flag without its dashes. The flag of a secret names the file which
    /// contains the value.
    #[must_use]
    pub fn flag(&self) -> String {
        let key = self.key.replace('_', "-");
        if self.secret { format!("{key}-file") } else { key }
    }
}

/// The prefix of the broker's environment variables.
pub const ENV_PREFIX: &str = "TOKEN_BROKER_";
/// The environment variable that names the TOML file. The flag `--config` takes precedence over it.
pub const CONFIG_ENV: &str = "TOKEN_BROKER_CONFIG";

pub const DATABASE_URL: Setting = Setting::new(
    "database_url",
    "The database's URL, postgresql://user@host/database; beyond loopback it is reached by verified \
     TLS unless sslmode says otherwise",
)
.required("postgresql://localhost/broker")
.secret();
pub const MIGRATE_DATABASE_URL: Setting = Setting::new(
    "migrate_database_url",
    "The database's URL for `migrate` and the commands of `keys` that need the owner, where another role than the \
     broker's owns the tables; without it, DATABASE_URL",
)
.or_setting(&DATABASE_URL)
.secret();
pub const LISTEN: Setting =
    Setting::new("listen", "Address and port of gRPC").or_default("127.0.0.1:50051");
pub const OPS_LISTEN: Setting =
    Setting::new("ops_listen", "Address and port of HTTP: /livez, /readyz, /metrics")
        .or_default("127.0.0.1:9464");
pub const STATE_DIR: Setting = Setting::new(
    "state_dir",
    "Directory of the audit journal and the instance's id; one process at a time may use it",
)
.or_default("/var/lib/token-broker");
pub const KEYRING_FILE: Setting = Setting::new(
    "keyring_file",
    "The keyring, as `keys generate` writes it; refused if others may read it",
)
.required("/etc/token-broker/keyring");
pub const UPSTREAM: Setting = Setting::new(
    "upstream",
    "`production`, `staging`, or the loopback URL of a simulator; any other host is refused",
)
.required("staging");
pub const UPSTREAM_BIND_ADDRESS: Setting =
    Setting::new("upstream_bind_address", "Local address to call the upstream from");
pub const UPSTREAM_PROXY: Setting = Setting::new(
    "upstream_proxy",
    "Forward proxy to the upstream, an http:// or https:// URL; HTTP(S)_PROXY are ignored",
)
.secret();
pub const EXPECTED_EGRESS: Setting = Setting::new(
    "expected_egress",
    "Addresses or CIDRs, joined by commas, with which each token's allowIp is compared",
);
pub const NEW_TOKEN_ENDS_OLDER: Setting =
    Setting::new("new_token_ends_older", "Whether a new token ends its account's older tokens")
        .or_default("true");
pub const REFRESH_AT: Setting =
    Setting::new("refresh_at", "Share of a token's life after which it is replaced, 0.1 to 0.9")
        .or_default("0.75");
pub const MIN_ISSUE_INTERVAL: Setting = Setting::new(
    "min_issue_interval",
    "Least time between two attempts to issue a token of one account",
)
.or_default("30s");
pub const UPSTREAM_TIMEOUT: Setting =
    Setting::new("upstream_timeout", "Time limit of one call to the upstream, 100ms to 60s")
        .or_default("10s");
pub const UPSTREAM_RATE: Setting =
    Setting::new("upstream_rate", "Calls to the upstream a second, of all replicas together")
        .or_default("20");
pub const UPSTREAM_CONCURRENCY: Setting = Setting::new(
    "upstream_concurrency",
    "Calls to the upstream at one time, of all replicas together",
)
.or_default("8");
pub const AUDIT_SYNC: Setting = Setting::new(
    "audit_sync",
    "Before an answer is sent, its record is on disk (`fsync`) or handed to the kernel (`write`)",
)
.or_default("fsync");
pub const AUDIT_RETENTION: Setting = Setting::new(
    "audit_retention",
    "How long audit records of calls are kept, such as `400d`; `never` means without limit",
)
.or_default("never");
pub const CHANGE_RETENTION: Setting = Setting::new(
    "change_retention",
    "How long audit records of changes to accounts, callers, grants and keys are kept",
)
.or_default("never");
pub const JOURNAL_MAX_BYTES: Setting =
    Setting::new("journal_max_bytes", "Largest size of the audit journal, at least 1MiB")
        .or_default("8GiB");
pub const CALLER_RATE: Setting =
    Setting::new("caller_rate", "Calls a second of each caller that has no limit of its own")
        .or_default("1000");
pub const DEADLINE_DEFAULT: Setting =
    Setting::new("deadline_default", "Deadline of a call that sets none").or_default("5s");
pub const DEADLINE_MAX: Setting =
    Setting::new("deadline_max", "Longest deadline of a call; a longer one is shortened to it")
        .or_default("60s");
pub const DRAIN: Setting =
    Setting::new("drain", "How long a stop waits for the calls in progress").or_default("20s");
pub const MAX_AUTHORIZATION_STALENESS: Setting = Setting::new(
    "max_authorization_staleness",
    "How long grants are trusted while the database does not answer",
)
.or_default("24h");
pub const PLAINTEXT: Setting =
    Setting::new("plaintext", "Allows gRPC to listen beyond loopback without TLS")
        .or_default("false");
pub const LOG_FORMAT: Setting = Setting::new(
    "log_format",
    "`pretty` or `json`; without it, pretty on a terminal and JSON elsewhere",
);
pub const TLS_CERT: Setting = Setting::new(
    "tls_cert",
    "The broker's certificate and its chain up to the CA, PEM; reloaded when it changes",
);
pub const TLS_KEY: Setting = Setting::new(
    "tls_key",
    "The private key of the broker's certificate, PEM; reloaded when it changes",
);
pub const TLS_CLIENT_CA: Setting = Setting::new(
    "tls_client_ca",
    "The CAs of callers' certificates, PEM; without it, only bearers identify callers",
);
pub const TLS_CLIENT_CRL: Setting = Setting::new(
    "tls_client_crl",
    "The lists of callers' certificates that their CAs have revoked, PEM; reloaded when it changes",
);
pub const TRUST_DOMAIN: Setting = Setting::new(
    "trust_domain",
    "The SPIFFE trust domain of callers, such as example.com; without it, no SPIFFE ID counts",
);
pub const PROXY_PROTOCOL_FROM: Setting = Setting::new(
    "proxy_protocol_from",
    "Addresses or CIDRs, joined by commas, of load balancers that send the PROXY protocol (1 or 2)",
);

pub const INTAKE_KEY: Setting = Setting::new(
    "intake_key",
    "The public key that secrets are sealed to, as `keys public` prints it; without it, the one in \
     the database, if it is the one that is remembered",
);
pub const KNOWN_KEYS_FILE: Setting = Setting::new(
    "known_keys_file",
    "The file that remembers the intake key of each database; without it, known-keys in \
     $XDG_CONFIG_HOME/token-broker or ~/.config/token-broker",
);
pub const ENDPOINT: Setting =
    Setting::new("endpoint", "The URLs of the brokers, http:// or https://, joined by commas")
        .or_default("http://127.0.0.1:50051");
pub const BEARER: Setting = Setting::new("bearer", "The caller's bearer, tbk_…").secret();
pub const CA_FILE: Setting = Setting::new(
    "ca_file",
    "The CA of the broker's certificate, PEM; without it, the system's CAs",
);
pub const CLIENT_CERT: Setting = Setting::new("client_cert", "The caller's certificate chain, PEM");
pub const CLIENT_KEY: Setting =
    Setting::new("client_key", "The private key of the caller's certificate, PEM");

pub const ACCOUNTS: Setting = Setting::new(
    "accounts",
    "The accounts whose tokens are kept in files: names or patterns such as acme-*, joined by commas",
)
.required("acme");
pub const TOKEN_DIR: Setting = Setting::new(
    "token_dir",
    "The directory for the files: for each account NAME.token and NAME.json",
)
.required("/run/token-broker-agent");
pub const TOKEN_MODE: Setting =
    Setting::new("token_mode", "The permissions of the files; others than the group get none")
        .or_default("0600");
pub const TOKEN_GROUP: Setting =
    Setting::new("token_group", "The group of the files, a name or a number");
pub const SIGNAL_PID_FILE: Setting = Setting::new(
    "signal_pid_file",
    "A file with the number of a process, which gets a signal after each replacement",
);
pub const SIGNAL: Setting =
    Setting::new("signal", "That signal: HUP, INT, TERM, USR1 or USR2").or_default("HUP");

/// The setting that every command which uses the database reads.
pub const DATABASE: &[&Setting] = &[&DATABASE_URL];

/// The settings of `serve` and `check`, in addition to [`DATABASE`].
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
    &TLS_CLIENT_CRL,
    &TRUST_DOMAIN,
    &PROXY_PROTOCOL_FROM,
];

/// The settings of `token get` and `agent`.
pub const CLIENT: &[&Setting] = &[&ENDPOINT, &BEARER, &CA_FILE, &CLIENT_CERT, &CLIENT_KEY];

/// The settings of `agent`, in addition to [`CLIENT`].
pub const AGENT: &[&Setting] =
    &[&ACCOUNTS, &TOKEN_DIR, &TOKEN_MODE, &TOKEN_GROUP, &SIGNAL_PID_FILE, &SIGNAL];

/// The settings of single admin commands, in addition to [`DATABASE`].
pub const ADMIN: &[&Setting] = &[&MIGRATE_DATABASE_URL, &INTAKE_KEY, &KNOWN_KEYS_FILE];

/// Returns every setting.
pub fn all() -> impl Iterator<Item = &'static Setting> {
    [DATABASE, BROKER, CLIENT, AGENT, ADMIN].into_iter().flatten().copied()
}
