//! The claims in the payload of the upstream's JWT.

use std::net::IpAddr;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use chrono::{NaiveDateTime, TimeDelta};
use serde::Deserialize;
use serde_json::Value;

use crate::domain::{clock::Timestamp, secret::AccessToken};

/// Korea time is nine hours ahead of UTC, without summer time.
const KOREA: TimeDelta = TimeDelta::hours(9);
/// The encoding of the payload. Some writers pad it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The claims in the JWT's payload. They are unverified: a claim that cannot be read counts as absent.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Claims {
    /// `expireDate`, read as Korea time.
    pub(super) end: Option<Timestamp>,
    /// The time from `createDate` to `expireDate`, which does not depend on any clock or zone.
    pub(super) life: Option<TimeDelta>,
    /// `allowIp`.
    pub(super) allowed_ip: Option<String>,
}

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

impl Payload {
    fn read(jwt: &str) -> Option<Self> {
        let mut parts = jwt.split('.');
        let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        // Some writers use the other alphabet of RFC 4648.
        let payload = BASE64.decode(payload.replace('+', "-").replace('/', "_")).ok()?;
        serde_json::from_slice(&payload).ok()
    }
}

impl Claims {
    /// Returns the claims in `token`; none if it is no JWT.
    pub(super) fn of(token: &AccessToken) -> Self {
        let Some(payload) = Payload::read(token.expose()) else { return Self::default() };
        let end = payload.expire_date.as_str().and_then(korea_time);
        let start = payload.create_date.as_str().and_then(korea_time);
        let allowed_ip = payload.allow_ip.as_str().and_then(|ip| ip.trim().parse::<IpAddr>().ok());
        Self {
            end,
            life: end.zip(start).map(|(end, start)| end - start),
            allowed_ip: allowed_ip.map(|ip| ip.to_string()),
        }
    }

    /// Returns whether `token` is a JWT whose claims can be read.
    pub(super) fn are_in(token: &str) -> bool {
        Payload::read(token).is_some()
    }
}

/// Reads a time such as `2024-05-31 15:56:41`, which is Korea time without a zone.
fn korea_time(text: &str) -> Option<Timestamp> {
    let local = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").ok()?;
    Some(local.checked_sub_signed(KOREA)?.and_utc())
}
