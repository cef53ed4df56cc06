//! What strangers send: bearers, certificates, patterns, and the upstream's answers.

use chrono::{DateTime, Utc};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use rustls::pki_types::CertificateDer;
use token_broker::{
    crypto::bearer::{BEARER_LEN, Bearer},
    domain::caller::AccountPattern,
    tls::PeerIdentity,
    upstream::rcs::{self, LONGEST_LIFE},
};

/// A bearer is what it was written as, and any other character in its place makes it none.
pub fn bearer(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(bearer) = Bearer::parse(text) else { return };
    assert_eq!(bearer.expose(), text);
    assert_eq!(text.len(), BEARER_LEN);
    for place in 0..text.len() {
        let mut mistyped = text.as_bytes().to_vec();
        mistyped[place] = if mistyped[place] == b'x' { b'y' } else { b'x' };
        // 35 bits of checksum miss one in 34 billion; the fuzzer has not that many.
        assert!(Bearer::parse(std::str::from_utf8(&mistyped).unwrap()).is_err(), "{place}");
    }
}

/// A certificate names at most one SPIFFE ID, which belongs to its trust domain.
pub fn client_certificate(bytes: &[u8]) {
    match PeerIdentity::of(&CertificateDer::from(bytes)) {
        PeerIdentity::Spiffe { id, trust_domain } => {
            assert!(id.starts_with(&format!("spiffe://{trust_domain}/")));
            assert!(!trust_domain.is_empty() && !trust_domain.contains('/'));
        }
        PeerIdentity::Dns(names) => assert!(!names.is_empty() && names.len() <= 16),
        PeerIdentity::Nobody(why) => assert!(!why.is_empty()),
    }
}

/// A pattern reads back as it was written, and means what one star says. The bytes are a pattern and names,
/// a line each.
pub fn grant_pattern(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = text.split('\n');
    let Some(Ok(pattern)) = lines.next().map(str::parse::<AccountPattern>) else { return };
    let written = pattern.to_string();
    assert_eq!(written.parse::<AccountPattern>().as_ref(), Ok(&pattern));
    assert!(written.len() <= 63);
    for name in lines {
        // Said in another way: some run of characters in the star's place makes the name.
        let meant = match written.split_once('*') {
            None => written == name,
            Some((before, after)) => (0..=name.len())
                .filter(|cut| name.is_char_boundary(*cut))
                .any(|cut| name[..cut] == *before && name[cut..].ends_with(after)),
        };
        assert_eq!(pattern.matches(name), meant, "{written} on {name}");
    }
    assert_eq!(pattern.as_name().is_some(), !written.contains('*'));
}

/// Whatever the upstream answers, a token that is taken lives, and not for longer than is believed. The
/// bytes are two of a status, one that is the length of a `Date`, the `Date`, and the body.
pub fn upstream_answer(bytes: &[u8]) {
    let [high, low, length, rest @ ..] = bytes else { return };
    let Ok(status) = StatusCode::from_u16(u16::from_be_bytes([*high, *low])) else { return };
    let (date, body) = rest.split_at(rest.len().min(usize::from(*length)));
    let mut headers = HeaderMap::new();
    if let Ok(date) = HeaderValue::from_bytes(date) {
        headers.insert(header::DATE, date.clone());
        headers.insert(header::RETRY_AFTER, date);
    }
    // A moment after the answer that the specification shows.
    let now = DateTime::<Utc>::from_timestamp_millis(1_717_135_002_000).unwrap();
    match rcs::read(status, &headers, body, now) {
        Ok(issued) => {
            assert_eq!(status, StatusCode::OK);
            assert!(issued.expires_at > now, "it has ended");
            assert!(issued.expires_at - now <= LONGEST_LIFE, "it lives too long");
            let token = issued.access_token.expose();
            assert!((1..=8_192).contains(&token.len()));
            assert!(token.bytes().all(|byte| byte.is_ascii_graphic()));
        }
        Err(refused) => assert!(!refused.to_string().is_empty()),
    }
}
