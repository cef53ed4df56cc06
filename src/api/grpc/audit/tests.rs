use std::fs;

use tempfile::TempDir;
use tower::service_fn;

use super::*;
use crate::{
    audit::journal::JournalSettings,
    crypto::bearer::Bearer,
    domain::{
        account::CredentialVersion,
        caller::{Caller, CallerId, Grant, Right},
        clock::ManualClock,
        refresh_state::{Account, RefreshState},
        token::Token,
    },
    files::state_dir::StateDir,
    services::account_cache::{AccountCache, CachedAccount},
    store::callers::{CallerCredential, CredentialKey},
};

/// An audit layer with one caller, whose journal is in a temporary directory.
struct Harness {
    layer: Arc<AuditLayer>,
    bearer: Bearer,
    clock: ManualClock,
    state_dir: StateDir,
    _directory: TempDir,
}

impl Harness {
    fn new() -> Self {
        let manual = ManualClock::new(Clock::System.now());
        let clock = Clock::Manual(manual.clone());
        let directory = TempDir::new().unwrap();
        let state_dir = StateDir::open(directory.path()).unwrap();
        let journal = Journal::open(&state_dir, JournalSettings::default(), clock.clone()).unwrap();
        let bearer = Bearer::generate();
        let callers = CallerDirectory::default();
        callers.replace(vec![CallerCredential {
            caller: Arc::new(Caller {
                id: CallerId(1),
                name: "demo".into(),
                enabled: true,
                rate_limit: None,
                grants: vec![Grant {
                    pattern: "acme".parse().unwrap(),
                    rights: [Right::Get].into_iter().collect(),
                    ends_at: None,
                }],
            }),
            key: CredentialKey::BearerSha256(bearer.sha256()),
            ends_at: None,
            revoked: false,
        }]);
        let calls = TaskTracker::new();
        let layer = AuditLayer {
            refusals: RefusalAggregator::new(journal.clone(), calls.clone()),
            journal,
            callers: Arc::new(callers),
            trust_domain: None,
            rates: CallerRates::new(1_000).into(),
            default_deadline: Duration::from_mins(1),
            max_deadline: Duration::from_mins(1),
            database_clock: Arc::new(DatabaseClock::new(clock.clone())),
            clock,
            metrics: Arc::new(Metrics::new("test")),
            calls,
            refusal_waits: Arc::new(KeyedSemaphore::new(1)),
        };
        Self { layer: Arc::new(layer), bearer, clock: manual, state_dir, _directory: directory }
    }

    /// Makes a `GetToken` call whose RPC is `rpc`. Returns the status and the journal's text.
    async fn call<F>(
        &self,
        rpc: impl Fn(CallContext) -> F + Clone + Send + 'static,
    ) -> (Code, String)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = service_fn(move |request: Request<Body>| {
            let context = request.extensions().get::<CallContext>().unwrap().clone();
            let answered = rpc(context);
            async move {
                answered.await;
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        });
        let code = self.send(inner, &self.bearer, Body::empty()).await;
        (code, self.journal().await)
    }

    async fn send<S>(&self, inner: S, bearer: &Bearer, body: Body) -> Code
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + Clone
            + Send
            + 'static,
        S::Future: Send,
    {
        let request = request(bearer, body);
        let response = AuditService::new(inner, self.layer.clone()).call(request).await.unwrap();
        code_of(&response)
    }

    /// Closes the journal and returns its text.
    async fn journal(&self) -> String {
        self.layer.calls.close();
        self.layer.calls.wait().await;
        self.layer.journal.close().await;
        let segments = fs::read_dir(self.state_dir.journal_dir()).unwrap();
        segments
            .map(|segment| segment.unwrap().path())
            .filter(|path| path.extension().is_some_and(|it| it == "jsonl"))
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    }
}

/// Returns a request for `GetToken`.
fn request(bearer: &Bearer, body: Body) -> Request<Body> {
    Request::post("/token_broker.v1.TokenService/GetToken")
        .header("content-type", "application/grpc")
        .header("authorization", format!("Bearer {}", bearer.expose()))
        .body(body)
        .unwrap()
}

/// Returns the account `acme`.
fn account() -> Arc<CachedAccount> {
    AccountCache::default().put(Account::example(1, "acme"), RefreshState::default(), None)
}

#[tokio::test]
async fn a_token_that_expires_while_its_record_is_written_is_not_sent() {
    let harness = Harness::new();
    let mut token = Token::example(7, 1);
    token.expires_at = harness.layer.clock.now() + chrono::TimeDelta::seconds(1);
    let manual = harness.clock.clone();
    let (code, journal) = harness
        .call(move |context| {
            context.set_token(account(), &token);
            // The token expires between the RPC's answer and the commit of the record.
            manual.advance(Duration::from_secs(1));
            async {}
        })
        .await;
    assert_eq!(code, Code::Unavailable);
    assert!(journal.contains("\"generation\":\"7\""), "{journal}");
}

/// What happens between the RPC's answer and the commit of the record.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    CredentialRemoved,
    CredentialRevoked,
    CallerDisabled,
    GrantRemoved,
    GrantMoved,
    RightRemoved,
    GrantEnded,
    AccountRemoved,
    AccountReplaced,
    AccountDisabled,
    AccountMovedToAnotherLogin,
    AccountRenamed,
    RemovedWithoutGrant,
}

/// Promises that a token is sent only if credential, grant and account permit it when it is sent.
#[tokio::test]
async fn a_token_whose_caller_or_account_changes_while_its_record_is_written_is_not_sent() {
    use Meanwhile::*;
    for (meanwhile, expected) in [
        (CredentialRemoved, Code::Unauthenticated),
        (CredentialRevoked, Code::Unauthenticated),
        (CallerDisabled, Code::Unauthenticated),
        (GrantRemoved, Code::PermissionDenied),
        (GrantMoved, Code::PermissionDenied),
        (RightRemoved, Code::PermissionDenied),
        (GrantEnded, Code::PermissionDenied),
        (AccountRemoved, Code::NotFound),
        (AccountReplaced, Code::NotFound),
        (AccountDisabled, Code::FailedPrecondition),
        (AccountMovedToAnotherLogin, Code::Unavailable),
        (AccountRenamed, Code::PermissionDenied),
        // Whether the account exists is not told to a caller without a grant.
        (RemovedWithoutGrant, Code::PermissionDenied),
    ] {
        let harness = Harness::new();
        let mut token = Token::example(7, 1);
        token.expires_at = harness.layer.clock.now() + chrono::TimeDelta::seconds(1);
        let callers = harness.layer.callers.clone();
        let key = CredentialKey::BearerSha256(harness.bearer.sha256());
        let (code, journal) = harness
            .call(move |context| {
                let cache = AccountCache::default();
                let put = |account| cache.put(account, RefreshState::default(), None);
                let mut account = Account::example(1, "acme");
                let mut caller = (*context.caller).clone();
                let mut credentials = vec![false];
                context.set_token(put(account.clone()), &token);
                match meanwhile {
                    CredentialRemoved => credentials.clear(),
                    CredentialRevoked => credentials = vec![true],
                    CallerDisabled => caller.enabled = false,
                    GrantRemoved | RemovedWithoutGrant => caller.grants.clear(),
                    GrantMoved => caller.grants[0].pattern = "acme-*".parse().unwrap(),
                    RightRemoved => {
                        caller.grants[0].rights =
                            [Right::List, Right::Report].into_iter().collect();
                    }
                    GrantEnded => caller.grants[0].ends_at = Some(chrono::DateTime::UNIX_EPOCH),
                    AccountRemoved | AccountReplaced => {}
                    AccountDisabled => account.enabled = false,
                    AccountMovedToAnotherLogin => account.login_version = CredentialVersion(2),
                    AccountRenamed => account.name = "other".parse().unwrap(),
                }
                match meanwhile {
                    AccountRemoved | RemovedWithoutGrant => cache.remove(account.id),
                    AccountReplaced => {
                        cache.remove(account.id);
                        put(Account::example(2, "acme"));
                    }
                    _ => drop(put(account)),
                }
                let caller = Arc::new(caller);
                let credential = |revoked| {
                    let (caller, key) = (caller.clone(), key.clone());
                    CallerCredential { caller, key, ends_at: None, revoked }
                };
                callers.replace(credentials.into_iter().map(credential).collect());
                async {}
            })
            .await;
        assert_eq!(code, expected, "{meanwhile:?}");
        assert!(journal.contains("\"generation\":\"7\""), "{journal}");
    }
}

#[tokio::test]
async fn a_live_token_is_sent_once_its_record_is_durable() {
    let harness = Harness::new();
    let mut token = Token::example(7, 1);
    token.expires_at = harness.layer.clock.now() + chrono::TimeDelta::seconds(1);
    let (code, journal) = harness
        .call(move |context| {
            context.set_token(account(), &token);
            async {}
        })
        .await;
    assert_eq!(code, Code::Ok);
    assert!(journal.contains("\"outcome\":\"ok\""), "{journal}");
}

#[tokio::test]
async fn a_call_that_panics_is_recorded_as_internal() {
    let harness = Harness::new();
    let (code, journal) = harness.call(|_| async { panic!("the test's own panic") }).await;
    assert_eq!(code, Code::Internal);
    assert!(journal.contains("\"outcome\":\"internal\""), "{journal}");
}

#[tokio::test]
async fn a_call_that_cannot_be_recorded_is_not_answered() {
    let harness = Harness::new();
    harness.layer.journal.close().await;
    let (code, journal) = harness.call(|_| async {}).await;
    assert_eq!(code, Code::Unavailable);
    assert!(!journal.contains("get_token"), "{journal}");
}

/// A refusal after the RPC has answered, and one by the headers, are limited to the call's time like all others.
#[tokio::test]
async fn a_client_is_told_to_retry_only_in_its_time_wherever_the_call_is_refused() {
    for (timeout, retried) in [(None, true), (Some("30S"), true), (Some("900m"), false)] {
        let answer = service_fn(|_| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
        let call = async |harness: &Harness| {
            let mut request = request(&harness.bearer, Body::empty());
            if let Some(timeout) = timeout {
                request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
            }
            let layer = harness.layer.clone();
            let response = AuditService::new(answer, layer).call(request).await.unwrap();
            let pushback = response.headers().get("grpc-retry-pushback-ms").cloned();
            (code_of(&response), pushback.map(|it| it.to_str().unwrap().parse::<i64>().unwrap()))
        };
        let is_as_expected = |pushback: Option<i64>| match pushback {
            Some(-1) => !retried,
            Some(pause) => retried && pause > 0,
            None => false,
        };
        let unused = Harness::new();
        assert_eq!(call(&unused).await, (Code::Ok, None));

        // The caller has used what it may use in the next ten seconds.
        let caller = unused.layer.callers.authenticate(
            &CredentialKey::BearerSha256(unused.bearer.sha256()),
            chrono::DateTime::UNIX_EPOCH,
        );
        unused.layer.rates.charge(&caller.unwrap(), 10_000_000, Instant::now());
        let (code, pushback) = call(&unused).await;
        assert_eq!(code, Code::ResourceExhausted);
        assert!(is_as_expected(pushback), "{timeout:?} {pushback:?}");

        let unrecorded = Harness::new();
        unrecorded.layer.journal.close().await;
        let (code, pushback) = call(&unrecorded).await;
        assert_eq!(code, Code::Unavailable);
        assert!(is_as_expected(pushback), "{timeout:?} {pushback:?}");
    }
}

#[tokio::test]
async fn refusals_without_a_wait_permit_are_answered_at_once_and_still_recorded() {
    let harness = Harness::new();
    let unreachable = service_fn(|_| async { panic!("the call is not admitted") });
    let unknown = Bearer::generate();
    let only_permit = harness.layer.refusal_waits.try_acquire(None).unwrap();
    for _ in 0..25 {
        let code = harness.send(unreachable, &unknown, Body::empty()).await;
        assert_eq!(code, Code::Unauthenticated);
    }
    drop(only_permit);
    // With a permit, the call waits for the record that counts them all.
    let code = harness.send(unreachable, &unknown, Body::empty()).await;
    assert_eq!(code, Code::Unauthenticated);
    let journal = harness.journal().await;
    let counts = journal.split("\"count\":").skip(1).map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().unwrap()
    });
    assert_eq!(counts.sum::<u32>(), 26, "{journal}");
    assert!(journal.lines().count() < 26, "{journal}");
}
