//! Reads an answer that should be a token: the token, and its end by this machine's clock.

use chrono::{DateTime, TimeDelta};
use zeroize::Zeroizing;

use super::{answer::Answer, body::is_padding, claims::Claims, number::whole_number};
pub use crate::domain::token::LONGEST_LIFE;
use crate::{
    domain::{
        clock::Timestamp, plausible_time::TOLERANCE, secret::AccessToken, token::IssuedToken,
    },
    upstream::issue_error::IssueError,
};

/// How far the times that one answer states may differ: `Date` and the claims count whole seconds.
const CLAIMS_TOLERANCE: TimeDelta = TimeDelta::seconds(2);
/// The lengths of the lines into which writers break a token, as the encodings of RFC 2045 and RFC 7468 have them.
const WRAPPED_LINE: std::ops::RangeInclusive<usize> = 60..=80;

/// Reads an answer with the header `Date`, to a request that was sent at `sent`. The answer was received at `now`.
/// UTC is `utc_ahead` ahead of these times.
pub(super) fn read(
    answer: &Answer,
    date: Option<Timestamp>,
    sent: Timestamp,
    now: Timestamp,
    utc_ahead: TimeDelta,
) -> Result<IssuedToken, IssueError> {
    let tokens = answer.access_tokens.iter().map(|json| Some(bare_token(&read_text(json)?)));
    let access_token = the_same("accessToken", tokens)?
        .ok_or_else(|| IssueError::malformed("the upstream's answer has no accessToken"))?;
    let access_token = AccessToken::new(&access_token).map_err(|_| {
        IssueError::malformed("the upstream's accessToken is not 1 to 8192 visible characters")
    })?;
    let stated_end = the_same("expiresIn", answer.ends.iter().map(|json| read_end(json)))?
        .ok_or_else(|| {
            IssueError::malformed(
                "the upstream's expiresIn is not a time in milliseconds since 1970",
            )
        })?;

    let claims = in_their_zone(Claims::of(&access_token), date, stated_end, sent, now, utc_ahead);
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

/// Returns the value that the field `name` has each time that it is there; `None` if it is not there or cannot be read.
///
/// # Errors
/// If it has two values, so that it is not known which one is meant.
fn the_same<T: PartialEq>(
    name: &str,
    mut values: impl Iterator<Item = Option<T>>,
) -> Result<Option<T>, IssueError> {
    let Some(first) = values.next() else { return Ok(None) };
    if values.any(|other| other != first) {
        let message = format!("the upstream's answer has different values of {name}");
        return Err(IssueError::malformed(message));
    }
    Ok(first)
}

/// Returns the claims by the zone in which the upstream has written them. It is Korea time, unless `expiresIn`, which
/// has no zone, proves that it is another one, a whole number of hours away: with the life that the claims state, the
/// token was created when the upstream answered, by any of the clocks; or it was created before, and by Korea time the
/// upstream would have given out a token that had ended. Otherwise one of the two ends may be wrong, and the earlier
/// one counts.
fn in_their_zone(
    claims: Claims,
    date: Option<Timestamp>,
    stated_end: Timestamp,
    sent: Timestamp,
    now: Timestamp,
    utc_ahead: TimeDelta,
) -> Claims {
    const MOST_HOURS: i64 = 24;
    let stated = claims.end.zip(claims.life.filter(|life| *life > TimeDelta::zero()));
    let Some((end, life)) = stated else { return claims };
    let hours = (stated_end - end + TimeDelta::minutes(30)).num_seconds().div_euclid(3_600);
    if hours == 0 || hours.abs() > MOST_HOURS {
        return claims;
    }
    let shifted = end.checked_add_signed(TimeDelta::hours(hours));
    let created = stated_end.checked_sub_signed(life);
    let Some((shifted, created)) = shifted.zip(created) else { return claims };
    let within = |from: Timestamp, to: Timestamp| {
        created >= from - CLAIMS_TOLERANCE && created <= to + CLAIMS_TOLERANCE
    };
    let is_new = within(sent, now)
        || within(sent + utc_ahead, now + utc_ahead)
        || date.is_some_and(|date| within(date, date + TimeDelta::seconds(1)));
    let is_given_again = created <= now && end <= sent;
    if (shifted - stated_end).abs() <= CLAIMS_TOLERANCE && (is_new || is_given_again) {
        return Claims { end: Some(shifted), ..claims };
    }
    claims
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

/// Quotation marks that open and close with the same character. Typographic ones are padding.
const QUOTATION_MARKS: [char; 3] = ['"', '\'', '`'];

/// Returns the text without padding and quotation marks around it.
fn unquoted(text: &str) -> &str {
    fn inner(text: &str) -> Option<&str> {
        QUOTATION_MARKS.iter().find_map(|mark| text.strip_prefix(*mark)?.strip_suffix(*mark))
    }
    let mut text = text.trim_matches(is_padding);
    // The upstream decides how many there are.
    while let Some(inner) = inner(text) {
        text = inner.trim_matches(is_padding);
    }
    text
}

/// Returns the token without padding and quotation marks around it, the name of the scheme or the header with which it
/// is used, and the ends of lines into which it was broken. No token can contain any of these at that place, and
/// callers add the scheme themselves.
fn bare_token(text: &str) -> Zeroizing<String> {
    let mut text = unquoted(text);
    loop {
        let (name, token) = text.split_once(is_padding).unwrap_or((text, ""));
        let name = name.strip_suffix(':').unwrap_or(name);
        if !["authorization", "bearer", "jwt"].iter().any(|it| name.eq_ignore_ascii_case(it)) {
            return Zeroizing::new(unwrapped(text).unwrap_or_else(|| text.to_owned()));
        }
        text = unquoted(token);
    }
}

/// Returns the JWT that `text` has in lines of equal length, of which only the last may be shorter and the first is no
/// JWT yet. No other text with white space in it is one token for certain.
fn unwrapped(text: &str) -> Option<String> {
    let lines: Vec<_> = text.split(is_padding).filter(|line| !line.is_empty()).collect();
    let [first, middle @ .., last] = &lines[..] else { return None };
    let is_wrapped = WRAPPED_LINE.contains(&first.len())
        && middle.iter().all(|line| line.len() == first.len())
        && last.len() <= first.len()
        && !Claims::are_in(first);
    is_wrapped.then(|| lines.concat()).filter(|token| Claims::are_in(token))
}

/// Reads `expiresIn`: despite its name, a time in milliseconds since 1970, as a number or as text with a number.
fn read_end(json: &str) -> Option<Timestamp> {
    let text = read_text(json);
    let ms = text.as_deref().map_or(json, |text| unquoted(text));
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

#[cfg(test)]
mod tests {
    use base64::{
        Engine as _,
        engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD},
    };
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
            assert!(
                error.message.contains("has different values of"),
                "{twice}: {}",
                error.message
            );
            assert!(error.class == FailureClass::Malformed && error.may_have_issued, "{twice}");
        }
    }

    #[test]
    fn any_number_of_marks_and_schemes_around_a_token_is_read() {
        assert_eq!(unquoted(&"'".repeat(60_000)), "");
        assert_eq!(unquoted(&format!("{0}t{0}", "'".repeat(30_000))), "t");
        assert_eq!(*bare_token(&format!("{}t", "jwt ".repeat(15_000))), "t");
    }

    #[test]
    fn a_field_that_is_repeated_with_the_same_meaning_is_read() {
        for fields in [
            r#""accessToken":null,"expiresIn":1717138601944,"accessToken":"token""#,
            r#""accessToken":"token","expiresIn":1717138601944,"accessToken":null,"expiresIn":null"#,
            r#""accessToken":"","expiresIn":" ","expiresIn":1717138601944,"accessToken":"token""#,
            r#""expiresIn":"1717138601944","accessToken":"token","expiresIn":1717138601944"#,
            r#""expiresIn":1.717138601944e12,"accessToken":"token","expiresIn":1717138601944.0"#,
            r#""expiresIn":1717138601944,"accessToken":"token","accessToken":"tok\u0065n""#,
            r#""expiresIn":1717138601944,"accessToken":"token","access\u0054oken":"Bearer token""#,
        ] {
            let issued = ok(&HeaderMap::new(), format!("{{{fields}}}").as_bytes()).unwrap();
            assert_eq!(issued.access_token.expose(), "token", "{fields}");
            assert_eq!(issued.expires_at, at(1_717_138_601_944), "{fields}");
        }
        // A value that cannot be read is one.
        for fields in [
            r#""expiresIn":"soon","accessToken":"token","expiresIn":1717138601944"#,
            r#""expiresIn":1717138601944,"accessToken":7,"accessToken":"token""#,
        ] {
            assert!(ok(&HeaderMap::new(), format!("{{{fields}}}").as_bytes()).is_err(), "{fields}");
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
            r#""\"1717138601944\"""#,
            r#"" '1717138601944' ""#,
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
            r"t.o-k_e~n\u00ad",
            r"\u200et.o-k_e~n\u200f",
            r"\u2060t.o-k_e~n\u200b",
            r"t.o-k_e~n\u200d\ufe0f",
            "“t.o-k_e~n”",
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
        for given in [
            "''",
            "Bearer",
            "Bearer ",
            "Basic canary",
            "can ary",
            r"can\u200bary",
            "canäry",
            "canaryé",
            r"canary\u0435",
            r"canary\u0301",
            "canary…",
            "canary••••",
            r"\u202fcanary\ufffd",
            r"\x63anary",
            r"canary\ud83d",
        ] {
            let error = ok(&HeaderMap::new(), &answer("1717138601944", given)).unwrap_err();
            assert_eq!(error.class, FailureClass::Malformed, "{given}");
        }
    }

    #[test]
    fn a_token_in_lines_is_put_together_and_nothing_else_with_white_space_is() {
        let token = jwt(SAMPLE);
        let wrapped = |width: usize, end: &str| {
            let lines: Vec<_> =
                token.as_bytes().chunks(width).map(String::from_utf8_lossy).collect();
            lines.join(end)
        };
        for (width, end) in
            [(64, r"\n"), (76, r"\r\n"), (64, "\n"), (76, "\r\n"), (72, " "), (76, r"\r\n ")]
        {
            let text = wrapped(width, end);
            for text in [text.clone(), format!("Bearer {text}"), format!(r"\n{text}\r\n")] {
                let issued = ok(&HeaderMap::new(), &answer("1717138601944", &text)).unwrap();
                assert_eq!(issued.access_token.expose(), token, "{text}");
            }
        }
        for text in [
            format!("{} canary", &jwt(r#"{"a":"canary-canary-canary"}"#)),
            wrapped(20, " "),
            wrapped(200, r"\n"),
            format!("Basic {token}"),
            format!("{token} canary"),
            format!(r"{token}\n{token}"),
            format!(r"{}\n{}", "a".repeat(64), "a".repeat(64)),
            format!(r"{}\n{}\n{}", &token[..64], &token[64..100], &token[100..]),
        ] {
            let error = ok(&HeaderMap::new(), &answer("1717138601944", &text)).unwrap_err();
            assert_eq!(error.class, FailureClass::Malformed, "{text}");
        }
    }

    #[test]
    fn the_allowed_address_is_read_however_the_payload_is_encoded() {
        // The two alphabets differ for these characters, and the lengths need other padding.
        for filler in ["", "a", "aa"] {
            let payload = format!(r#"{{"a":"???>>>~~~{filler}","allowIp":" 1.2.3.4 "}}"#);
            for engine in [URL_SAFE, URL_SAFE_NO_PAD, STANDARD, STANDARD_NO_PAD] {
                let token = format!("e30.{}.c2ln", engine.encode(&payload));
                let issued = ok(&HeaderMap::new(), &answer("1717138601944", &token)).unwrap();
                assert_eq!(issued.allowed_ip.as_deref(), Some("1.2.3.4"), "{token}");
            }
        }
    }

    #[test]
    fn claims_in_another_zone_than_korea_shorten_no_token_if_expires_in_proves_it() {
        let text = |ms: i64, hours: i64| {
            (at(ms) + TimeDelta::hours(hours)).format("%Y-%m-%d %H:%M:%S").to_string()
        };
        let (now, hour) = (at(ISSUED_MS), TimeDelta::hours(1));
        let token = |created: i64, ended: i64, hours: i64| {
            jwt(&format!(
                r#"{{"createDate":"{}","expireDate":"{}"}}"#,
                text(created, hours),
                text(ended, hours)
            ))
        };
        let read = |end: i64, token: &str, headers: &HeaderMap| {
            let body = answer(&end.to_string(), token);
            read(StatusCode::OK, headers, &body, now, now, TimeDelta::zero())
        };
        let (none, end) = (HeaderMap::new(), ISSUED_MS + 3_600_000);
        for hours in [-12, -5, 0, 1, 8, 9, 10, 14] {
            let issued = read(end, &token(ISSUED_MS, end, hours), &none).unwrap();
            assert!(issued.expires_at <= now + hour, "{hours}");
            assert!(issued.expires_at > now + hour - TimeDelta::seconds(1), "{hours}");
        }
        // Our clock is ahead, and `Date` tells when the token was created.
        let dated = headers(&[(header::DATE, "Fri, 31 May 2024 03:56:41 GMT")]);
        let two_hours = 7_200_000;
        let issued =
            read(end - two_hours, &token(ISSUED_MS - two_hours, end - two_hours, 0), &dated);
        assert!(issued.unwrap().expires_at > now + hour - TimeDelta::seconds(2));
        // A token that was created before and is given out again.
        let half = 1_800_000;
        let issued = read(end - half, &token(ISSUED_MS - half, end - half, 0), &none).unwrap();
        assert!(issued.expires_at > now + hour / 2 - TimeDelta::seconds(1));
        assert!(issued.expires_at <= now + hour / 2);
        // `expiresIn` is wrong by as many hours: the claims are right about the end.
        let issued = read(end + 9 * 3_600_000, &token(ISSUED_MS, end, 9), &none).unwrap();
        assert!(issued.expires_at <= now + hour);
        let given_again = token(ISSUED_MS - half, end - half, 9);
        for wrong in [1, 9] {
            let issued = read(end - half + wrong * 3_600_000, &given_again, &none).unwrap();
            assert!(issued.expires_at <= now + hour / 2, "{wrong}");
        }
        // The two differ by minutes, or the claims do not tell the life.
        assert!(read(end, &token(ISSUED_MS - 600_000, end - 600_000, 0), &none).is_err());
        let no_life = jwt(&format!(r#"{{"expireDate":"{}"}}"#, text(end, 0)));
        assert!(read(end, &no_life, &none).is_err());
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
