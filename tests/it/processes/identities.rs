//! `caller identity`: the names in client certificates of a caller that exists.

use crate::harness::{
    database::TestDatabase,
    process::{BrokerSetup, CommandOutput},
};

struct Bench {
    database: TestDatabase,
    setup: BrokerSetup,
}

impl Bench {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let setup = BrokerSetup::new(database.url(), "http://127.0.0.1:9/api/1.1").await;
        let bench = Self { database, setup };
        bench.caller("add shop --bearer").await.ok();
        bench.caller("add bank").await.ok();
        bench
    }

    async fn caller(&self, arguments: &str) -> CommandOutput {
        let arguments: Vec<_> = ["caller"].into_iter().chain(arguments.split(' ')).collect();
        self.setup.run(&arguments).await
    }

    /// The identities that are in force, each with its caller.
    async fn in_force(&self) -> Vec<String> {
        sqlx::query_scalar(
            "select callers.name || ' ' || kind || ' ' || identity
             from caller_credentials c join callers on callers.id = caller_id
             where identity is not null and revoked_at is null order by 1",
        )
        .fetch_all(self.database.pool())
        .await
        .unwrap()
    }

    async fn id_of(&self, identity: &str) -> i64 {
        sqlx::query_scalar("select id from caller_credentials where identity = $1")
            .bind(identity)
            .fetch_one(self.database.pool())
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn names_in_certificates_are_added_and_revoked_and_both_are_recorded() {
    let bench = Bench::new().await;
    let added =
        "identity add shop --dns shop.test --spiffe-id spiffe://example.com/shop --reason T-1";
    bench.caller(added).await.ok();
    let both = ["shop dns shop.test", "shop spiffe spiffe://example.com/shop"];
    assert_eq!(bench.in_force().await, both);
    let shown = bench.caller("show shop").await.ok();
    let id = bench.id_of("shop.test").await;
    assert!(shown.lines().any(|it| it.starts_with(&id.to_string()) && it.contains("shop.test")));

    // All or none; a name belongs to one caller.
    for refused in [
        "identity add bank --dns bank.test --dns shop.test",
        "identity add shop --dns shop.test",
        "identity add nobody --dns nobody.test",
        "identity add bank --dns Bank.test",
        "identity add bank --spiffe-id https://example.com/bank",
        "identity revoke 999",
    ] {
        bench.caller(refused).await.failed();
        assert_eq!(bench.in_force().await, both, "{refused}");
    }

    let revoked = bench.caller(&format!("identity revoke {id} --reason T-2")).await;
    assert!(
        revoked.stderr.contains("shop.test do not identify caller shop any more"),
        "{revoked:?}"
    );
    assert_eq!(bench.in_force().await, both[1..]);
    bench.caller(&format!("identity revoke {id}")).await.failed();
    bench.caller("identity add bank --dns shop.test --reason T-3").await.ok();
    assert_eq!(bench.in_force().await, ["bank dns shop.test", both[1]]);

    let recorded: Vec<String> = sqlx::query_scalar(
        "select distinct reason from changes where table_name = 'caller_credentials' and reason <> '' order by 1",
    )
    .fetch_all(bench.database.pool())
    .await
    .unwrap();
    assert_eq!(recorded, ["T-1", "T-2", "T-3"]);
}

#[tokio::test]
async fn a_bearer_is_no_name_in_certificates() {
    let bench = Bench::new().await;
    let bearer: i64 = sqlx::query_scalar("select id from caller_credentials")
        .fetch_one(bench.database.pool())
        .await
        .unwrap();
    let refused = bench.caller(&format!("identity revoke {bearer}")).await.failed();
    assert!(refused.contains("there is no name in certificates"), "{refused}");
    bench.caller(&format!("bearer revoke {bearer}")).await.ok();
}
