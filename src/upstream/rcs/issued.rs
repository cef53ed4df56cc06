//! Reads an answer that should be a token: the token, its end and its claims.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, NaiveDateTime, TimeDelta};
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::{
    answer::{Answer, is_padding},
    number::whole_number,
};
pub use crate::domain::token::LONGEST_LIFE;
use crate::{
    domain::{
        clock::Timestamp, plausible_time::TOLERANCE, secret::AccessToken, token::IssuedToken,
    },
    upstream::issue_error::IssueError,
};

/// How far the times that one answer states may differ: `Date` and the claims count whole seconds.
const CLAIMS_TOLERANCE: TimeDelta = TimeDelta::seconds(2);
/// Korea time is nine hours ahead of UTC, without summer time.
const KOREA: TimeDelta = TimeDelta::hours(9);

/// Reads an answer with the header `Date`, to a request that was sent at `sent`. The answer was received at `now`.
/// UTC is `utc_ahead` ahead of these times.
pub(super) fn read(
    answer: &Answer,
    date: Option<Timestamp>,
    sent: Timestamp,
    now: Timestamp,
    utc_ahead: TimeDelta,
) -> Result<IssuedToken, IssueError> {
    if answer.is_ambiguous {
        return Err(IssueError::malformed("the upstream's answer has a field twice"));
    }
    let access_token = answer.access_token.as_deref().and_then(|it| read_text(it));
    let access_token = access_token
        .ok_or_else(|| IssueError::malformed("the upstream's answer has no accessToken"))?;
    let access_token = AccessToken::new(bare_token(&access_token)).map_err(|_| {
        IssueError::malformed("the upstream's accessToken is not 1 to 8192 visible characters")
    })?;
    let stated_end = answer.expires_in.as_deref().and_then(read_end).ok_or_else(|| {
        IssueError::malformed("the upstream's expiresIn is not a time in milliseconds since 1970")
    })?;

    let claims = Claims::of(&access_token);
    let lead = believed_lead(date, &claims, stated_end, sent, now, utc_ahead);
    if stated_end - now > LONGEST_LIFE + lead {
        return Err(IssueError::malformed("the upstream's token ends further ahead than 48 hours"));
    }
    let expires_at =
        end_by_our_clock(stated_end, &claims, lead, sent).filter(|end| *end > now).ok_or_else(
            || IssueError::malformed("the upstream's token has already ended by our clock"),
        )?;
    Ok(IssuedToken {
        access_token,
        expires_at,
        allowed_ip: claims.allowed_ip,
        skew_ms: date.map(|date| (date - now - utc_ahead).num_milliseconds()),
    })
}

/// Returns how far the upstream's clock is believed to be ahead of this machine's: zero if the clocks agree as far as
/// can be told, and else the longest lead that is possible, so that no token seems to live longer than it does. The
/// upstream wrote `Date`, which counts whole seconds, between `sent` and `now`; the answer may have travelled for long.
///
/// A lead is not believed if `Date` contradicts what the upstream's own clock wrote into the answer: if the new token
/// had already ended by `Date`, or if it was created, by claims that agree with `expiresIn`, between `sent` and `now`.
/// Then `Date` is a proxy's, and with its lead a new token would seem to have ended, or nearly so.
///
/// A lag is believed only if everything that the answer states agrees: `expiresIn` with the claims' end, and
/// `Date` with the claims' life; or if this process's clock is known to be wrong (`utc_ahead`), and `Date` agrees with
/// UTC. Then it is this process's clock that is ahead, and without the lag each new token would seem to have ended.
/// Otherwise `Date` may be a proxy's, and an early end is safe.
fn believed_lead(
    date: Option<Timestamp>,
    claims: &Claims,
    stated_end: Timestamp,
    sent: Timestamp,
    now: Timestamp,
    utc_ahead: TimeDelta,
) -> TimeDelta {
    let Some(date) = date else { return TimeDelta::zero() };
    let (least, most) = (date - now, date + TimeDelta::seconds(1) - sent);
    if least <= TimeDelta::zero() && most >= TimeDelta::zero() {
        return TimeDelta::zero();
    }
    let stated = claims.end.zip(claims.life);
    let stated = stated.filter(|(end, _)| (*end - stated_end).abs() <= CLAIMS_TOLERANCE);
    let created_now =
        stated.and_then(|(end, life)| end.checked_sub_signed(life)).is_some_and(|created| {
            created >= sent - CLAIMS_TOLERANCE && created <= now + CLAIMS_TOLERANCE
        });
    if most > TimeDelta::zero() && (date >= stated_end || created_now) {
        return TimeDelta::zero();
    }
    let agree =
        stated.is_some_and(|(end, life)| date < end && end - date <= life + CLAIMS_TOLERANCE);
    // It is a third witness: the other two may be the clock of one machine.
    let agrees_with_utc = !utc_ahead.is_zero() && (date - now - utc_ahead).abs() <= TOLERANCE;
    if agree || agrees_with_utc { most } else { most.max(TimeDelta::zero()) }
}

/// Returns the earliest end that the answer allows, by this machine's clock: `expiresIn` and the claims'
/// `expireDate`, each less the lead of the upstream's clock; and `sent` plus the life that the claims state,
/// which holds whatever the clocks say.
fn end_by_our_clock(
    stated_end: Timestamp,
    claims: &Claims,
    lead: TimeDelta,
    sent: Timestamp,
) -> Option<Timestamp> {
    let by_upstream =
        claims.end.map_or(stated_end, |end| end.min(stated_end)).checked_sub_signed(lead)?;
    let by_life = claims.life.map(|life| sent + life.clamp(-LONGEST_LIFE, LONGEST_LIFE));
    Some(by_life.map_or(by_upstream, |end| end.min(by_upstream)))
}

/// Returns the text of a JSON string; `None` for any other JSON value.
fn read_text(json: &str) -> Option<Zeroizing<String>> {
    serde_json::from_str(json).ok().map(Zeroizing::new)
}

/// Pairs of quotation marks.
const QUOTATION_MARKS: [(char, char); 5] =
    [('"', '"'), ('\'', '\''), ('`', '`'), ('\u{201c}', '\u{201d}'), ('\u{2018}', '\u{2019}')];

/// Returns the token without white space and marks around it, quotation marks, and the name of the scheme or the
/// header with which it is used. No token can contain any of these at that place, and callers add the scheme
/// themselves.
fn bare_token(text: &str) -> &str {
    let text = text.trim_matches(is_padding);
    let unquoted = QUOTATION_MARKS
        .iter()
        .find_map(|(open, close)| text.strip_prefix(*open)?.strip_suffix(*close));
    if let Some(text) = unquoted {
        return bare_token(text);
    }
    let (name, token) = text.split_once(is_padding).unwrap_or((text, ""));
    let name = name.strip_suffix(':').unwrap_or(name);
    if ["authorization", "bearer", "jwt"].iter().any(|it| name.eq_ignore_ascii_case(it)) {
        return bare_token(token);
    }
    text
}

/// Reads `expiresIn`: despite its name, a time in milliseconds since 1970, as a number or as text with a number.
fn read_end(json: &str) -> Option<Timestamp> {
    let text = read_text(json);
    let ms = text.as_deref().map_or(json, |text| text.trim_matches(is_padding));
    DateTime::from_timestamp_millis(whole_number(ms)?)
}

/// Returns the start and the end that a token's claims state, by the upstream's clock and unverified; `None`
/// if they do not state both.
#[must_use]
pub fn stated_life(token: &AccessToken) -> Option<(Timestamp, Timestamp)> {
    let Claims { end, life, .. } = Claims::of(token);
    let end = end?;
    Some((end.checked_sub_signed(life?)?, end))
}

/// The claims in the JWT's payload. They are unverified: a claim that cannot be read counts as absent.
#[derive(Debug, Default, PartialEq)]
struct Claims {
    end: Option<Timestamp>,
    /// The time from `createDate` to `expireDate`, which does not depend on any clock.
    life: Option<TimeDelta>,
    allowed_ip: Option<String>,
}

impl Claims {
    fn of(token: &AccessToken) -> Self {
        Self::read(token.expose()).unwrap_or_default()
    }

    fn read(jwt: &str) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Payload {
            #[serde(default)]
            create_date: Value,
            #[serde(default)]
            expire_date: Value,
            #[serde(default)]
            allow_ip: Value,
        }

        let mut parts = jwt.split('.');
        let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        let payload: Payload = serde_json::from_slice(&payload).ok()?;
        let end = payload.expire_date.as_str().and_then(korea_time);
        let start = payload.create_date.as_str().and_then(korea_time);
        Some(Self {
            end,
            life: end.zip(start).map(|(end, start)| end - start),
            allowed_ip: payload
                .allow_ip
                .as_str()
                .and_then(|ip| ip.parse::<IpAddr>().ok())
                .map(|ip| ip.to_string()),
        })
    }
}

/// Reads a time such as `2024-05-31 15:56:41`, which is Korea time without a zone.
fn korea_time(text: &str) -> Option<Timestamp> {
    let local = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").ok()?;
    Some(local.checked_sub_signed(KOREA)?.and_utc())
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode, header};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        domain::refresh_state::FailureClass,
        upstream::rcs::{
            read,
            tests::{ISSUED_MS, SAMPLE, answer, at, headers, jwt, ok},
        },
    };

    #[test]
    fn the_sample_is_read_as_text_and_as_number() {
        for expires_in in ["\"1717138601944\"", "1717138601944"] {
            let issued = ok(&HeaderMap::new(), &answer(expires_in, &jwt(SAMPLE))).unwrap();
            // The claims drop the milliseconds, and the earlier end counts.
            assert_eq!(issued.expires_at, at(1_717_138_601_000));
            assert_eq!(issued.allowed_ip.as_deref(), Some("211.169.153.170"));
            assert_eq!(issued.skew_ms, None);
            assert_eq!(issued.access_token.expose(), jwt(SAMPLE));
        }
    }

    #[test]
    fn unknown_fields_are_ignored_and_a_field_with_two_values_is_refused() {
        let body = br#"{"a":{},"a":[],"expiresIn":"1717138601944","accessToken":"t"}"#;
        assert_eq!(ok(&HeaderMap::new(), body).unwrap().expires_at, at(1_717_138_601_944));
        for twice in [
            r#"{"expiresIn":"1","expiresIn":"1717138601944","accessToken":"canary"}"#,
            r#"{"accessToken":"canary","expiresIn":"1717138601944","accessToken":"canary2"}"#,
            r#"{"accessToken":"canary","expiresIn":1717138601944,"access\u0054oken":"canary2"}"#,
        ] {
            let error = ok(&HeaderMap::new(), twice.as_bytes()).unwrap_err();
            assert_eq!(error.message, "the upstream's answer has a field twice", "{twice}");
            assert!(error.class == FailureClass::Malformed && error.may_have_issued, "{twice}");
        }
    }

    #[test]
    fn an_end_is_read_in_every_notation_of_a_whole_millisecond() {
        for end in [
            "1717138601944.0",
            "1.717138601944e12",
            "1717138601944000E-3",
            "\"1717138601944.000\"",
            "\"1.717138601944E+12\"",
            "\" 1717138601944\"",
            "\"1717138601944\\r\\n\"",
            "\"\\uFEFF1717138601944\"",
            "\"\\u0031717138601944\"",
        ] {
            let issued = ok(&HeaderMap::new(), &answer(end, "t")).unwrap();
            assert_eq!(issued.expires_at, at(1_717_138_601_944), "{end}");
        }
    }

    #[test]
    fn a_token_is_read_without_what_is_around_it() {
        for given in [
            " t.o-k_e~n ",
            r"t.o-k_e~n\r\n",
            r"\uFEFFt.o-k_e~n\u0000",
            "Bearer t.o-k_e~n",
            r" bearer \t t.o-k_e~n ",
            r#"\"t.o-k_e~n\""#,
            r#"\"Bearer t.o-k_e~n\""#,
            "'t.o-k_e~n'",
            "`t.o-k_e~n`",
            "\u{201c}t.o-k_e~n\u{201d}",
            "\u{2018}t.o-k_e~n\u{2019}",
            r#"'\"t.o-k_e~n\"'"#,
            "' Bearer `t.o-k_e~n` '",
            "JWT t.o-k_e~n",
            "Bearer: t.o-k_e~n",
            "Authorization: Bearer t.o-k_e~n",
            r"t.o-k\u005fe~n",
        ] {
            let issued = ok(&HeaderMap::new(), &answer("1717138601944", given)).unwrap();
            assert_eq!(issued.access_token.expose(), "t.o-k_e~n", "{given}");
        }
        for given in
            ["''", "Bearer", "Bearer ", "Basic canary", "can ary", r"can\u200bary", "canäry"]
        {
            let error = ok(&HeaderMap::new(), &answer("1717138601944", given)).unwrap_err();
            assert_eq!(error.class, FailureClass::Malformed, "{given}");
        }
    }

    #[test]
    fn unreadable_claims_are_absent_and_the_token_is_still_a_token() {
        for token in [
            "opaque",
            "a.b",
            "a.!!!.c",
            "a.b.c.d",
            &jwt("[]"),
            &jwt("not json"),
            &jwt(r#"{"expireDate":7,"createDate":null,"allowIp":["1.2.3.4"]}"#),
            &jwt(r#"{"expireDate":"2024-05-31T15:56:41Z","allowIp":"1.2.3.4; drop"}"#),
        ] {
            let issued = ok(&HeaderMap::new(), &answer("1717138601944", token)).unwrap();
            assert_eq!(issued.expires_at, at(1_717_138_601_944), "{token}");
            assert_eq!(issued.allowed_ip, None, "{token}");
        }
    }

    #[test]
    fn the_earlier_end_counts() {
        let claims = jwt(r#"{"expireDate":"2024-05-31 15:00:00"}"#);
        let issued = ok(&HeaderMap::new(), &answer("1717138601944", &claims)).unwrap();
        assert_eq!(issued.expires_at, at(1_717_135_200_000));
        // The claims end later than expiresIn.
        let issued = ok(&HeaderMap::new(), &answer("1717135100000", &jwt(SAMPLE))).unwrap();
        assert_eq!(issued.expires_at, at(1_717_135_100_000));
    }

    #[test]
    fn a_lead_of_the_upstreams_clock_shortens_the_life_and_a_lag_does_not_lengthen_it() {
        let body = answer("1717138601944", "t");
        let ten_minutes_ahead = headers(&[(header::DATE, "Fri, 31 May 2024 06:06:41 GMT")]);
        let issued = ok(&ten_minutes_ahead, &body).unwrap();
        assert_eq!(issued.skew_ms, Some(599_056));
        // `Date` may be up to a second older than it says.
        assert_eq!(issued.expires_at, at(1_717_138_601_944 - 600_056));
        let ten_minutes_behind = headers(&[(header::DATE, "Fri, 31 May 2024 05:46:41 GMT")]);
        let issued = ok(&ten_minutes_behind, &body).unwrap();
        assert_eq!(issued.skew_ms, Some(-600_944));
        assert_eq!(issued.expires_at, at(1_717_138_601_944));
        let unreadable = headers(&[(header::DATE, "yesterday")]);
        assert_eq!(ok(&unreadable, &body).unwrap().skew_ms, None);
    }

    #[test]
    fn a_date_that_is_ahead_of_the_answers_own_times_is_not_believed() {
        // The sample's token was created now, and lives for an hour.
        for (date, created_now, opaque) in [
            ("Fri, 31 May 2024 05:56:41 GMT", 3_599_056, 3_600_000),
            ("Fri, 31 May 2024 06:46:41 GMT", 3_599_056, 3_600_000 - 3_000_056),
            ("Fri, 31 May 2024 06:56:40 GMT", 3_599_056, 3_600_000 - 3_599_056),
            ("Fri, 31 May 2024 06:56:42 GMT", 3_599_056, 3_600_000),
            ("Fri, 31 May 2024 07:56:41 GMT", 3_599_056, 3_600_000),
            ("Thu, 31 Dec 2099 23:59:59 GMT", 3_599_056, 3_600_000),
        ] {
            let dated = headers(&[(header::DATE, date)]);
            for (token, life) in [(&*jwt(SAMPLE), created_now), ("opaque", opaque)] {
                let issued = ok(&dated, &answer("1717138601944", token)).unwrap();
                assert_eq!(issued.expires_at, at(ISSUED_MS + life), "{date} {token}");
            }
            // A token that was created before proves nothing, nor do claims that contradict `expiresIn`.
            let now = at(ISSUED_MS) + TimeDelta::minutes(5);
            let ahead = headers(&[(header::DATE, "Fri, 31 May 2024 06:46:41 GMT")]);
            let again = answer("1717138601944", &jwt(SAMPLE));
            let issued = read(StatusCode::OK, &ahead, &again, now, now, TimeDelta::zero()).unwrap();
            assert!(issued.expires_at < now + TimeDelta::minutes(11), "{}", issued.expires_at);
            let contradicting = answer("1717138611944", &jwt(SAMPLE));
            let issued = ok(&ahead, &contradicting).unwrap();
            assert!(issued.expires_at < at(ISSUED_MS) + TimeDelta::minutes(11));
        }
    }

    #[test]
    fn our_clock_may_be_hours_ahead_if_date_and_claims_agree_about_the_life() {
        let body = answer("1717138601944", &jwt(SAMPLE));
        for hours in [-30, -2, 2, 30] {
            let now = at(ISSUED_MS) + TimeDelta::hours(hours);
            let dated = headers(&[(header::DATE, "Fri, 31 May 2024 05:56:41 GMT")]);
            let issued = read(StatusCode::OK, &dated, &body, now, now, TimeDelta::zero()).unwrap();
            assert!(issued.expires_at <= now + TimeDelta::hours(1), "{hours}");
            assert!(issued.expires_at > now + TimeDelta::minutes(59), "{hours}");
            // The token was issued before and is given out again, so it lives for less.
            let later = headers(&[(header::DATE, "Fri, 31 May 2024 06:26:41 GMT")]);
            let issued = read(StatusCode::OK, &later, &body, now, now, TimeDelta::zero()).unwrap();
            assert!(issued.expires_at <= now + TimeDelta::minutes(30), "{hours}");
        }
        let now = at(ISSUED_MS) + TimeDelta::hours(2);
        for disagreeing in [
            // `Date` is earlier than the token's creation.
            "Fri, 31 May 2024 05:56:30 GMT",
            // The token had ended already.
            "Fri, 31 May 2024 06:56:42 GMT",
        ] {
            let dated = headers(&[(header::DATE, disagreeing)]);
            assert!(
                read(StatusCode::OK, &dated, &body, now, now, TimeDelta::zero()).is_err(),
                "{disagreeing}"
            );
        }
        // `expiresIn` contradicts the claims.
        let dated = headers(&[(header::DATE, "Fri, 31 May 2024 05:56:41 GMT")]);
        let contradicting = answer("1717138611944", &jwt(SAMPLE));
        assert!(read(StatusCode::OK, &dated, &contradicting, now, now, TimeDelta::zero()).is_err());
    }

    #[test]
    fn a_token_without_claims_is_kept_if_our_clock_is_known_to_be_ahead_and_date_agrees() {
        let (body, issued) = (answer("1717138601944", "t"), at(ISSUED_MS));
        let dated = headers(&[(header::DATE, "Fri, 31 May 2024 05:56:41 GMT")]);
        for ahead in [TimeDelta::hours(2), TimeDelta::days(9)] {
            let now = issued + ahead;
            let read = |headers, ahead| read(StatusCode::OK, headers, &body, now, now, ahead);
            let kept = read(&dated, -ahead).unwrap();
            assert!(kept.expires_at <= now + TimeDelta::hours(1));
            assert!(kept.expires_at > now + TimeDelta::minutes(59));
            assert_eq!(kept.skew_ms, Some(-944));
            assert!(read(&dated, TimeDelta::zero()).is_err());
            assert!(read(&dated, -ahead - TimeDelta::minutes(1)).is_err(), "`Date` disagrees");
            assert!(read(&HeaderMap::new(), -ahead).is_err(), "nothing proves the life");
        }
    }

    #[test]
    fn an_answer_that_travels_for_long_prolongs_no_token() {
        let body = answer("1717138601944", &jwt(SAMPLE));
        let dated = headers(&[(header::DATE, "Fri, 31 May 2024 05:56:41 GMT")]);
        for ahead in [-7_200, -3, 0, 3, 7_200] {
            // The upstream answers in the moment of the request.
            let sent = at(ISSUED_MS) + TimeDelta::seconds(ahead);
            for travelled in [0, 900, 2_500, 9_000] {
                let now = sent + TimeDelta::milliseconds(travelled);
                let issued =
                    read(StatusCode::OK, &dated, &body, sent, now, TimeDelta::zero()).unwrap();
                assert!(issued.expires_at <= sent + TimeDelta::hours(1), "{ahead} {travelled}");
                let early = sent + TimeDelta::hours(1) - issued.expires_at;
                assert!(early < TimeDelta::seconds(5), "{ahead} {travelled}: {early}");
            }
        }
    }

    #[test]
    fn the_stated_life_limits_the_end_even_if_no_date_reveals_a_clock_skew() {
        // Our clock is half an hour behind, and the answer has no `Date`. The token still ends after an hour.
        let now = at(ISSUED_MS - 1_800_000);
        let body = answer("1717138601944", &jwt(SAMPLE));
        let issued =
            read(StatusCode::OK, &HeaderMap::new(), &body, now, now, TimeDelta::zero()).unwrap();
        assert_eq!(issued.expires_at, now + TimeDelta::hours(1));
    }

    #[test]
    fn a_malformed_answer_yields_no_token() {
        let cases = [
            String::new(),
            "null".into(),
            "[]".into(),
            "<html>canary</html>".into(),
            r#"{"expiresIn":"1717138601944","accessToken":"canary"#.into(),
            r#"{"expiresIn":"1717138601944"}"#.into(),
            r#"{"accessToken":"canary"}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":["canary"]}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":""}"#.into(),
            r#"{"expiresIn":"1717138601944","accessToken":"canary\r\nX: y"}"#.into(),
        ];
        let ends = [
            "\"1717135001944\"",
            "1717135001943",
            "\"3600\"",
            "3600",
            "-1",
            "0",
            "\"\"",
            "\"+1717138601944\"",
            "\"1717138601944 1\"",
            "\"1717138601,944\"",
            "1717138601944.5",
            "17171386019445e-1",
            "1.7e12",
            "true",
            "null",
            "{}",
            "1717138601",
            "1717307801945",
            "99999999999999999999",
            "\"99999999999999999999\"",
            "9223372036854775807",
        ];
        let ends = ends.map(|end| String::from_utf8(answer(end, "canary")).unwrap());
        for body in cases.iter().chain(&ends) {
            let error = ok(&HeaderMap::new(), body.as_bytes()).unwrap_err();
            assert_eq!(error.class, FailureClass::Malformed, "{body}");
            assert!(error.may_have_issued && error.code.is_none(), "{body}");
            assert!(!format!("{error} {error:?}").contains("canary"), "{body}");
        }
    }

    #[test]
    fn claims_that_end_before_they_begin_yield_no_token() {
        let claims = r#"{"createDate":"2024-05-31 15:56:41","expireDate":"2024-05-31 15:50:00"}"#;
        let error = ok(&HeaderMap::new(), &answer("1717138601944", &jwt(claims))).unwrap_err();
        assert_eq!(error.class, FailureClass::Malformed);
    }

    #[test]
    fn a_life_of_48_hours_is_accepted_and_no_longer_one() {
        let end = ISSUED_MS + LONGEST_LIFE.num_milliseconds();
        assert!(ok(&HeaderMap::new(), &answer(&end.to_string(), "t")).is_ok());
        assert!(ok(&HeaderMap::new(), &answer(&(end + 1).to_string(), "t")).is_err());
    }

    /// Bodies in the right form, with any text as a value.
    fn near_answers() -> impl Strategy<Value = Vec<u8>> {
        let end = prop_oneof![
            any::<i64>().prop_map(|n| n.to_string()),
            (ISSUED_MS - 1_000_000_000..ISSUED_MS + 1_000_000_000).prop_map(|n| n.to_string()),
            "\\PC{0,30}".prop_map(|text| format!("{text:?}")),
        ];
        let date = prop_oneof![
            "[+-]?[0-9]{1,6}-[0-9]{1,2}-[0-9]{1,2} [0-9]{1,2}:[0-9]{2}:[0-9]{2}",
            "20[0-9]{2}-0[1-9]-[0-2][0-9] [0-1][0-9]:[0-5][0-9]:[0-5][0-9]",
            "\\PC{0,20}",
        ];
        (end, date.clone(), date, "\\PC{0,20}").prop_map(|(end, created, ended, ip)| {
            let claims = serde_json::json!(
                {"createDate": created, "expireDate": ended, "allowIp": ip}
            );
            answer(&end, &jwt(&claims.to_string()))
        })
    }

    proptest! {
        #[test]
        fn no_body_yields_a_token_that_has_ended_or_lives_too_long(
            body in near_answers(), year in 1_i32..10_000, dated: bool,
        ) {
            let now = at(ISSUED_MS);
            let mut given = HeaderMap::new();
            if dated {
                let date = format!("31 May {year:04} 05:56:41 GMT");
                given.insert(header::DATE, date.parse().unwrap());
            }
            if let Ok(issued) = read(StatusCode::OK, &given, &body, now, now, TimeDelta::zero()) {
                prop_assert!(issued.expires_at > now);
                prop_assert!(issued.expires_at <= now + LONGEST_LIFE);
            }
        }
    }
}
