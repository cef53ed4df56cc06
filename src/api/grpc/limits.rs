//! Limits on the size of requests, which several modules need.

/// The largest request message of `TokenService`, in bytes. A `WatchTokens` request for a thousand accounts
/// fits.
pub(super) const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// The largest request message of health and reflection, in bytes. Their requests hold one name.
pub(super) const MAX_PUBLIC_REQUEST_BYTES: usize = 4 * 1024;
