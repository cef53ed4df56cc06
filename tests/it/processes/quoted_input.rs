//! No printed error quotes the input that it is about, since that may be a secret: neither as text, nor as the values
//! of its bytes, nor in hexadecimal or base64.
//!
//! The tables below list each parser whose error could do so, with the forms of input that it refuses. Rows and
//! statements of Postgres, and bodies of the upstream, are searched for in `canaries.rs` and `database_errors.rs`.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::harness::{
    broker::Fixture,
    certificates::{BROKER_DNS_NAME, TestCa, write_revocation_lists, write_tls_files},
    eventually,
    process::{BrokerProcess, BrokerSetup, NO_DATABASE, run},
};

/// The secret. It consists of characters of base64, as the body of a key does.
const CANARY: &str = "CANARYcanary+Secret/zyxwvutsrqponmlkCanarySecret";

/// Returns every form in which a part of the canary could be printed.
fn forms() -> Vec<String> {
    let decoded = STANDARD.decode(CANARY).unwrap();
    let mut forms = Vec::new();
    for bytes in [CANARY.as_bytes(), &decoded] {
        for part in bytes.windows(6) {
            let joined = |separator: &str, form: fn(&u8) -> String| {
                part.iter().map(form).collect::<Vec<_>>().join(separator)
            };
            forms.extend([", ", ",", " "].map(|it| joined(it, ToString::to_string)));
            forms.extend(["", " ", ":"].map(|it| joined(it, |byte| format!("{byte:02x}"))));
            forms.extend(["", " ", ":"].map(|it| joined(it, |byte| format!("{byte:02X}"))));
        }
        forms.extend(bytes.windows(8).map(|part| String::from_utf8_lossy(part).into_owned()));
        // Each alignment of the bytes within base64.
        for skipped in 0..3 {
            let encoded = STANDARD.encode(&bytes[skipped..]);
            forms.extend(
                encoded.as_bytes().windows(12).map(|it| String::from_utf8_lossy(it).into()),
            );
        }
    }
    forms.retain(|form| !form.contains('\u{fffd}'));
    forms
}

/// Searches outputs for the canary.
struct Search(Vec<String>);

impl Search {
    fn new() -> Self {
        Self(forms())
    }

    #[track_caller]
    fn assert_absent(&self, what: &str, output: &str) {
        for form in &self.0 {
            assert!(!output.contains(form), "{what} quotes {form}: {output}");
        }
    }

    /// Runs a command that must fail, and searches what it prints.
    async fn failing(&self, what: &str, command: Command, input: &str) -> String {
        let ran = run(command, input).await;
        assert_ne!(ran.code, Some(0), "{what}: {ran:?}");
        let output = ran.stdout + &ran.stderr;
        self.assert_absent(what, &output);
        output
    }
}

/// Returns forms in which a PEM file is malformed, each with its name. `label` is that of its section.
fn malformed_pem(label: &str) -> Vec<(&'static str, Vec<u8>)> {
    let whole = format!("-----BEGIN {label}-----\n{CANARY}\n{CANARY}\n-----END {label}-----\n");
    let key = whole.replace(label, "PRIVATE KEY");
    let combined = format!("{whole}{key}");
    let utf16 = combined.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let texts = [
        ("lost its line breaks", combined.replace('\n', "")),
        ("lost its line breaks, key first", format!("{key}{whole}").replace('\n', "")),
        ("has spaces for line breaks", combined.replace('\n', " ")),
        ("has written-out line breaks", combined.replace('\n', "\\n")),
        ("has carriage returns alone", combined.replace('\n', "\r")),
        ("has no end", whole.split("-----END").next().unwrap().to_owned()),
        ("has no beginning", format!("{CANARY}\n-----END {label}-----\n")),
        (
            "ends as another section",
            whole.replace("END CERT", "END KEY").replace("END X509", "END KEY"),
        ),
        ("is not base64", whole.replace("canary", "can*ry")),
        ("is not DER", whole),
        ("is JSON", format!("{{\"key\": \"{CANARY}\"}}")),
        ("is the bare base64", CANARY.to_owned()),
        ("has quotation marks", format!("\"{}\"", combined.replace('\n', "\\n"))),
    ];
    let mut forms: Vec<_> = texts.into_iter().map(|(name, it)| (name, it.into_bytes())).collect();
    forms.push(("is UTF-16", utf16));
    forms
}

/// A directory with valid files, and settings without a database.
struct Bench {
    search: Search,
    setup: BrokerSetup,
    ca: TestCa,
}

impl Bench {
    async fn new() -> Self {
        let setup = BrokerSetup::new(NO_DATABASE, "http://127.0.0.1:9").await;
        Self { search: Search::new(), setup, ca: TestCa::new("callers") }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.directory().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn directory(&self) -> PathBuf {
        self.setup.directory.path().to_owned()
    }

    /// Serves TLS with valid files, whose names are returned by the settings that name them.
    fn set_tls(&mut self) -> [(&'static str, PathBuf, &'static str); 4] {
        let directory = self.directory();
        let broker = self.ca.issue(&[BROKER_DNS_NAME]);
        let mut files = write_tls_files(&directory, &broker, &[&self.ca]);
        let list = write_revocation_lists(&directory, &[self.ca.revocation_list(&[], 4096)]);
        files.client_crl = Some(list.clone());
        self.setup.set_tls(&files);
        [
            ("TLS_CERT", files.cert, "CERTIFICATE"),
            ("TLS_KEY", files.key, "PRIVATE KEY"),
            ("TLS_CLIENT_CA", files.client_ca.unwrap(), "CERTIFICATE"),
            ("TLS_CLIENT_CRL", list, "X509 CRL"),
        ]
    }
}

#[test]
fn the_search_finds_each_form() {
    let search = Search::new();
    let decoded = STANDARD.decode(CANARY).unwrap();
    let error = format!("{:?}", &CANARY.as_bytes()[3..20]);
    for output in [
        CANARY.to_owned(),
        error,
        format!("{decoded:?}"),
        hex::encode(CANARY),
        hex::encode_upper(&decoded),
        STANDARD.encode(CANARY),
        STANDARD.encode(&CANARY[1..]),
    ] {
        let found = search.0.iter().any(|form| output.contains(form));
        assert!(found, "{output}");
    }
    assert!(!search.0.iter().any(|form| NO_DATABASE.contains(form)));
}

/// Promise 38: no printed error quotes its input.
#[tokio::test]
async fn the_tls_files_are_not_quoted_by_check_nor_at_the_start() {
    let mut bench = Bench::new().await;
    for (setting, file, label) in bench.set_tls() {
        let valid = fs::read(&file).unwrap();
        for (form, content) in malformed_pem(label) {
            fs::write(&file, content).unwrap();
            let what = format!("{setting} that {form}");
            let command = bench.setup.command(&["check"]);
            let output = bench.search.failing(&what, command, "").await;
            assert!(output.contains(file.to_str().unwrap()), "{what}: {output}");
            if form == "lost its line breaks" {
                bench.search.failing(&what, bench.setup.command(&["serve"]), "").await;
            }
        }
        fs::write(&file, valid).unwrap();
    }
}

#[tokio::test]
async fn the_tls_files_are_not_quoted_at_a_reload() {
    let fixture = Fixture::new().await;
    let mut bench = Bench::new().await;
    bench.setup.set("DATABASE_URL", fixture.database.url());
    let files = bench.set_tls();
    let mut serve = bench.setup.serve().await;
    for (setting, file, label) in files {
        let valid = fs::read(&file).unwrap();
        for (form, content) in malformed_pem(label) {
            let told =
                |log: &str| log.matches("the TLS files have changed and cannot be used").count();
            let before = told(&serve.stderr());
            fs::write(&file, content).unwrap();
            serve.signal(Signal::SIGHUP);
            eventually(&format!("{setting} that {form}"), async || {
                serve.assert_running();
                (told(&serve.stderr()) > before).then_some(())
            })
            .await;
        }
        fs::write(&file, valid).unwrap();
    }
    bench.search.assert_absent("a reload", &serve.stderr());
}

#[tokio::test]
async fn the_files_of_callers_are_not_quoted() {
    let mut bench = Bench::new().await;
    let caller = bench.ca.issue(&["caller.test"]);
    let valid = [
        ("CA_FILE", "ca", bench.ca.pem(), "CERTIFICATE"),
        ("CLIENT_CERT", "cert", caller.cert, "CERTIFICATE"),
        ("CLIENT_KEY", "key", caller.key, "PRIVATE KEY"),
    ];
    for (setting, name, content, _) in &valid {
        let file = bench.file(name, content);
        bench.setup.set(&format!("TOKEN_BROKER_{setting}"), &file);
    }
    bench.setup.set("TOKEN_BROKER_ENDPOINT", "https://127.0.0.1:9");
    for (setting, name, content, label) in &valid {
        for (form, malformed) in malformed_pem(label) {
            bench.file(name, malformed);
            let command = bench.setup.command(&["token", "get", "acme"]);
            bench.search.failing(&format!("{setting} that {form}"), command, "").await;
        }
        bench.file(name, content);
    }
}

/// Says to each client that it serves TLS, and then closes the connection. Returns its port.
fn server_that_offers_tls() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 8];
            let _ = stream.read_exact(&mut request).and_then(|()| stream.write_all(b"S"));
            let _ = stream.read(&mut request);
        }
    });
    port
}

#[tokio::test]
async fn the_files_of_the_databases_url_are_not_quoted_nor_the_password() {
    let mut bench = Bench::new().await;
    let caller = bench.ca.issue(&["caller.test"]);
    let (cert, key) = (bench.file("cert", caller.cert), bench.file("key", caller.key));
    let port = server_that_offers_tls();
    let encoded = |text: &[u8]| {
        let bytes: Vec<_> = text.iter().map(|byte| format!("%{byte:02X}")).collect();
        bytes.concat()
    };
    for (form, malformed) in malformed_pem("CERTIFICATE") {
        let file = bench.file("malformed", &malformed);
        let inline = encoded(&malformed);
        for parameters in [
            format!("sslrootcert={file}"),
            format!("sslcert={file}&sslkey={key}"),
            format!("sslcert={cert}&sslkey={file}"),
            format!("sslrootcert={inline}"),
            format!("sslcert={inline}&sslkey={key}"),
            format!("sslcert={cert}&sslkey={inline}"),
        ] {
            let password = encoded(CANARY.as_bytes());
            let url = format!(
                "postgresql://u:{password}@127.0.0.1:{port}/db?sslmode=verify-full&{parameters}"
            );
            bench.setup.set("DATABASE_URL", &url);
            let what = format!("{} of a file that {form}", parameters.split('=').next().unwrap());
            bench.search.failing(&what, bench.setup.command(&["check"]), "").await;
        }
    }
}

/// Values of settings, each malformed or without effect.
const VALUES: &[(&str, &str)] = &[
    ("DATABASE_URL", "host=h password=CANARY dbname=db"),
    ("DATABASE_URL", "jdbc:postgresql://h/db?password=CANARY"),
    ("DATABASE_URL", "postgresql://u:CANARY@h1,h2/db"),
    ("DATABASE_URL", "postgresql://u:CANARY@/db"),
    ("DATABASE_URL", "postgresql://u:#CANARY@h/db"),
    ("DATABASE_URL", "postgresql://u:/CANARY@h/db"),
    ("DATABASE_URL", "postgresql://u:?CANARY@h/db"),
    ("DATABASE_URL", "postgresql://u:p@h/db?CANARY"),
    ("DATABASE_URL", "postgresql://u:p@h/db?sslmode=CANARY"),
    ("DATABASE_URL", "postgresql://u:p@h/db?port=CANARY"),
    ("DATABASE_URL", "postgresql://u:%FFCANARY@h/db"),
    ("DATABASE_URL", "postgresql://u:CANARY@[::g]/db"),
    ("DATABASE_URL", "mysql://u:CANARY@h/db"),
    ("DATABASE_URL", "\"postgresql://u:CANARY@h/db\""),
    ("DATABASE_URL", "CANARY"),
    ("DATABASE_URL", "postgresql://u:CANARY@127.0.0.1:9/db?connect_timeout=CANARY"),
    ("TOKEN_BROKER_UPSTREAM", "https://u:CANARY@h/"),
    ("TOKEN_BROKER_UPSTREAM", "CANARY"),
    ("TOKEN_BROKER_UPSTREAM", "http://127.0.0.1:9/CANARY"),
    ("TOKEN_BROKER_UPSTREAM_PROXY", "ftp://u:CANARY@h"),
    ("TOKEN_BROKER_UPSTREAM_PROXY", "http://u:CANARY@127.0.0.1:9"),
    ("TOKEN_BROKER_UPSTREAM_PROXY", "http://u:CANARY@[::g]"),
    ("TOKEN_BROKER_EXPECTED_EGRESS", "CANARY"),
    ("TOKEN_BROKER_LISTEN", "CANARY"),
    ("TOKEN_BROKER_DRAIN", "CANARY"),
    ("TOKEN_BROKER_JOURNAL_MAX_BYTES", "CANARY"),
    ("TOKEN_BROKER_TRUST_DOMAIN", "CANARY"),
    ("TOKEN_BROKER_LOG_FORMAT", "CANARY"),
    ("TOKEN_BROKER_PLAINTEXT", "CANARY"),
    ("TOKEN_BROKER_CANARY", "CANARY"),
];

#[tokio::test]
async fn values_of_settings_are_not_quoted() {
    for (setting, value) in VALUES {
        let mut bench = Bench::new().await;
        bench.setup.set(setting, &value.replace("CANARY", CANARY));
        bench.search.failing(value, bench.setup.command(&["check"]), "").await;
        if *setting == "DATABASE_URL" {
            let migrate = bench.setup.command(&["migrate"]);
            bench.search.failing(value, migrate, "").await;
            bench.setup.set_from_file("DATABASE_URL", &value.replace("CANARY", CANARY));
            bench.search.failing(value, bench.setup.command(&["check"]), "").await;
        }
    }
    for (setting, value) in [("BEARER", CANARY), ("BEARER", "tbk_CANARY"), ("INTAKE_KEY", CANARY)] {
        let mut bench = Bench::new().await;
        let value = value.replace("CANARY", CANARY);
        bench.setup.set(&format!("TOKEN_BROKER_{setting}"), &value);
        bench.search.failing(setting, bench.setup.command(&["token", "get", "acme"]), "").await;
        let add = bench.setup.command(&["account", "add", "acme", "--client-id", "id-1"]);
        bench.search.failing(setting, add, "SK.1\n").await;
    }
}

#[tokio::test]
async fn files_and_standard_input_are_not_quoted() {
    let mut bench = Bench::new().await;
    let keyring = fs::read_to_string(bench.directory().join("keyring")).unwrap();
    let key = keyring.lines().find_map(|line| line.strip_prefix("key = ")).unwrap().to_owned();
    let quoted = format!("\"{CANARY}\"");
    let in_key = |new: &str| keyring.replacen(&key, new, 1);
    let keyrings = [
        in_key(&quoted),
        in_key(CANARY),
        in_key(&format!("\"{CANARY}")),
        in_key(&format!("'{CANARY}")),
        in_key("7\nextra = ").replace("extra = ", &format!("extra = {quoted}")),
        keyring.replace("[[key]]", &format!("{CANARY}\n[[key]]")),
        keyring.replacen("id = \"", &format!("id = \"{CANARY}"), 1),
        keyring.replacen("kind = \"", &format!("kind = \"{CANARY}"), 1),
        keyring.replacen("created_at = ", &format!("created_at = {CANARY}"), 1),
        keyring.replace("version = 1", &format!("version = {quoted}")),
        format!("{{\"keys\": [{{\"key\": {quoted}}}]}}"),
        format!("-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----\n"),
        format!("{CANARY}\n"),
    ];
    let file = bench.directory().join("keyring-2");
    bench.setup.set("TOKEN_BROKER_KEYRING_FILE", file.to_str().unwrap());
    for content in keyrings {
        bench.file("keyring-2", "");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        bench.file("keyring-2", &content);
        for arguments in [&["check"][..], &["serve"], &["keys", "list"]] {
            bench.search.failing(&content, bench.setup.command(arguments), "").await;
        }
    }

    let bench = Bench::new().await;
    for content in [
        format!("database_url = {CANARY}"),
        format!("database_url = \"{CANARY}"),
        format!("database_url = '{CANARY}'"),
        format!("database_url = ['{CANARY}', 7]"),
        format!("[database]\nurl = '{CANARY}'"),
        format!("bearer = '{CANARY}'\nbearer = '{CANARY}'"),
        CANARY.to_owned(),
        format!("{{\"database_url\": \"{CANARY}\"}}"),
    ] {
        let config = bench.file("config.toml", &content);
        let command = bench.setup.command(&["check", "--config", &config]);
        bench.search.failing(&content, command, "").await;
    }

    let line = format!("{{\"chain\": \"{CANARY}\", \"seq\": \"{CANARY}\"}}\n{CANARY}\n");
    let pem =
        format!("# {CANARY}\n-----BEGIN PUBLIC KEY-----\n{CANARY}\n-----END PUBLIC KEY-----\n");
    for (content, arguments) in [
        (&line, &["audit", "verify", "--export", "FILE"][..]),
        (&line, &["audit", "verify", "--head", "FILE"]),
        (&format!("{{\"chain\": 7, \"x\": \"{CANARY}\"}}"), &["audit", "verify", "--head", "FILE"]),
        (&pem, &["audit", "verify", "--export", "FILE", "--keys", "FILE"]),
        (&pem.replace('\n', " "), &["audit", "verify", "--export", "FILE", "--keys", "FILE"]),
        (&line, &["simulate", "--accounts-file", "FILE"]),
        (&format!("[{{\"client_id\": \"{CANARY}\"}}]"), &["simulate", "--accounts-file", "FILE"]),
        (&CANARY.to_owned(), &["simulate", "--accounts-file", "FILE"]),
    ] {
        let file = bench.file("input", content);
        let arguments: Vec<_> =
            arguments.iter().map(|it| if *it == "FILE" { &*file } else { it }).collect();
        let what = arguments.join(" ");
        bench.search.failing(&what, bench.setup.command(&arguments), "").await;
        if arguments[1] == "verify" {
            let export = ["audit", "verify", "--export", "-"];
            bench.search.failing(&what, bench.setup.command(&export), content).await;
        }
    }

    let known_keys = bench.file("known", format!("{CANARY}\n"));
    let mut command = bench.setup.command(&["account", "add", "acme", "--client-id", "id-1"]);
    command.env("TOKEN_BROKER_KNOWN_KEYS_FILE", known_keys);
    bench.search.failing("known keys", command, &format!("{CANARY}\n")).await;
    let who = bench.setup.command(&["audit", "who"]);
    bench.search.failing("a token", who, &format!("{CANARY}.{CANARY}\n")).await;
}

/// Files of the state directory.
#[tokio::test]
async fn files_of_the_state_directory_are_not_quoted() {
    let fixture = Fixture::new().await;
    let json = format!("{{\"x\": \"{CANARY}\", \"seq\": \"{CANARY}\"");
    for (name, content) in [
        ("database", json.clone()),
        ("database", CANARY.to_owned()),
        ("instance", CANARY.to_owned()),
        ("issued-alone", format!("{CANARY}\n")),
        (
            "journal/c00000001-0123456789abcdef-00000000000000000001.jsonl",
            format!("{json}}}\n{json}}}\n"),
        ),
        (
            "journal/c00000001-0123456789abcdef-00000000000000000001.jsonl",
            format!("{{\"instance\": \"{CANARY}\", \"chain\": \"c\", \"seq\": 1}}\n").repeat(3),
        ),
    ] {
        let mut bench = Bench::new().await;
        bench.setup.set("DATABASE_URL", fixture.database.url());
        bench.setup.publish_key().await;
        let state = bench.directory().join("state");
        fs::create_dir_all(state.join("journal")).unwrap();
        fs::write(state.join(name), &content).unwrap();
        let mut serve = BrokerProcess::start(bench.setup.command(&["serve"]));
        // What does not keep the broker from starting is said in the log.
        eventually(name, async || {
            let said = serve.stderr().contains("ready") || serve.stderr().contains("error: ");
            said.then_some(())
        })
        .await;
        serve.signal(Signal::SIGTERM);
        serve.wait().await;
        bench.search.assert_absent(name, &serve.stderr());
        let journal = state.to_str().unwrap();
        for arguments in
            [&["audit", "verify", "--journal", journal][..], &["audit", "ship", journal]]
        {
            let ran = bench.setup.run(arguments).await;
            bench.search.assert_absent(name, &format!("{ran:?}"));
        }
    }
}

/// The password file of libpq, which the driver reads.
#[tokio::test]
async fn the_password_file_is_not_quoted_and_its_malformed_lines_are_named() {
    let bench = Bench::new().await;
    let file = bench.file("pgpass", format!("# comment\nhost:5432:db:{CANARY}\n{CANARY}\n"));
    fs::set_permissions(Path::new(&file), fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = bench.setup.command(&["serve"]);
    command.env("PGPASSFILE", &file).env("RUST_LOG", "trace");
    let mut serve = BrokerProcess::start(command);
    eventually("the database", async || {
        serve.assert_running();
        serve.stderr().contains("the database cannot be reached yet").then_some(())
    })
    .await;
    serve.signal(Signal::SIGTERM);
    serve.wait().await;
    let log = serve.stderr();
    bench.search.assert_absent("the log", &log);
    assert!(
        log.contains("a line of the password file is not host:port:database:user:password"),
        "{log}"
    );
}
