//! "permission denied": Postgres says neither who was denied nor what would be needed, so the commands do.

use url::Url;

use crate::{
    harness::process::BrokerSetup,
    roles::{ACCESS, ACCOUNTS, AUDITOR, RUNTIME, database_with_roles},
};

#[tokio::test]
async fn a_command_without_its_privileges_names_the_login_and_the_role_that_it_lacks() {
    let database = database_with_roles().await;
    let admin = Url::parse(database.url()).unwrap();
    let login = admin.query_pairs().find(|(key, _)| key == "user").map(|(_, user)| user);
    let login = login.map_or_else(|| admin.username().to_owned(), Into::into);
    for (role, command, needed) in [
        (ACCOUNTS, &["caller", "list"][..], ACCESS),
        (ACCOUNTS, &["audit", "tail", "-n", "1"], AUDITOR),
        (ACCOUNTS, &["audit", "verify"], AUDITOR),
        (ACCESS, &["account", "list"], ACCOUNTS),
        (ACCESS, &["account", "disable", "acme"], ACCOUNTS),
        (ACCESS, &["check"], RUNTIME),
        (AUDITOR, &["caller", "disable", "shop"], ACCESS),
        (AUDITOR, &["audit", "retire", "i", "--reason", "x"], RUNTIME),
    ] {
        let mut url = admin.clone();
        url.query_pairs_mut().append_pair("options[role]", role);
        let setup = BrokerSetup::new(url.as_str(), "http://127.0.0.1:9/api/1.1").await;
        let ran = setup.run(command).await;
        let text = format!("{command:?} as {role}: {ran:?}");
        assert_ne!(ran.code, Some(0), "{text}");
        let output = ran.stdout + &ran.stderr;
        assert!(output.contains("permission denied for"), "{text}");
        let expected = format!("the login {login}, as the role {role}, lacks the role {needed}");
        assert!(output.contains(&expected), "{text}");
    }
    // With the role, what is missing is the script after a migration.
    database.sql(&format!("revoke select on callers from {ACCESS}")).await;
    let mut url = admin;
    url.query_pairs_mut().append_pair("options[role]", ACCESS);
    let setup = BrokerSetup::new(url.as_str(), "http://127.0.0.1:9/api/1.1").await;
    let output = setup.run(&["caller", "list"]).await.failed();
    assert!(output.contains("run deploy/roles.sql again"), "{output}");
}
