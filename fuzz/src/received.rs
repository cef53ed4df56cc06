//! Targets for data from outside: bearers, certificates, grant patterns, and the upstream's responses.

use chrono::{DateTime, TimeDelta, Utc};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use rustls::pki_types::CertificateDer;
use token_broker::{
    crypto::bearer::{BEARER_LEN, Bearer},
    domain::caller::AccountPattern,
    tls::PeerIdentity,
    upstream::rcs::{self, LONGEST_LIFE},
};

/// A valid bearer keeps its text, and is not valid with any other character in one position.
pub fn bearer(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(bearer) = Bearer::parse(text) else { return };
    assert_eq!(bearer.expose(), text);
    assert_eq!(text.len(), BEARER_LEN);
    for position in 0..text.len() {
        let mut mistyped = text.as_bytes().to_vec();
        mistyped[position] = if mistyped[position] == b'x' { b'y' } else { b'x' };
        // A checksum of 35 bits misses one in 34 billion, more than the fuzzer will try.
        assert!(Bearer::parse(std::str::from_utf8(&mistyped).unwrap()).is_err(), "{position}");
    }
}

/// An identity of a certificate is a SPIFFE ID in its trust domain, 1 to 16 DNS names, or a reason why
/// there is none.
pub fn client_certificate(bytes: &[u8]) {
    match PeerIdentity::of(&CertificateDer::from(bytes)) {
        PeerIdentity::Spiffe { id, trust_domain } => {
            assert!(id.starts_with(&format!("spiffe://{trust_domain}/")));
            assert!(!trust_domain.is_empty() && !trust_domain.contains('/'));
        }
        PeerIdentity::Dns(names) => assert!(!names.is_empty() && names.len() <= 16),
        PeerIdentity::Unidentified(why) => assert!(!why.is_empty()),
    }
}

/// A pattern is equal to the parsed form of its text, and its `*` matches any characters. The input is a
/// pattern and names, one on each line.
pub fn grant_pattern(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = text.split('\n');
    let Some(Ok(pattern)) = lines.next().map(str::parse::<AccountPattern>) else { return };
    let written = pattern.to_string();
    assert_eq!(written.parse::<AccountPattern>().as_ref(), Ok(&pattern));
    assert!(written.len() <= 63);
    for name in lines {
        // The same rule in another form: the name begins with what is before the star, and some rest
        // of it ends with what is after the star.
        let expected = match written.split_once('*') {
            None => written == name,
            Some((before, after)) => (0..=name.len())
                .filter(|split| name.is_char_boundary(*split))
                .any(|split| name[..split] == *before && name[split..].ends_with(after)),
        };
        assert_eq!(pattern.matches(name), expected, "{written} on {name}");
    }
    assert_eq!(pattern.as_name().is_some(), !written.contains('*'));
}

/// A token that is accepted from a response has not expired, and does not live longer than the broker
/// allows. The input is the status (two bytes), the length of `Date` (one byte), `Date`, and the body.
pub fn upstream_answer(bytes: &[u8]) {
    let [high, low, length, rest @ ..] = bytes else { return };
    let Ok(status) = StatusCode::from_u16(u16::from_be_bytes([*high, *low])) else { return };
    let (date, body) = rest.split_at(rest.len().min(usize::from(*length)));
    let mut headers = HeaderMap::new();
    if let Ok(date) = HeaderValue::from_bytes(date) {
        headers.insert(header::DATE, date.clone());
        headers.insert(header::RETRY_AFTER, date);
    }
    // Shortly after the time of the sample response in the API's documentation.
    let now = DateTime::<Utc>::from_timestamp_millis(1_717_135_002_000).unwrap();
    match rcs::read(status, &headers, body, now, now, TimeDelta::zero()) {
        Ok(issued) => {
            assert!(status.is_success());
            assert!(issued.expires_at > now, "it has expired");
            assert!(issued.expires_at - now <= LONGEST_LIFE, "it lives too long");
            let token = issued.access_token.expose();
            assert!((1..=8_192).contains(&token.len()));
            assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
