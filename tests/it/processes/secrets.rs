//! Where secrets are written: files that only their owner can read, and no core files.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    process::Stdio,
};

use crate::harness::{
    broker::Fixture,
    eventually, note_skipped,
    process::{BrokerSetup, program, sh},
};

/// A user without rights.
const NOBODY: u32 = 65_534;

async fn setup() -> (Fixture, BrokerSetup) {
    let fixture = Fixture::new().await;
    let setup = BrokerSetup::new(fixture.database.url(), &fixture.upstream.base_url()).await;
    (fixture, setup)
}

#[tokio::test]
async fn a_bearer_is_written_to_a_new_file_that_only_its_owner_can_read() {
    let (fixture, setup) = setup().await;
    let file = |name: &str| setup.directory.path().join(name);
    let path = |name: &str| file(name).to_str().unwrap().to_owned();
    let credentials = async || -> i64 {
        sqlx::query_scalar("select count(*) from caller_credentials")
            .fetch_one(fixture.database.pool())
            .await
            .unwrap()
    };

    let ran = setup.run(&["caller", "add", "shop", "--bearer", "--out", &path("first")]).await;
    assert!(ran.stderr.contains("which only you can read"), "{ran:?}");
    assert_eq!(ran.ok(), "");
    let ran = setup.run(&["caller", "bearer", "add", "shop", "--out", &path("second")]).await;
    assert_eq!(ran.ok(), "");
    for name in ["first", "second"] {
        assert!(fs::read_to_string(file(name)).unwrap().starts_with("tbk_"));
        assert_eq!(fs::metadata(file(name)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(credentials().await, 2);

    // Nothing is overwritten or followed, and then nothing is registered either.
    let first = fs::read_to_string(file("first")).unwrap();
    symlink(file("nowhere"), file("link")).unwrap();
    for name in ["first", "link", "no/such/directory"] {
        let ran = setup.run(&["caller", "add", "more", "--bearer", "--out", &path(name)]).await;
        assert!(ran.failed().contains("nothing was registered"), "{name}");
        setup.run(&["caller", "bearer", "add", "shop", "--out", &path(name)]).await.failed();
    }
    assert_eq!(fs::read_to_string(file("first")).unwrap(), first);
    assert!(!file("nowhere").exists());
    assert_eq!(credentials().await, 2);
    setup.run(&["caller", "show", "more"]).await.failed();

    // What the database refuses leaves no file.
    setup.run(&["caller", "add", "shop", "--bearer", "--out", &path("refused")]).await.failed();
    setup.run(&["caller", "bearer", "add", "nobody", "--out", &path("refused")]).await.failed();
    assert!(!file("refused").exists());
}

#[tokio::test]
async fn a_secret_that_is_redirected_to_a_file_which_others_may_read_causes_a_warning() {
    let (_fixture, setup) = setup().await;
    let run = async |name: &str, mode: u32| {
        let file = fs::File::create(setup.directory.path().join(name)).unwrap();
        file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
        let mut command = setup.command(&["caller", "add", name, "--bearer"]);
        let child =
            command.stdin(Stdio::null()).stdout(file).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let warned = run("exposed", 0o644).await;
    assert!(warned.contains("others may read (mode 644)") && warned.contains("--out"), "{warned}");
    let silent = run("private", 0o600).await;
    assert!(!silent.contains("warning"), "{silent}");
}

/// A process of another user than root, so that the kernel's answer to "may it be dumped" can be told: it
/// gives the files of such a process to root.
#[tokio::test]
async fn the_program_leaves_no_core_file_and_other_processes_cannot_read_its_memory() {
    if !fs::exists("/proc/self/limits").unwrap() {
        note_skipped("this system has no /proc");
        return;
    }
    let is_root = sh("id -u").await.ok() == "0";
    let mut command = program(&["simulate", "--listen", "127.0.0.1:0"]);
    if is_root {
        command.uid(NOBODY);
    }
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            note_skipped(&format!("the program cannot be run by another user: {error}"));
            return;
        }
    };
    let proc = format!("/proc/{}", child.id().unwrap());
    eventually("no core file", async || {
        let limits = fs::read_to_string(format!("{proc}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        (core.split_ascii_whitespace().filter(|word| *word == "0").count() == 2).then_some(())
    })
    .await;
    eventually("memory that only root can read", async || {
        (fs::metadata(format!("{proc}/mem")).unwrap().uid() == 0).then_some(())
    })
    .await;
}
