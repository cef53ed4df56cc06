//! Which client addresses count as one client.

use std::net::{IpAddr, Ipv6Addr};

/// Returns the address that stands for all addresses of the client behind `address`: an IPv4 address
/// itself (also where it is mapped into IPv6), and of an IPv6 address its /64 prefix, since one host
/// usually has all addresses of its /64.
#[must_use]
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_an_ipv6_prefix_and_both_forms_of_an_ipv4_address_are_one_client() {
        let network = |address: &str| network_of(address.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.1"), "192.0.2.1");
        assert_eq!(network("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
