//! An HTTP/2 client that sends arbitrary frames, for requests that no library would send.

use std::{net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{TEST_TIMEOUT, eventually};

/// The bytes with which a client opens an HTTP/2 connection.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// The types of frames (RFC 9113, section 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

// The flags of frames.
pub(crate) const NONE: u8 = 0;
pub(crate) const END_STREAM: u8 = 1;
const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// Encodes a frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Encodes the header block of a gRPC call of `path`, without Huffman coding.
pub(crate) fn call(path: &str, authorization: Option<&str>) -> Vec<u8> {
    // `:method: POST` and `:scheme: http` from HPACK's static table. Then come `:path`, `:authority`,
    // `content-type` and `authorization`: names from the static table with literal values.
    let mut block = vec![0x83, 0x86];
    block.extend(literal(&[0x04], path));
    block.extend(literal(&[0x01], "broker"));
    block.extend(literal(&[0x0f, 0x10], "application/grpc"));
    block.extend(header("te", "trailers"));
    if let Some(authorization) = authorization {
        block.extend(literal(&[0x0f, 0x08], authorization));
    }
    block
}

/// Encodes a header with a literal name and a literal value.
pub(crate) fn header(name: &str, value: &str) -> Vec<u8> {
    [&[0][..], &text(name), &text(value)].concat()
}

/// Encodes a header whose name is an index into the static table.
fn literal(name: &[u8], value: &str) -> Vec<u8> {
    [name, &text(value)].concat()
}

/// Encodes a string as HPACK specifies it: its length as an integer with a prefix of seven bits, then
/// its bytes.
fn text(value: &str) -> Vec<u8> {
    let mut encoded = vec![];
    if let Some(mut rest) = value.len().checked_sub(0x7f) {
        encoded.push(0x7f);
        while rest >= 0x80 {
            encoded.push(0x80 | u8::try_from(rest & 0x7f).unwrap());
            rest >>= 7;
        }
        encoded.push(u8::try_from(rest).unwrap());
    } else {
        encoded.push(u8::try_from(value.len()).unwrap());
    }
    encoded.extend(value.as_bytes());
    encoded
}

/// Encodes a gRPC message: not compressed, with its length.
pub(crate) fn message(bytes: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// A received frame: type, flags, stream, payload.
pub(crate) type Frame = (u8, u8, u32, Vec<u8>);

/// The sending half, which the test and the task that answers pings share.
type Writer = tokio::sync::Mutex<WriteHalf<TcpStream>>;

/// A connection on which arbitrary bytes can be sent. A task reads the received frames and answers
/// pings.
pub(crate) struct RawHttp2Client {
    writer: Arc<Writer>,
    received: Arc<Mutex<Vec<Frame>>>,
    reading: AbortOnDropHandle<()>,
}

impl RawHttp2Client {
    /// Connects, and sends the preface and an empty SETTINGS frame.
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::with_settings(address, &[]).await
    }

    /// Like [`connect`](Self::connect), with this payload of the SETTINGS frame.
    pub(crate) async fn with_settings(address: SocketAddr, settings: &[u8]) -> Self {
        let (reader, mut writer) = split(TcpStream::connect(address).await.unwrap());
        let first = [PREFACE, &frame(SETTINGS, NONE, 0, settings)].concat();
        writer.write_all(&first).await.unwrap();
        let (received, writer) = (Arc::default(), Arc::new(Writer::new(writer)));
        let reading = tokio::spawn(read_frames(reader, Arc::clone(&writer), Arc::clone(&received)));
        Self { writer, received, reading: AbortOnDropHandle::new(reading) }
    }

    /// Sends `bytes`. Returns `false` when the server has closed the connection or does not read.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        let mut writer = self.writer.lock().await;
        timeout(TEST_TIMEOUT, writer.write_all(bytes)).await.is_ok_and(|sent| sent.is_ok())
    }

    /// Waits until the received frames satisfy `enough`.
    pub(crate) async fn wait_for(&self, what: &str, enough: impl Fn(&[Frame]) -> bool) {
        eventually(what, async || enough(&self.received.lock()).then_some(())).await;
    }

    /// Waits until the received frames satisfy `enough` or the server has closed the connection. The
    /// last frames before that can be lost if the client is still sending.
    pub(crate) async fn wait_for_or_end(&self, what: &str, enough: impl Fn(&[Frame]) -> bool) {
        let over = || self.reading.is_finished() || enough(&self.received.lock());
        eventually(what, async || over().then_some(())).await;
    }

    /// Returns the frames received so far.
    pub(crate) fn frames(&self) -> Vec<Frame> {
        self.received.lock().clone()
    }

    /// Waits until the server has closed the connection, and returns the received frames.
    pub(crate) async fn read_to_end(mut self) -> Vec<Frame> {
        // `self`, and with it the sending half, is dropped after that.
        timeout(TEST_TIMEOUT, &mut self.reading).await.expect("the server closes").unwrap();
        std::mem::take(&mut self.received.lock())
    }
}

/// Returns the error code and the debug data of the last GOAWAY frame.
pub(crate) fn goaway(frames: &[Frame]) -> Option<(u32, String)> {
    frames.iter().rev().find(|frame| frame.0 == GOAWAY).map(|(.., payload)| {
        let code = u32::from_be_bytes(payload[4..8].try_into().unwrap());
        (code, String::from_utf8_lossy(&payload[8..]).into_owned())
    })
}

async fn read_frames(
    mut reader: ReadHalf<TcpStream>,
    writer: Arc<Writer>,
    received: Arc<Mutex<Vec<Frame>>>,
) {
    loop {
        let mut header = [0; 9];
        if reader.read_exact(&mut header).await.is_err() {
            return;
        }
        let len =
            usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let stream = u32::from_be_bytes(header[5..].try_into().unwrap());
        let mut payload = vec![0; len];
        if reader.read_exact(&mut payload).await.is_err() {
            return;
        }
        // A ping is answered unless the test is sending, which also shows that the client is alive.
        if (header[3], header[4]) == (PING, NONE)
            && let Ok(mut writer) = writer.try_lock()
        {
            let _ = writer.write_all(&frame(PING, ACK, 0, &payload)).await;
        }
        received.lock().push((header[3], header[4], stream, payload));
    }
}
