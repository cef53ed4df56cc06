use std::fs;

use tempfile::TempDir;
use tower::service_fn;

use super::*;
use crate::{
    audit::journal::JournalSettings,
    crypto::bearer::Bearer,
    domain::{
        caller::{Caller, CallerId},
        clock::ManualClock,
        token::Token,
    },
    files::state_dir::StateDir,
    store::callers::{CallerCredential, CredentialKey},
};

/// A desk with one caller, and a journal in a directory of its own.
struct Office {
    desk: Arc<AuditLayer>,
    bearer: Bearer,
    manual: ManualClock,
    state_dir: StateDir,
    _home: TempDir,
}

impl Office {
    fn open() -> Self {
        let manual = ManualClock::new(Clock::System.now());
        let clock = Clock::Manual(manual.clone());
        let home = TempDir::new().unwrap();
        let state_dir = StateDir::open(home.path()).unwrap();
        let journal = Journal::open(&state_dir, JournalSettings::default(), clock.clone()).unwrap();
        let bearer = Bearer::generate();
        let directory = CallerDirectory::default();
        directory.replace(vec![CallerCredential {
            caller: Arc::new(Caller {
                id: CallerId(1),
                name: "demo".into(),
                enabled: true,
                rate_limit: None,
                grants: vec![],
            }),
            key: CredentialKey::BearerSha256(bearer.sha256()),
            ends_at: None,
            revoked: false,
        }]);
        let calls = TaskTracker::new();
        let desk = AuditLayer {
            folds: RefusalAggregator::new(journal.clone(), calls.clone()),
            journal,
            directory: Arc::new(directory),
            trust_domain: None,
            rates: CallerRates::default(),
            default_rate: 1_000,
            default_deadline: Duration::from_mins(1),
            longest_deadline: Duration::from_mins(1),
            clock,
            epoch: Instant::now(),
            metrics: Arc::new(Metrics::new("test")),
            calls,
            refused: Arc::new(KeyedSemaphore::new(1)),
        };
        Self { desk: Arc::new(desk), bearer, manual, state_dir, _home: home }
    }

    /// What becomes of a `GetToken` that `method` answers: the status, and the journal's text.
    async fn call<F>(
        &self,
        method: impl Fn(CallContext) -> F + Clone + Send + 'static,
    ) -> (Code, String)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = service_fn(move |request: Request<Body>| {
            let context = request.extensions().get::<CallContext>().unwrap().clone();
            let answered = method(context);
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
        let request = Request::builder()
            .uri("/token_broker.v1.TokenService/GetToken")
            .header("authorization", format!("Bearer {}", bearer.expose()))
            .body(body)
            .unwrap();
        let response = AuditService::new(inner, self.desk.clone()).call(request).await.unwrap();
        code_of(&response)
    }

    /// What the journal holds in the end.
    async fn journal(&self) -> String {
        self.desk.calls.close();
        self.desk.calls.wait().await;
        self.desk.journal.close().await;
        let segments = fs::read_dir(self.state_dir.journal_dir()).unwrap();
        segments
            .map(|segment| segment.unwrap().path())
            .filter(|path| path.extension().is_some_and(|it| it == "jsonl"))
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    }
}

#[tokio::test]
async fn a_token_that_ends_while_its_record_is_written_does_not_leave() {
    let office = Office::open();
    let mut token = Token::example(7, 1);
    token.expires_at = office.desk.clock.now() + chrono::TimeDelta::seconds(1);
    let manual = office.manual.clone();
    let (code, journal) = office
        .call(move |context| {
            context.draft.token(&token);
            // Time passes between the decision and the commit of the record.
            manual.advance(Duration::from_secs(1));
            async {}
        })
        .await;
    assert_eq!(code, Code::Unavailable);
    assert!(journal.contains("\"generation\":\"7\""), "{journal}");
}

#[tokio::test]
async fn a_live_token_leaves_once_its_record_is_durable() {
    let office = Office::open();
    let mut token = Token::example(7, 1);
    token.expires_at = office.desk.clock.now() + chrono::TimeDelta::seconds(1);
    let (code, journal) = office
        .call(move |context| {
            context.draft.token(&token);
            async {}
        })
        .await;
    assert_eq!(code, Code::Ok);
    assert!(journal.contains("\"outcome\":\"ok\""), "{journal}");
}

#[tokio::test]
async fn a_call_that_panics_is_recorded_as_internal() {
    let office = Office::open();
    let (code, journal) = office.call(|_| async { panic!("a fault that the test is about") }).await;
    assert_eq!(code, Code::Internal);
    assert!(journal.contains("\"outcome\":\"internal\""), "{journal}");
}

#[tokio::test]
async fn a_call_that_cannot_be_recorded_is_not_answered() {
    let office = Office::open();
    office.desk.journal.close().await;
    let (code, journal) = office.call(|_| async {}).await;
    assert_eq!(code, Code::Unavailable);
    assert!(!journal.contains("get_token"), "{journal}");
}

#[tokio::test]
async fn refusals_beyond_those_that_may_wait_are_answered_at_once_and_recorded_all_the_same() {
    let office = Office::open();
    let never = service_fn(|_| async { panic!("it is not admitted") });
    let stranger = Bearer::generate();
    let waits = office.desk.refused.take(None).unwrap();
    for _ in 0..25 {
        let code = office.send(never, &stranger, Body::empty()).await;
        assert_eq!(code, Code::Unauthenticated);
    }
    drop(waits);
    // Who has a place waits for the record of them all.
    let code = office.send(never, &stranger, Body::empty()).await;
    assert_eq!(code, Code::Unauthenticated);
    let journal = office.journal().await;
    let counts = journal.split("\"count\":").skip(1).map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u32>().unwrap()
    });
    assert_eq!(counts.sum::<u32>(), 26, "{journal}");
    assert!(journal.lines().count() < 26, "{journal}");
}
