//! The PROXY protocol, versions 1 and 2, in which a balancer names the address of the client whose connection
//! it forwards. See <https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use proxy_header::{ParseConfig, ProxyHeader};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The length of the longest header of version 1, in bytes: a line with its CR LF.
const MAX_V1_LEN: usize = 107;
/// The length of the fixed part of a version 2 header, in bytes: signature, version, family, and the length
/// of the rest.
const V2_FIXED_LEN: usize = 16;
/// The longest accepted rest of a version 2 header, in bytes: both addresses, and extensions, which are
/// ignored.
const MAX_V2_REST_LEN: usize = 4_096;

/// Reads the header and nothing beyond it. Returns the client's address, or `None` if the balancer opened the
/// connection for itself, as for a health check. Sets no timeout.
///
/// # Errors
/// [`ErrorKind::InvalidData`] when the stream does not begin with a valid header, and the errors of reading.
pub(super) async fn read_client_address(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![stream.read_u8().await?];
    match header[0] {
        b'P' => {
            while !header.ends_with(b"\r\n") {
                if header.len() == MAX_V1_LEN {
                    return Err(malformed());
                }
                header.push(stream.read_u8().await?);
            }
        }
        b'\r' => {
            header.resize(V2_FIXED_LEN, 0);
            stream.read_exact(&mut header[1..]).await?;
            let rest = usize::from(u16::from_be_bytes([header[14], header[15]]));
            if rest > MAX_V2_REST_LEN {
                return Err(malformed());
            }
            header.resize(V2_FIXED_LEN + rest, 0);
            stream.read_exact(&mut header[V2_FIXED_LEN..]).await?;
        }
        _ => return Err(malformed()),
    }
    let (parsed, _) =
        ProxyHeader::parse(&header, ParseConfig::default()).map_err(|_| malformed())?;
    Ok(parsed.proxied_address().map(|address| address.source))
}

fn malformed() -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        "the connection does not begin with a PROXY protocol header",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proxy_header::ProxiedAddress;

    use super::*;

    /// Returns the result for `bytes`, and how many of them were not read.
    fn read(bytes: &[u8]) -> (Result<Option<String>, ErrorKind>, usize) {
        let mut left = bytes;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let client = runtime.block_on(read_client_address(&mut left));
        let client = client.map(|client| client.map(|address| address.to_string()));
        (client.map_err(|error| error.kind()), left.len())
    }

    #[test]
    fn both_versions_name_the_client_and_what_follows_is_not_read() {
        let address = ProxiedAddress::stream(
            "[2001:db8::7]:4321".parse().unwrap(),
            "[2001:db8::1]:50051".parse().unwrap(),
        );
        let mut v2 = vec![];
        ProxyHeader::with_address(address).encode_v2(&mut v2).unwrap();
        let v1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4321 50051\r\n".to_vec();
        for (header, client) in [(v1, "192.0.2.7:4321"), (v2, "[2001:db8::7]:4321")] {
            let bytes = [&header[..], b"PRI"].concat();
            assert_eq!(read(&bytes), (Ok(Some(client.into())), 3));
        }
    }

    #[test]
    fn a_connection_that_the_balancer_opens_for_itself_names_no_client() {
        let mut local = vec![];
        ProxyHeader::with_local().encode_v2(&mut local).unwrap();
        for header in [local, b"PROXY UNKNOWN\r\n".to_vec()] {
            assert_eq!(read(&header), (Ok(None), 0));
        }
    }

    #[test]
    fn an_invalid_header_is_refused_at_the_first_byte_that_shows_it() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat();
        let large = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11"[..], &[0xff, 0xff], &[0; 9]].concat();
        for (bytes, left) in [
            (&b"PRI * HTTP/2.0\r\n\r\n"[..], 2),
            (b"\x16\x03\x01", 2),
            (&endless, endless.len() - MAX_V1_LEN),
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
