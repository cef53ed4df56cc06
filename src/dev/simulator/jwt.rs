//! Creating and verifying the simulated tokens: JWTs with the claims of the real ones.

use std::net::IpAddr;

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{NaiveDateTime, TimeDelta};
use serde::{Deserialize, Serialize};

use crate::domain::clock::Timestamp;

/// `{"alg":"HS256"}` in Base64url. The header of the real tokens is the same: no `typ`, no `kid`.
const HEADER: &str = "eyJhbGciOiJIUzI1NiJ9";
/// The signing key. It is no secret, because nothing should trust the simulator's tokens.
const KEY: &[u8] = b"a simulated RCS Biz Center";
/// The time zone of the dates in the claims, as an offset from UTC.
const KOREA: TimeDelta = TimeDelta::hours(9);
/// The format of the dates in the claims.
const DATE_FORMAT: &str = "%Y-%m-%d %H:%M:%S";

/// The payload of a token. The order of the fields is that of the API's documentation.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Claims {
    sub_agncy_id: String,
    is_sub_agency: String,
    expire_date: String,
    /// The client id of the account.
    pub(super) user_id: String,
    allow_ip: String,
    create_date: String,
    /// Only in simulated tokens: makes two tokens that were issued in the same second different.
    pub(super) simulated_serial: u64,
}

impl Claims {
    pub(super) fn new(
        user_id: &str,
        allow_ip: IpAddr,
        (created_at, expires_at): (Timestamp, Timestamp),
        serial: u64,
    ) -> Self {
        Self {
            sub_agncy_id: String::new(),
            is_sub_agency: "n".to_owned(),
            expire_date: korean_time(expires_at),
            user_id: user_id.to_owned(),
            allow_ip: allow_ip.to_string(),
            create_date: korean_time(created_at),
            simulated_serial: serial,
        }
    }

    /// Returns the token: header, payload and signature.
    pub(super) fn sign(&self) -> Result<String, serde_json::Error> {
        let signed = format!("{HEADER}.{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(self)?));
        let tag = hmac::sign(&key(), signed.as_bytes());
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag)))
    }

    /// Returns the claims of `token`, or `None` if its signature is wrong.
    pub(super) fn verify(token: &str) -> Option<Self> {
        let (signed, tag) = token.rsplit_once('.')?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        hmac::verify(&key(), signed.as_bytes(), &tag).ok()?;
        let (_, payload) = signed.split_once('.')?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
    }

    /// Whether the token has expired at `now`, according to its claims.
    pub(super) fn has_expired(&self, now: Timestamp) -> bool {
        NaiveDateTime::parse_from_str(&self.expire_date, DATE_FORMAT)
            .is_ok_and(|end| (end - KOREA).and_utc() <= now)
    }
}

fn key() -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, KEY)
}

fn korean_time(at: Timestamp) -> String {
    (at + KOREA).format(DATE_FORMAT).to_string()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn a_token_has_the_documented_claims_and_only_signed_tokens_verify() {
        let created = DateTime::from_timestamp_millis(1_717_135_001_944).unwrap();
        let ends = created + TimeDelta::hours(1);
        let address = "211.169.153.170".parse().unwrap();
        let claims = Claims::new("swjeong3117", address, (created, ends), 7);
        let token = claims.sign().unwrap();
        let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        assert_eq!(
            String::from_utf8(payload).unwrap(),
            r#"{"subAgncyId":"","isSubAgency":"n","expireDate":"2024-05-31 15:56:41","userId":"swjeong3117","allowIp":"211.169.153.170","createDate":"2024-05-31 14:56:41","simulatedSerial":7}"#
        );
        let claims = Claims::verify(&token).unwrap();
        assert_eq!((claims.user_id.as_str(), claims.simulated_serial), ("swjeong3117", 7));
        assert!(!claims.has_expired(created) && claims.has_expired(ends));
        for foreign in ["", "a.b.c", &token[..token.len() - 2], &token.replace("eyJ", "eyK")] {
            assert!(Claims::verify(foreign).is_none(), "{foreign}");
        }
    }
}
