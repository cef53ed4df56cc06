//! An HTTP/2 client that does what no library lets it do.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{PATIENCE, eventually};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const NONE: u8 = 0;
pub(crate) const END_STREAM: u8 = 1;
const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A frame's bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a call of `path`, without compression.
pub(crate) fn call(path: &str, authorization: Option<&str>) -> Vec<u8> {
    // `:method: POST` and `:scheme: http` of the static table, then names of it with our values.
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

/// A header with a name of its own.
pub(crate) fn header(name: &str, value: &str) -> Vec<u8> {
    [&[0][..], &text(name), &text(value)].concat()
}

fn literal(name: &[u8], value: &str) -> Vec<u8> {
    [name, &text(value)].concat()
}

/// A string as HPACK has it: its length in seven bits and as many bytes as it takes.
fn text(value: &str) -> Vec<u8> {
    let mut coded = vec![];
    if let Some(mut rest) = value.len().checked_sub(0x7f) {
        coded.push(0x7f);
        while rest >= 0x80 {
            coded.push(0x80 | u8::try_from(rest & 0x7f).unwrap());
            rest >>= 7;
        }
        coded.push(u8::try_from(rest).unwrap());
    } else {
        coded.push(u8::try_from(value.len()).unwrap());
    }
    coded.extend(value.as_bytes());
    coded
}

/// A gRPC message.
pub(crate) fn message(bytes: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// What came: kind, flags, stream, payload.
pub(crate) type Frame = (u8, u8, u32, Vec<u8>);

type Writing = tokio::sync::Mutex<WriteHalf<TcpStream>>;

/// A connection on which anything can be said. What comes is read meanwhile, and pings are answered.
pub(crate) struct Raw {
    write: Arc<Writing>,
    heard: Arc<Mutex<Vec<Frame>>>,
    reading: AbortOnDropHandle<()>,
}

impl Raw {
    /// Connects and says the preface, with empty settings.
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::with_settings(address, &[]).await
    }

    /// The same with these settings.
    pub(crate) async fn with_settings(address: SocketAddr, settings: &[u8]) -> Self {
        let (read, mut write) = split(TcpStream::connect(address).await.unwrap());
        let first = [PREFACE, &frame(SETTINGS, NONE, 0, settings)].concat();
        write.write_all(&first).await.unwrap();
        let (heard, write) = (Arc::default(), Arc::new(Writing::new(write)));
        let reading = tokio::spawn(read_all(read, Arc::clone(&write), Arc::clone(&heard)));
        Self { write, heard, reading: AbortOnDropHandle::new(reading) }
    }

    /// Sends `bytes`; `false` once the server has closed, or does not listen any more.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        let mut write = self.write.lock().await;
        timeout(PATIENCE, write.write_all(bytes)).await.is_ok_and(|sent| sent.is_ok())
    }

    /// Returns once what came satisfies `enough`.
    pub(crate) async fn until(&self, what: &str, enough: impl Fn(&[Frame]) -> bool) {
        eventually(what, async || enough(&self.heard.lock().unwrap()).then_some(())).await;
    }

    /// The same, or once the server has closed: what it said last is lost where the client still sends.
    pub(crate) async fn until_or_end(&self, what: &str, enough: impl Fn(&[Frame]) -> bool) {
        let over = || self.reading.is_finished() || enough(&self.heard.lock().unwrap());
        eventually(what, async || over().then_some(())).await;
    }

    /// Everything that came until the server closed.
    pub(crate) async fn ended(mut self) -> Vec<Frame> {
        // The half that writes stays open until then.
        timeout(PATIENCE, &mut self.reading).await.expect("the server closes").unwrap();
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

/// The error of the GOAWAY in `frames`, and what it says.
pub(crate) fn goaway(frames: &[Frame]) -> Option<(u32, String)> {
    frames.iter().rev().find(|frame| frame.0 == GOAWAY).map(|(.., payload)| {
        let code = u32::from_be_bytes(payload[4..8].try_into().unwrap());
        (code, String::from_utf8_lossy(&payload[8..]).into_owned())
    })
}

async fn read_all(
    mut read: ReadHalf<TcpStream>,
    write: Arc<Writing>,
    heard: Arc<Mutex<Vec<Frame>>>,
) {
    loop {
        let mut first = [0; 9];
        if read.read_exact(&mut first).await.is_err() {
            return;
        }
        let len = usize::from(first[0]) << 16 | usize::from(first[1]) << 8 | usize::from(first[2]);
        let stream = u32::from_be_bytes(first[5..].try_into().unwrap());
        let mut payload = vec![0; len];
        if read.read_exact(&mut payload).await.is_err() {
            return;
        }
        // It says that it lives, unless it is busy, which says so too.
        if (first[3], first[4]) == (PING, NONE)
            && let Ok(mut write) = write.try_lock()
        {
            let _ = write.write_all(&frame(PING, ACK, 0, &payload)).await;
        }
        heard.lock().unwrap().push((first[3], first[4], stream, payload));
    }
}
