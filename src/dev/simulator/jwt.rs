//! Tokens that look like the real ones.

use std::net::IpAddr;

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{NaiveDateTime, TimeDelta};
use serde::{Deserialize, Serialize};

use crate::domain::clock::Timestamp;

/// `{"alg":"HS256"}`, as in the real ones: no `typ`, no `kid`.
const HEADER: &str = "eyJhbGciOiJIUzI1NiJ9";
/// Not a secret: it signs nothing that anyone should believe.
const KEY: &[u8] = b"a simulated RCS Biz Center";
const KOREA: TimeDelta = TimeDelta::hours(9);
const FORMAT: &str = "%Y-%m-%d %H:%M:%S";

/// A token's payload, in the order of the API's document.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Claims {
    sub_agncy_id: String,
    is_sub_agency: String,
    expire_date: String,
    /// The client id.
    pub(super) user_id: String,
    allow_ip: String,
    create_date: String,
    /// The simulator's own: tells tokens of one second apart.
    pub(super) simulated_serial: u64,
}

impl Claims {
    pub(super) fn new(
        user_id: &str,
        allow_ip: IpAddr,
        (created, ends): (Timestamp, Timestamp),
        serial: u64,
    ) -> Self {
        Self {
            sub_agncy_id: String::new(),
            is_sub_agency: "n".to_owned(),
            expire_date: in_korea(ends),
            user_id: user_id.to_owned(),
            allow_ip: allow_ip.to_string(),
            create_date: in_korea(created),
            simulated_serial: serial,
        }
    }

    /// The signed token.
    pub(super) fn sign(&self) -> Result<String, serde_json::Error> {
        let signed = format!("{HEADER}.{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(self)?));
        let tag = hmac::sign(&key(), signed.as_bytes());
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag)))
    }

    /// The claims of a token that was signed here.
    pub(super) fn verify(token: &str) -> Option<Self> {
        let (signed, tag) = token.rsplit_once('.')?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        hmac::verify(&key(), signed.as_bytes(), &tag).ok()?;
        let (_, payload) = signed.split_once('.')?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
    }

    /// Whether the stated end has come at `now`.
    pub(super) fn has_ended(&self, now: Timestamp) -> bool {
        NaiveDateTime::parse_from_str(&self.expire_date, FORMAT)
            .is_ok_and(|end| (end - KOREA).and_utc() <= now)
    }
}

fn key() -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, KEY)
}

fn in_korea(at: Timestamp) -> String {
    (at + KOREA).format(FORMAT).to_string()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn a_token_looks_like_the_sample_and_only_ours_verify() {
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
        assert!(!claims.has_ended(created) && claims.has_ended(ends));
        for foreign in ["", "a.b.c", &token[..token.len() - 2], &token.replace("eyJ", "eyK")] {
            assert!(Claims::verify(foreign).is_none(), "{foreign}");
        }
    }
}
