//! Dates in HTTP headers.

use chrono::{DateTime, Utc};
use http::{HeaderMap, header::HeaderName};

use crate::domain::clock::Timestamp;

/// Returns the time in the header `name`, in the format of RFC 9110, section 5.6.7; `None` if the header is
/// absent or malformed.
pub(super) fn http_date(headers: &HeaderMap, name: &HeaderName) -> Option<Timestamp> {
    let text = headers.get(name)?.to_str().ok()?;
    Some(DateTime::parse_from_rfc2822(text).ok()?.with_timezone(&Utc))
}
