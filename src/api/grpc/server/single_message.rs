//! The body of a request that is one message: it refuses what follows the message.
//!
//! tonic reads the first message of such a request and drops the others, and of a compressed message it drops what follows
//! the compressed stream. A client that sends more would believe that all of it was acted on.

use std::{
    io::{Read, copy, sink},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use flate2::bufread::GzDecoder;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use tower::BoxError;

use crate::api::grpc::limits::MAX_REQUEST_BYTES;

/// The bytes before a message: the flag that says whether it is compressed, and its length.
const PREFIX_LEN: usize = 5;

/// The body of a request that must have one message.
pub(super) struct SingleMessage<B> {
    body: B,
    message: MessageBounds,
}

impl<B> SingleMessage<B> {
    pub(super) fn new(body: B) -> Self {
        Self { body, message: MessageBounds::default() }
    }
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for SingleMessage<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(fault) = self.message.add(data)
        {
            return Poll::Ready(Some(Err(Status::internal(fault).into())));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Follows the bytes of a message to its end. What is wrong within it is left to its reader.
#[derive(Default)]
struct MessageBounds {
    prefix: [u8; PREFIX_LEN],
    /// How many bytes of `prefix` have arrived.
    prefix_len: usize,
    /// How many bytes of the message have arrived.
    arrived: usize,
    /// The message, if it is compressed and not too large.
    compressed: Vec<u8>,
}

impl MessageBounds {
    /// Adds the next bytes of the body.
    ///
    /// # Errors
    /// What follows the message.
    fn add(&mut self, data: &[u8]) -> Result<(), &'static str> {
        let (prefix, data) = data.split_at(data.len().min(PREFIX_LEN - self.prefix_len));
        self.prefix[self.prefix_len..][..prefix.len()].copy_from_slice(prefix);
        self.prefix_len += prefix.len();
        if self.prefix_len < PREFIX_LEN {
            return Ok(());
        }
        let [flag, length @ ..] = self.prefix;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if data.len() > length - self.arrived {
            return Err("a request has one message, and more follows it");
        }
        self.arrived += data.len();
        if flag == 1 && length <= MAX_REQUEST_BYTES {
            self.compressed.extend_from_slice(data);
            let is_now_whole = self.arrived == length && !data.is_empty();
            if is_now_whole && has_more_than_gzip(&self.compressed) {
                return Err("something follows the gzip stream within the message");
            }
        }
        Ok(())
    }
}

/// Returns whether something follows the gzip stream with which `bytes` begins. Returns `false` for a damaged message,
/// and for one that is too large once it is decompressed: tonic refuses those.
fn has_more_than_gzip(bytes: &[u8]) -> bool {
    let mut stream = GzDecoder::new(bytes);
    let limit = u64::try_from(MAX_REQUEST_BYTES + 1).unwrap_or(u64::MAX);
    let read = copy(&mut stream.by_ref().take(limit), &mut sink());
    read.is_ok_and(|read| read < limit) && !stream.into_inner().is_empty()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn frame(flag: u8, message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[flag], &length[..], message].concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(vec![], Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Returns whether a body is refused that arrives in parts of `size` bytes.
    fn is_refused(body: &[u8], size: usize) -> bool {
        let mut message = MessageBounds::default();
        body.chunks(size).any(|part| message.add(part).is_err())
    }

    #[test]
    fn what_follows_a_message_is_refused_however_it_arrives() {
        let (plain, packed) = (frame(0, b"message"), frame(1, &gzip(b"message")));
        let damaged = frame(1, b"no gzip");
        let bomb = frame(1, &[gzip(&vec![0; MAX_REQUEST_BYTES + 1]), b"x".to_vec()].concat());
        for (body, refused) in [
            (plain.clone(), false),
            (frame(0, b""), false),
            (packed.clone(), false),
            (frame(1, &gzip(b"")), false),
            (plain[..9].to_vec(), false),
            (vec![], false),
            // They are refused by others.
            (damaged, false),
            (bomb, false),
            (frame(2, b"message"), false),
            ([&plain[..], &plain].concat(), true),
            ([&plain[..], b"x"].concat(), true),
            ([&frame(0, b"")[..], &frame(0, b"")].concat(), true),
            ([&packed[..], &packed].concat(), true),
            ([&packed[..], b"\0"].concat(), true),
            (frame(1, &[gzip(b"message"), b"x".to_vec()].concat()), true),
            (frame(1, &[gzip(b"mess"), gzip(b"age")].concat()), true),
            (frame(1, &[gzip(b"message"), vec![0; 8]].concat()), true),
        ] {
            for size in [1, 3, 5, 6, 1_000_000] {
                assert_eq!(is_refused(&body, size), refused, "{body:?} in parts of {size}");
            }
        }
    }

    #[test]
    fn empty_frames_end_no_message() {
        let mut message = MessageBounds::default();
        for part in [&b""[..], &frame(0, b"ab")[..4], b"", &frame(0, b"ab")[4..], b"", b""] {
            assert_eq!(message.add(part), Ok(()));
        }
        assert!(message.add(b"x").is_err());
    }
}
