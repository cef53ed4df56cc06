//! Which hosts are this machine, so that what is sent to them needs no encryption.

use std::net::IpAddr;

/// Returns whether `address` leads to this machine: an address of 127.0.0.0/8, `::1`, or one of the former in the form of
/// IPv6 (`::ffff:127.0.0.1`), which the system takes for it.
#[must_use]
pub fn is_loopback_address(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Returns whether `host`, a name or an address that may be in brackets, is this machine.
///
/// Of names that is `localhost` alone, in capital letters too. Others that lead here on many machines, such as
/// `localhost.` and `a.localhost`, are looked up in the DNS on some, where anybody may answer. An address has to be
/// written in full; parsers of URLs replace short forms such as `127.1`.
#[must_use]
pub fn is_loopback_host(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse().is_ok_and(is_loopback_address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leads_to_this_machine_for_sure_is_loopback() {
        for host in [
            "localhost",
            "LOCALHOST",
            "LocalHost",
            "127.0.0.1",
            "127.255.0.9",
            "::1",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "::ffff:127.0.0.1",
            "[::ffff:7f00:1]",
        ] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in [
            "",
            "localhost.",
            "a.localhost",
            "localhost.localdomain",
            "localhost.example.com",
            "ip6-localhost",
            "ⓛocalhost",
            "127。0。0。1",
            "127.0.0.1.",
            "127.0.0.1.example.com",
            "127.1",
            "0x7f.1",
            "0177.0.0.1",
            "2130706433",
            "128.0.0.1",
            "0.0.0.0",
            "::",
            "::127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::127.0.0.1",
            "[::1%lo]",
            "[::1",
            "fe80::1",
        ] {
            assert!(!is_loopback_host(host), "{host}");
        }
    }
}
