//! The PROXY protocol, versions 1 and 2: a balancer says first whose connection it passes on. See
//! <https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use proxy_header::{ParseConfig, ProxyHeader};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest line of version 1, its end included.
const LONGEST_LINE: usize = 107;
/// What version 2 begins with: a signature, a byte of version and one of family, and the length of the rest.
const FIXED: usize = 16;
/// The longest rest that is read: both addresses, and extensions that nobody here looks at.
const LONGEST_REST: usize = 4_096;

/// Reads the header and nothing beyond it; the client's address, or `None` where the balancer speaks for
/// itself, as its probes do.
///
/// # Errors
/// When there is no such header.
pub(super) async fn client_of(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![stream.read_u8().await?];
    match header[0] {
        b'P' => {
            while !header.ends_with(b"\r\n") {
                if header.len() == LONGEST_LINE {
                    return Err(malformed());
                }
                header.push(stream.read_u8().await?);
            }
        }
        b'\r' => {
            header.resize(FIXED, 0);
            stream.read_exact(&mut header[1..]).await?;
            let rest = usize::from(u16::from_be_bytes([header[14], header[15]]));
            if rest > LONGEST_REST {
                return Err(malformed());
            }
            header.resize(FIXED + rest, 0);
            stream.read_exact(&mut header[FIXED..]).await?;
        }
        _ => return Err(malformed()),
    }
    let (parsed, _) =
        ProxyHeader::parse(&header, ParseConfig::default()).map_err(|_| malformed())?;
    Ok(parsed.proxied_address().map(|address| address.source))
}

fn malformed() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "no header of the PROXY protocol")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proxy_header::ProxiedAddress;

    use super::*;

    fn read(bytes: &[u8]) -> (Result<Option<String>, ErrorKind>, usize) {
        let mut left = bytes;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let client = runtime.block_on(client_of(&mut left));
        let client = client.map(|client| client.map(|it| it.to_string()));
        (client.map_err(|error| error.kind()), left.len())
    }

    #[test]
    fn both_versions_tell_the_client_and_what_follows_is_left() {
        let address = ProxiedAddress::stream(
            "[2001:db8::7]:4321".parse().unwrap(),
            "[2001:db8::1]:50051".parse().unwrap(),
        );
        let mut second = vec![];
        ProxyHeader::with_address(address).encode_v2(&mut second).unwrap();
        let first = b"PROXY TCP4 192.0.2.7 198.51.100.1 4321 50051\r\n".to_vec();
        for (header, client) in [(first, "192.0.2.7:4321"), (second, "[2001:db8::7]:4321")] {
            let bytes = [&header[..], b"PRI"].concat();
            assert_eq!(read(&bytes), (Ok(Some(client.into())), 3));
        }
    }

    #[test]
    fn a_balancer_that_speaks_for_itself_is_nobody_else() {
        let mut local = vec![];
        ProxyHeader::with_local().encode_v2(&mut local).unwrap();
        for header in [local, b"PROXY UNKNOWN\r\n".to_vec()] {
            assert_eq!(read(&header), (Ok(None), 0));
        }
    }

    #[test]
    fn what_is_no_header_is_refused_as_early_as_it_is_known() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat();
        let large = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11"[..], &[0xff, 0xff], &[0; 9]].concat();
        for (bytes, left) in [
            (&b"PRI * HTTP/2.0\r\n\r\n"[..], 2),
            (b"\x16\x03\x01", 2),
            (&endless, endless.len() - LONGEST_LINE),
            (&large, 9),
        ] {
            assert_eq!(read(bytes), (Err(ErrorKind::InvalidData), left));
        }
        assert_eq!(read(b"PROXY").0, Err(ErrorKind::UnexpectedEof));
        assert_eq!(read(b"").0, Err(ErrorKind::UnexpectedEof));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in any::<Vec<u8>>(), kind in 0_usize..3) {
            let begins = [&b""[..], b"PROXY TCP6 ", b"\r\n\r\n\0\r\nQUIT\n"][kind];
            let _ = read(&[begins, &bytes].concat());
        }
    }
}
