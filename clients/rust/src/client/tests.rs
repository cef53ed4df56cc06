use tokio::time::sleep;
use tonic::Status;

use super::*;
use crate::{
    error::ErrorKind,
    proto::{GetTokenResponse, report_rejected_token_response::Outcome},
    testing::{FakeBroker, answer, until},
};

const MS: fn(u64) -> Duration = Duration::from_millis;
const SECOND: Duration = Duration::from_secs(1);

/// Returns an answer with a token that is reused for 10 s and ends after 20 s.
#[expect(clippy::unnecessary_wraps, reason = "the answers of a test are results")]
fn token(generation: u64) -> Result<GetTokenResponse, Status> {
    Ok(answer(generation, 10 * SECOND, 20 * SECOND))
}

fn away() -> Result<GetTokenResponse, Status> {
    Err(Status::unavailable("the upstream is away"))
}

/// Returns the generation of the token, or the kind of the error.
fn outcome(result: Result<Token, Error>) -> String {
    match result {
        Ok(token) => token.generation().to_string(),
        Err(error) => error.kind().name().into(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_is_kept_until_its_reuse_end_without_a_call() {
    let broker = FakeBroker::new([token(1), token(2)]);
    let client = broker.client();
    assert_eq!(outcome(client.token("acme").await), "1");
    sleep(9 * SECOND).await;
    assert_eq!(outcome(client.token("acme").await), "1");
    assert_eq!(broker.calls(), ["get acme"]);
    sleep(SECOND).await;
    assert_eq!(outcome(client.token("acme").await), "2");
    assert_eq!(broker.credentials()[0], "Bearer tbk_canary");
}

#[tokio::test(start_paused = true)]
async fn a_hundred_callers_share_one_call_and_one_that_gives_up_does_not_end_it() {
    let broker = FakeBroker::new([token(1)]);
    broker.delay(SECOND);
    let client = broker.client();
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.token("acme").await }
    });
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let client = client.clone();
        callers.spawn(async move { outcome(client.token("acme").await) });
    }
    sleep(MS(500)).await;
    first.abort();
    assert_eq!(outcome(client.token_within("acme", MS(100)).await), "DEADLINE_EXCEEDED");
    assert!(callers.join_all().await.iter().all(|outcome| outcome == "1"));
    assert_eq!(broker.calls(), ["get acme"]);
}

#[tokio::test(start_paused = true)]
async fn while_the_broker_is_away_the_kept_token_is_used_to_its_end() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    let start = Instant::now();
    client.token("acme").await.unwrap();
    broker.set_away(true);
    while start.elapsed() < 18 * SECOND {
        assert_eq!(outcome(client.token("acme").await), "1");
        sleep(MS(100)).await;
    }
    sleep(2 * SECOND).await;
    let error = client.token("acme").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    broker.set_away(false);
    broker.answer([token(2)]);
    assert_eq!(outcome(client.token("acme").await), "2");
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_takes_long_keeps_callers_for_two_seconds_at_most_and_only_once() {
    let broker = FakeBroker::new([token(1), token(2)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(10 * SECOND).await;
    broker.delay(4 * SECOND);
    let asked = Instant::now();
    assert_eq!(outcome(client.token("acme").await), "1");
    assert_eq!(asked.elapsed(), 2 * SECOND);
    assert_eq!(outcome(client.token("acme").await), "1");
    assert_eq!(asked.elapsed(), 2 * SECOND);
    sleep(3 * SECOND).await;
    assert_eq!(outcome(client.token("acme").await), "2");
    assert_eq!(broker.calls().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_a_token_temporary_errors_are_repeated_until_the_timeout() {
    let broker = FakeBroker::new([away(), away(), away(), token(1)]);
    let client = broker.client();
    assert_eq!(outcome(client.token("acme").await), "1");
    assert_eq!(broker.calls().len(), 4);

    let broker = FakeBroker::new([away()]);
    let client = broker.client();
    let asked = Instant::now();
    let error = client.token_within("acme", 3 * SECOND).await.unwrap_err();
    assert_eq!(error.to_string(), "acme: UNAVAILABLE: the upstream is away");
    assert!(asked.elapsed() > 2 * SECOND && asked.elapsed() <= 3 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn at_the_timeout_the_error_that_says_why_is_returned() {
    let broker = FakeBroker::new([away(), token(1)]);
    let client = broker.client();
    let caller = tokio::spawn(async move { client.token_within("acme", SECOND).await });
    sleep(MS(20)).await;
    broker.delay(60 * SECOND);
    assert_eq!(outcome(caller.await.unwrap()), "UNAVAILABLE");
}

#[tokio::test(start_paused = true)]
async fn a_caller_with_more_time_than_the_shared_call_causes_another() {
    let broker = FakeBroker::new([token(1)]);
    broker.delay(2 * SECOND);
    let client = broker.client();
    let short = tokio::spawn({
        let client = client.clone();
        async move { client.token_within("acme", SECOND).await }
    });
    sleep(MS(10)).await;
    assert_eq!(outcome(client.token_within("acme", 5 * SECOND).await), "1");
    assert_eq!(outcome(short.await.unwrap()), "DEADLINE_EXCEEDED");
    assert_eq!(broker.calls().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_ends_on_its_way_is_not_returned() {
    let broker = FakeBroker::new([Ok(answer(1, MS(1), MS(900))), token(2)]);
    assert_eq!(outcome(broker.client().token("acme").await), "2");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_remembered_for_a_second() {
    let broker = FakeBroker::new([Err(Status::permission_denied("no")), token(1)]);
    let client = broker.client();
    for _ in 0..5 {
        assert_eq!(outcome(client.token("acme").await), "NOT_GRANTED");
    }
    assert_eq!(broker.calls().len(), 1);
    sleep(SECOND).await;
    assert_eq!(outcome(client.token("acme").await), "1");
}

#[tokio::test(start_paused = true)]
async fn a_pushed_token_is_used_and_an_ended_account_is_forgotten() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(MS(200)).await;
    assert_eq!(broker.streams(), ["watch acme"]);

    broker.push("acme", token(2).unwrap()).await;
    assert_eq!(outcome(client.token("acme").await), "2");
    broker.push("acme", token(1).unwrap()).await;
    assert_eq!(outcome(client.token("acme").await), "2", "an older token does not count");

    broker.answer([Err(Status::permission_denied("no"))]);
    broker.end("acme").await;
    assert_eq!(outcome(client.token("acme").await), "NOT_GRANTED");
}

#[tokio::test(start_paused = true)]
async fn added_accounts_join_the_watch_together_and_not_more_often_than_every_5_s() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    for account in ["a", "b"] {
        client.token(account).await.unwrap();
    }
    sleep(MS(200)).await;
    client.token("c").await.unwrap();
    sleep(3 * SECOND).await;
    assert_eq!(broker.streams(), ["watch a b"]);
    sleep(2 * SECOND).await;
    assert_eq!(broker.streams(), ["watch a b", "watch a b c"]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_is_opened_again_and_the_tokens_stay_in_use() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(2 * SECOND).await;
    broker.push("acme", token(2).unwrap()).await;
    broker.end_stream(Status::unavailable("the broker stops")).await;
    until("a second stream", || broker.streams().len() == 2).await;
    assert_eq!(outcome(client.token("acme").await), "2");
    assert_eq!(broker.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_stream_makes_each_account_ask_for_itself() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(MS(200)).await;
    broker.end_stream(Status::not_found("one of them")).await;
    sleep(6 * SECOND).await;
    assert_eq!(broker.streams().len(), 1);
    broker.answer([token(2)]);
    assert_eq!(outcome(client.token("acme").await), "2");
    sleep(MS(200)).await;
    assert_eq!(broker.streams().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_is_no_longer_accepted_loses_its_tokens() {
    let broker = FakeBroker::new([token(1), Err(Status::unauthenticated("revoked"))]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(MS(200)).await;
    broker.end_stream(Status::unauthenticated("revoked")).await;
    assert_eq!(outcome(client.token("acme").await), "UNAUTHENTICATED");
    sleep(11 * SECOND).await;
    assert_eq!(broker.streams().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_refused_bearer_is_read_again_and_the_call_repeated_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bearer");
    std::fs::write(&file, "tbk_old").unwrap();
    let broker = FakeBroker::new([Err(Status::unauthenticated("revoked")), token(1)]);
    let client = broker.builder().bearer_file(&file).build().unwrap();
    std::fs::write(&file, "tbk_new").unwrap();
    assert_eq!(outcome(client.token("acme").await), "1");
    assert_eq!(broker.credentials()[..2], ["Bearer tbk_old", "Bearer tbk_new"]);

    broker.answer([Err(Status::unauthenticated("revoked"))]);
    assert_eq!(outcome(client.token("other").await), "UNAUTHENTICATED");
    assert_eq!(broker.calls(), ["get acme", "get acme", "get other"]);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_fails_costs_no_error_while_another_one_answers() {
    let (alive, dead) = (FakeBroker::new([token(1)]), FakeBroker::default());
    dead.set_away(true);
    let connects = [dead.connect(), alive.connect()];
    let connect: crate::connections::Connect = Arc::new(move |endpoint| {
        connects[usize::from(endpoint.uri().port_u16() == Some(2))](endpoint)
    });
    let client = TokenClient::builder()
        .endpoint("http://127.0.0.1:1")
        .endpoint("http://127.0.0.1:2")
        .connect(connect)
        .build()
        .unwrap();
    for account in ["a", "b", "c"] {
        assert_eq!(outcome(client.token_within(account, MS(50)).await), "1");
    }
}

#[tokio::test(start_paused = true)]
async fn closing_ends_what_waits_and_what_comes_later() {
    let broker = FakeBroker::new([token(1)]);
    broker.delay(60 * SECOND);
    let client = broker.client();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.token_within("acme", 60 * SECOND).await }
    });
    sleep(MS(10)).await;
    let start = Instant::now();
    client.close().await;
    client.close().await;
    assert!(start.elapsed() <= SECOND);
    assert_eq!(outcome(waiting.await.unwrap()), "CLOSED");
    assert_eq!(outcome(client.token("acme").await), "CLOSED");
}

#[tokio::test(start_paused = true)]
async fn the_last_clone_that_is_dropped_ends_the_tasks() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    let shared = Arc::downgrade(&client.shared);
    drop(client);
    until("no task keeps the client", || shared.strong_count() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn no_text_form_contains_a_token_or_a_bearer() {
    let broker = FakeBroker::new([token(1), Err(Status::unavailable("away"))]);
    let client = broker.client();
    let kept = client.token("acme").await.unwrap();
    let error = client.token_within("other", MS(10)).await.unwrap_err();
    let text = format!("{client:?} {client:#?} {kept:?} {error:?} {error}");
    assert!(!text.contains("canary"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn many_names_that_do_not_exist_do_not_fill_the_memory() {
    let broker = FakeBroker::new([Err(Status::not_found("no"))]);
    let client = broker.client();
    for i in 0..200 {
        let _ = client.token(&format!("a{i}")).await;
        sleep(SECOND).await;
    }
    assert!(client.shared.accounts.count() < 40);
}

#[tokio::test(start_paused = true)]
async fn a_slow_ask_returns_no_token_that_was_forgotten_or_replaced_meanwhile() {
    for (is_replaced, expected) in [(true, "2"), (false, "NOT_GRANTED")] {
        let broker = FakeBroker::new([token(1)]);
        let client = broker.client();
        client.token("acme").await.unwrap();
        sleep(10 * SECOND).await;
        broker.delay(4 * SECOND);
        broker.answer([Err(Status::permission_denied("no"))]);
        let caller = tokio::spawn(async move { outcome(client.token("acme").await) });
        sleep(MS(100)).await;
        if is_replaced {
            broker.push("acme", token(2).unwrap()).await;
            assert!(caller.is_finished(), "a push settles the ask");
        } else {
            broker.end("acme").await;
        }
        assert_eq!(caller.await.unwrap(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_replacement_that_fails_returns_no_token_of_an_account_that_ended_meanwhile() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(10 * SECOND).await;
    broker.delay(SECOND);
    broker.answer([away(), Err(Status::permission_denied("no"))]);
    let caller = tokio::spawn(async move { outcome(client.token("acme").await) });
    sleep(MS(100)).await;
    broker.end("acme").await;
    assert_eq!(caller.await.unwrap(), "NOT_GRANTED");
}

#[tokio::test(start_paused = true)]
async fn a_pushed_token_ends_the_wait_of_callers_that_have_none() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(19 * SECOND).await;
    broker.delay(60 * SECOND);
    let caller = tokio::spawn({
        let client = client.clone();
        async move { outcome(client.token("acme").await) }
    });
    let newer =
        tokio::spawn(async move { outcome(client.token_newer_than("acme", 2, 5 * SECOND).await) });
    sleep(MS(100)).await;
    broker.push("acme", token(2).unwrap()).await;
    assert!(caller.is_finished() && !newer.is_finished());
    assert_eq!(caller.await.unwrap(), "2");
    broker.push("acme", token(3).unwrap()).await;
    assert!(newer.is_finished());
    assert_eq!(newer.await.unwrap(), "3");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_not_newer_than_wanted_is_no_token() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    let refused = client.token_newer_than("acme", 1, SECOND).await;
    assert_eq!(outcome(refused), "INTERNAL");
}

#[tokio::test(start_paused = true)]
async fn an_unused_account_leaves_the_watch_and_is_asked_for_at_its_next_use() {
    let day = 24 * 60 * 60 * SECOND;
    let broker = FakeBroker::new([Ok(answer(1, day, day))]);
    let client = broker.client();
    for account in ["used", "unused"] {
        client.token(account).await.unwrap();
    }
    sleep(40 * 60 * SECOND).await;
    client.token("used").await.unwrap();
    sleep(40 * 60 * SECOND).await;
    broker.end_stream(Status::unavailable("the broker stops")).await;
    until("a second stream", || broker.streams().len() == 2).await;
    assert_eq!(broker.streams()[1], "watch used");
    for (account, calls) in [("used", 2), ("unused", 3)] {
        client.token(account).await.unwrap();
        assert_eq!(broker.calls().len(), calls, "{account}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_with_as_many_names_as_before_but_other_ones_is_an_addition() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("a").await.unwrap();
    sleep(6 * SECOND).await;
    broker.end("a").await;
    client.token("b").await.unwrap();
    sleep(SECOND).await;
    client.token("c").await.unwrap();
    sleep(3 * SECOND).await;
    assert_eq!(broker.streams(), ["watch a", "watch b"]);
    sleep(2 * SECOND).await;
    assert_eq!(broker.streams(), ["watch a", "watch b", "watch b c"]);
}

#[tokio::test(start_paused = true)]
async fn streams_that_deliver_and_end_at_once_are_opened_after_longer_and_longer_pauses() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(MS(200)).await;
    let start = Instant::now();
    for streams in 2..7 {
        broker.push("acme", token(1).unwrap()).await;
        broker.end_stream(Status::unavailable("the broker stops")).await;
        until("another stream", || broker.streams().len() == streams).await;
    }
    // Half of 100, 200, 400, 800 and 1600 ms.
    assert!(start.elapsed() >= MS(1_550), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_of_a_report_is_an_internal_error() {
    let broker = FakeBroker::new([token(1)]);
    broker.report_outcomes([(Outcome::Unspecified, Duration::ZERO)]);
    let error = broker.client().report("acme", 1, "61003").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
}

#[tokio::test(start_paused = true)]
async fn an_account_whose_stream_is_refused_again_and_again_is_watched_at_most_every_5_s() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(MS(200)).await;
    for streams in 2..5 {
        broker.end_stream(Status::not_found("one of them")).await;
        client.token("acme").await.unwrap();
        sleep(4 * SECOND).await;
        assert_eq!(broker.streams().len(), streams - 1);
        sleep(SECOND).await;
        assert_eq!(broker.streams().len(), streams);
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_has_a_thousand_accounts_and_further_ones_are_asked_for_at_their_reuse_ends() {
    let broker = FakeBroker::new([token(1)]);
    let client = broker.client();
    let name = |n: usize| format!("acme-{n}");
    for n in 0..=1_000 {
        client.token(&name(n)).await.unwrap();
    }
    // Streams for additions are opened once in 5 s.
    sleep(6 * SECOND).await;
    let streams = broker.streams();
    let watched: Vec<_> = streams.last().unwrap().split(' ').skip(1).collect();
    assert_eq!(watched.len(), 1_000);
    assert!(!watched.contains(&name(1_000).as_str()));

    let calls = broker.calls().len();
    assert_eq!(calls, 1_001);
    sleep(5 * SECOND).await;
    client.token(&name(1_000)).await.unwrap();
    assert_eq!(broker.calls()[calls..], ["get acme-1000"]);
}

#[tokio::test(start_paused = true)]
async fn an_opening_without_an_answer_is_given_up_after_twenty_seconds() {
    let broker = FakeBroker::new([token(1)]);
    broker.leave_streams_unanswered(true);
    let client = broker.client();
    client.token("acme").await.unwrap();
    sleep(19 * SECOND).await;
    assert_eq!(broker.streams(), ["watch acme"]);

    broker.leave_streams_unanswered(false);
    sleep(2 * SECOND).await;
    assert_eq!(broker.streams(), ["watch acme", "watch acme"]);
    broker.push("acme", answer(2, 10 * SECOND, 20 * SECOND)).await;
    let calls = broker.calls();
    assert_eq!(outcome(client.token("acme").await), "2");
    assert_eq!(broker.calls(), calls, "the pushed token is used");
}
