//! Files as the tools of Windows write them, and arguments with characters that nobody sees: they are read, or refused
//! by name.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::Stdio,
};

use crate::harness::{
    database::TestDatabase,
    process::{BrokerSetup, CommandOutput, program, run},
};

const SECRET: &str = "SK.canary-73";

fn utf16(text: &str, unit: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(unit).collect()
}

/// A name, the encoding of a text, and how it is refused, or `None` if it is read.
type Encoding = (&'static str, fn(&str) -> Vec<u8>, Option<&'static str>);

const ENCODINGS: [Encoding; 8] = [
    ("UTF-8", |text| text.as_bytes().to_vec(), None),
    ("UTF-8 with a mark", |text| format!("\u{feff}{text}").into_bytes(), None),
    (
        "CRLF with a mark",
        |text| format!("\u{feff}{}", text.replace('\n', "\r\n")).into_bytes(),
        None,
    ),
    (
        "UTF-16 LE",
        |text| utf16(&format!("\u{feff}{}", text.replace('\n', "\r\n")), u16::to_le_bytes),
        None,
    ),
    ("UTF-16 BE", |text| utf16(&format!("\u{feff}{text}"), u16::to_be_bytes), None),
    (
        "UTF-16 without a mark",
        |text| utf16(text, u16::to_le_bytes),
        Some("UTF-16 without a byte order mark"),
    ),
    ("half of a character", half_of_a_character, Some("malformed UTF-16")),
    (
        "UTF-32",
        |text| format!("\u{feff}{text}").chars().flat_map(|c| u32::from(c).to_le_bytes()).collect(),
        Some("UTF-32"),
    ),
];

fn half_of_a_character(text: &str) -> Vec<u8> {
    let mut bytes = utf16(&format!("\u{feff}{text}"), u16::to_le_bytes);
    bytes.pop();
    bytes
}

/// Asserts that the command did its work, or was refused as `refused` says, and did not show the secret.
fn assert_read_or_refused(case: &str, output: CommandOutput, refused: Option<&str>) {
    let shown = format!("{output:?}");
    assert!(!shown.contains("canary"), "{case}: {shown}");
    match refused {
        None => drop(output.ok()),
        Some(says) => {
            assert_ne!(output.code, Some(0), "{case}: {shown}");
            assert!(output.stderr.contains(says), "{case}: {shown}");
        }
    }
}

/// Each place at which the command line reads a file or standard input.
#[tokio::test]
async fn files_of_windows_tools_are_read_or_refused_by_name() {
    let database = TestDatabase::new().await;
    let setup = BrokerSetup::new(database.url(), "http://127.0.0.1:9/api/1.1").await;
    setup.publish_key().await;
    let keyring = fs::read_to_string(setup.directory.path().join("keyring")).unwrap();
    let seal = ["account", "seal", "acme", "--client-id", "acmeId"];
    for (encoding, encode, refused) in ENCODINGS {
        let write = |name: &str, text: &str| -> (PathBuf, String) {
            let path = setup.directory.path().join(name);
            fs::write(&path, encode(text)).unwrap();
            // A keyring that others can read is refused.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            (path.clone(), path.to_str().unwrap().to_owned())
        };
        let (secret, secret_path) = write("secret", &format!("{SECRET}\n"));
        let from_file = [&seal[..], &["--secret-file", &secret_path]].concat();
        assert_read_or_refused(encoding, setup.run(&from_file).await, refused);

        let mut command = setup.command(&seal);
        command.stdin(File::open(&secret).unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().await.unwrap();
        let (stdout, stderr) =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).into();
        assert_eq!(output.status.success(), refused.is_none(), "{encoding}: {stderr}");
        assert!(!stdout.contains("canary") && !stderr.contains("canary"), "{encoding}");
        assert!(stderr.contains(refused.unwrap_or_default()), "{encoding}: {stderr}");

        let (_, path) = write("keyring-copy", &keyring);
        let public = setup.run(&["keys", "public", "--keyring-file", &path]).await;
        assert_read_or_refused(encoding, public, refused);

        let (_, path) = write(
            "settings.toml",
            &format!("keyring_file = '{}/keyring'\n", setup.directory.path().display()),
        );
        let output = run(program(&["--config", &path, "keys", "public"]), "").await;
        assert_read_or_refused(encoding, output, refused);

        let (_, path) = write("url", &format!("{}\n", database.url()));
        let mut listing = program(&["account", "list"]);
        listing.env("DATABASE_URL_FILE", &path);
        assert_read_or_refused(encoding, run(listing, "").await, refused);
    }
}

/// Names, client IDs, patterns, descriptions and settings with a character that nobody sees.
#[tokio::test]
async fn arguments_and_settings_with_a_pasted_character_are_refused_by_its_name() {
    let database = TestDatabase::new().await;
    let setup = BrokerSetup::new(database.url(), "http://127.0.0.1:9/api/1.1").await;
    setup.publish_key().await;
    let says = |position: usize| format!("character {position} is a zero width space (U+200B)");
    for (arguments, position) in [
        (&["account", "add", "acme\u{200b}", "--client-id", "id"][..], 5),
        (&["account", "add", "acme", "--client-id", "\u{200b}id"], 1),
        (&["account", "add", "acme", "--client-id", "id", "--description", "가\u{200b}"], 2),
        (&["account", "reissue", "acme\u{200b}*"], 5),
        (&["caller", "add", "shop\u{200b}"], 5),
        (&["caller", "add", "shop", "--dns", "a.example.com\u{200b}"], 14),
        (&["caller", "add", "shop", "--spiffe-id", "spiffe://a/b\u{200b}"], 13),
        (&["caller", "add", "shop", "--description", "\u{200b}"], 1),
        (&["caller", "grant", "shop", "acme\u{200b}*"], 5),
    ] {
        let error = setup.run_with_secret(arguments, SECRET).await;
        let error = format!("{error:?}");
        assert!(error.contains(&says(position)), "{arguments:?}: {error}");
    }
    let pasted = setup
        .run_with_secret(&["account", "add", "acme", "--client-id", "id"], "\u{200b}SK.canary-73")
        .await;
    let error = pasted.failed();
    assert!(error.contains(&says(1)) && !error.contains("canary"), "{error}");

    for (name, value, position) in [
        ("TOKEN_BROKER_LISTEN", "127.0.0.1:1\u{200b}", 12),
        ("TOKEN_BROKER_UPSTREAM", "staging\u{200b}", 8),
        ("TOKEN_BROKER_STATE_DIR", "/tmp/canary\u{200b}", 12),
        ("TOKEN_BROKER_DRAIN", "\u{200b}20s", 1),
        ("TOKEN_BROKER_EXPECTED_EGRESS", "192.0.2.1,\u{200b}192.0.2.2", 11),
        ("DATABASE_URL", "postgresql://canary:canary@127.0.0.1/db\u{200b}", 40),
    ] {
        let mut command = setup.command(&["serve"]);
        command.env(name, value);
        let output = run(command, "").await;
        assert_ne!(output.code, Some(0), "{name}");
        let error = output.stderr;
        assert!(error.contains(name) && error.contains(&says(position)), "{name}: {error}");
        assert!(!error.contains("canary"), "{name}: {error}");
    }
    let counts: i64 = sqlx::query_scalar(
        "select (select count(*) from accounts) + (select count(*) from callers)",
    )
    .fetch_one(database.pool())
    .await
    .unwrap();
    assert_eq!(counts, 0);
}
