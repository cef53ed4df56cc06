//! Runs the commands of `docs/tls.md` unchanged, and checks that the certificates work as documented.

use nix::sys::signal::Signal;

use crate::harness::{
    broker::Fixture,
    eventually,
    process::{BrokerSetup, sh},
};

const TLS: &str = include_str!("../../../docs/tls.md");

#[tokio::test]
async fn certificates_made_by_the_documented_commands_identify_a_caller_over_tls() {
    let fixture = Fixture::new().await;
    fixture.add_account("acme", "id-1", "SK.1").await;
    let mut setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    let directory = setup.directory.path().to_str().unwrap().to_owned();
    let recipe = TLS.split("\n```sh\n").nth(1).unwrap().split("\n```\n").next().unwrap();
    let made = sh(&format!("set -e; cd {directory}\n{recipe}")).await;
    assert_eq!(made.code, Some(0), "{made:?}");

    let port = setup.grpc.port();
    setup.set("TOKEN_BROKER_LISTEN", &format!("0.0.0.0:{port}"));
    let plain = setup.run(&["serve"]).await;
    assert_eq!(plain.code, Some(2), "{plain:?}");
    assert!(plain.stderr.contains("beyond loopback without TLS"), "{plain:?}");

    let file = |name: &str| format!("{directory}/{name}");
    for (name, value) in [
        ("TLS_CERT", file("broker.pem")),
        ("TLS_KEY", file("broker.key")),
        ("TLS_CLIENT_CA", file("callers-ca.pem")),
        ("TRUST_DOMAIN", "example.com".into()),
        ("ENDPOINT", format!("https://localhost:{port}")),
        ("CA_FILE", file("broker-ca.pem")),
        ("CLIENT_CERT", file("billing.pem")),
        ("CLIENT_KEY", file("billing.key")),
    ] {
        setup.set(&format!("TOKEN_BROKER_{name}"), &value);
    }
    let check = setup.run(&["check"]).await;
    assert!(check.stdout.contains("ok    serving     TLS; the certificate ends at "), "{check:?}");
    let mut serve = setup.serve().await;
    assert_eq!(setup.run(&["health"]).await.ok(), "serving");
    let added = ["caller", "add", "billing", "--spiffe-id", "spiffe://example.com/billing"];
    setup.run(&added).await.ok();
    setup.run(&["caller", "grant", "billing", "acme"]).await.ok();
    let token = eventually("a token", async || {
        let ran = setup.run(&["token", "get", "acme"]).await;
        (ran.code == Some(0)).then(|| ran.ok())
    })
    .await;
    assert!(token.starts_with("eyJ"), "{token}");
    serve.signal(Signal::SIGTERM);
    assert_eq!(serve.wait().await.code(), Some(0), "{}", serve.stderr());
    let served = "caller = 'billing' and caller_kind = 'spiffe' and outcome = 'ok'";
    assert_eq!(fixture.audit_events(served).await.len(), 1);
}
