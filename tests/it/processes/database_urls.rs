//! The forms of the database's URL: those that psql takes lead to the database, or are refused by a sentence that says how
//! to write them. The whole table is a unit test of `src/store/database_url.rs`.

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};
use url::Url;

use crate::harness::{
    database::TestDatabase,
    database_proxy::DatabaseProxy,
    note_skipped,
    process::{BrokerSetup, NO_DATABASE},
};

/// Forwards connections to a port of `::1` to `port` of 127.0.0.1. Returns the port; `None` if this machine has no
/// IPv6.
async fn forward_from_ipv6(port: u16) -> Option<u16> {
    let listener = TcpListener::bind("[::1]:0").await.ok()?;
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    Some(own)
}

/// Returns the URL of the database with its socket's directory as a percent-encoded host; `None` if it has none.
fn with_encoded_socket(url: &str) -> Option<String> {
    let url = Url::parse(url).unwrap();
    let parameter =
        |name: &str| Some(url.query_pairs().find(|(key, _)| key == name)?.1.into_owned());
    let directory = parameter("host").filter(|host| host.starts_with('/'))?;
    let (user, port) = (parameter("user")?, parameter("port")?);
    Some(format!("postgresql://{user}@{}:{port}{}", directory.replace('/', "%2F"), url.path()))
}

async fn assert_connects(url: &str) {
    let setup = BrokerSetup::new(url, "http://127.0.0.1:9").await;
    setup.publish_key().await;
    let output = setup.run(&["check"]).await;
    let is_database = |line: &&str| line.split_whitespace().nth(1) == Some("database");
    let found = output.stdout.lines().find(is_database);
    assert!(found.is_some_and(|line| line.starts_with("ok ")), "{url}: {output:?}");
    setup.run(&["migrate"]).await.ok();
}

#[tokio::test]
async fn an_ipv6_address_and_an_encoded_socket_lead_to_the_database() {
    let database = TestDatabase::new().await;
    let proxy = DatabaseProxy::start(database.url()).await;
    let port = Url::parse(proxy.url()).unwrap().port().unwrap();
    match forward_from_ipv6(port).await {
        Some(own) => {
            let (old, new) = (format!("127.0.0.1:{port}"), format!("[::1]:{own}"));
            assert_connects(&proxy.url().replace(&old, &new)).await;
        }
        None => note_skipped("this machine has no IPv6"),
    }
    match with_encoded_socket(database.url()) {
        Some(url) => assert_connects(&url).await,
        None => note_skipped("the database has no Unix socket"),
    }
}

#[tokio::test]
async fn other_forms_are_refused_wherever_a_url_is_given_by_a_sentence_that_says_how_to_write_it() {
    for (url, sentence) in [
        (
            "host=127.0.0.1 dbname=x user=u password=canary",
            "the form `host=… dbname=…` is not supported",
        ),
        (
            "jdbc:postgresql://h/db?user=u&password=canary",
            "a JDBC URL (jdbc:postgresql:…) is not supported: write postgresql://",
        ),
        (
            "postgresql://u:canary@h1:5432,h2:5432/db",
            "several hosts are not supported: name one address",
        ),
        ("postgresql+psycopg2://u:canary@h/db", "(postgresql+driver://…) is not supported"),
        ("ecto://u:canary@h/db", "the scheme ecto://, as of Elixir, is not supported: write"),
        (
            "Host=h;Database=x;Username=u;Password=canary",
            "(Host=…;Port=…;Database=…), is not supported: write postgresql://",
        ),
        ("postgresql://u:canary@::1/db", "an IPv6 address is written in brackets"),
        ("postgresql://u:canary@h/db?service=x", "the parameter service is not supported"),
        ("postgresql://u@h/db?passfile=/canary", "PGPASSFILE"),
        ("postgresql://u:canary@h/db?target_session_attrs=standby", "the broker needs the primary"),
    ] {
        let mut setup = BrokerSetup::new(NO_DATABASE, "http://127.0.0.1:9").await;
        let mut outputs = Vec::new();
        setup.set("TOKEN_BROKER_MIGRATE_DATABASE_URL", url);
        outputs.push(setup.run(&["migrate"]).await);
        setup.unset("TOKEN_BROKER_MIGRATE_DATABASE_URL");
        setup.set("DATABASE_URL", url);
        for command in ["check", "serve"] {
            outputs.push(setup.run(&[command]).await);
        }
        setup.set_from_file("DATABASE_URL", url);
        outputs.push(setup.run(&["account", "list"]).await);
        for output in outputs {
            assert_ne!(output.code, Some(0), "{url}: {output:?}");
            let text = output.stdout + &output.stderr;
            assert!(text.contains(sentence), "{url}: {text}");
            assert!(!text.contains("canary"), "{url}: {text}");
        }
    }
}
