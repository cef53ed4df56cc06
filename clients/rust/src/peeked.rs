//! The body of an answer whose beginning was read already.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame, SizeHint};

use crate::authorizer::{LONGEST_ANSWER, refusal_code};

/// The body of an answer. The program reads it as if nobody had read its beginning.
#[derive(Debug)]
pub struct PeekedBody<B: Body> {
    /// What was read and not yet given to the program.
    peeked: VecDeque<Result<Frame<Bytes>, B::Error>>,
    /// Whether the end was read.
    is_ended: bool,
    rest: B,
}

impl<B: Body<Data = Bytes> + Unpin> PeekedBody<B> {
    pub(crate) fn new(body: B) -> Self {
        Self { peeked: VecDeque::new(), is_ended: false, rest: body }
    }

    /// Reads at most [`LONGEST_ANSWER`] bytes. Returns them if that is all of the body.
    async fn peek(&mut self) -> Option<Vec<u8>> {
        let mut content = vec![];
        if self.rest.size_hint().lower() > LONGEST_ANSWER as u64 {
            return None;
        }
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut self.rest).poll_frame(cx)).await {
            if let Some(data) = frame.as_ref().ok().and_then(Frame::data_ref) {
                content.extend_from_slice(data);
            }
            let is_error = frame.is_err();
            self.peeked.push_back(frame);
            if is_error || content.len() > LONGEST_ANSWER {
                return None;
            }
        }
        self.is_ended = true;
        Some(content)
    }
}

/// Returns the code in the answer if it says that the API refused the token, and the answer as if it were unread.
pub(crate) async fn peek<B: Body<Data = Bytes> + Unpin>(
    answer: Response<B>,
) -> (Option<&'static str>, Response<PeekedBody<B>>) {
    let is_failure = answer.status().is_client_error() || answer.status().is_server_error();
    let mut answer = answer.map(PeekedBody::new);
    let content = if is_failure { answer.body_mut().peek().await } else { None };
    (content.and_then(|content| refusal_code(&content)), answer)
}

impl<B: Body<Data = Bytes> + Unpin> Body for PeekedBody<B>
where
    B::Error: Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        match this.peeked.pop_front() {
            Some(frame) => Poll::Ready(Some(frame)),
            None if this.is_ended => Poll::Ready(None),
            None => Pin::new(&mut this.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.peeked.is_empty() && (self.is_ended || self.rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let frames = self.peeked.iter().filter_map(|frame| frame.as_ref().ok());
        let peeked: u64 = frames.filter_map(Frame::data_ref).map(|data| data.len() as u64).sum();
        if self.is_ended {
            return SizeHint::with_exact(peeked);
        }
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + peeked);
        }
        hint.set_lower(rest.lower() + peeked);
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body that consists of these chunks.
    #[derive(Debug)]
    struct Chunks(VecDeque<Result<Frame<Bytes>, &'static str>>);

    impl Chunks {
        fn new(chunks: impl IntoIterator<Item = Result<&'static str, &'static str>>) -> Self {
            let frame = |text: &'static str| Frame::data(Bytes::from_static(text.as_bytes()));
            Self(chunks.into_iter().map(|chunk| chunk.map(frame)).collect())
        }

        fn with_trailers(mut self) -> Self {
            self.0.push_back(Ok(Frame::trailers(http::HeaderMap::new())));
            self
        }
    }

    impl Body for Chunks {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(self.0.pop_front())
        }
    }

    async fn read(mut body: impl Body<Data = Bytes, Error = &'static str> + Unpin) -> Vec<String> {
        let mut frames = vec![];
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            frames.push(match frame {
                Ok(frame) if frame.is_trailers() => "trailers".into(),
                Ok(frame) => String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap(),
                Err(error) => format!("error {error}"),
            });
        }
        frames
    }

    async fn peeked(status: u16, chunks: Chunks) -> (Option<&'static str>, PeekedBody<Chunks>) {
        let answer = Response::builder().status(status).body(chunks).unwrap();
        let (code, answer) = peek(answer).await;
        (code, answer.into_body())
    }

    #[tokio::test]
    async fn an_answer_is_read_again_from_its_beginning() {
        let chunks = Chunks::new([Ok(r#"{"code":"#), Ok(r#""61003"}"#)]).with_trailers();
        let (code, body) = peeked(401, chunks).await;
        assert_eq!((code, body.size_hint().exact()), (Some("61003"), Some(16)));
        assert_eq!(read(body).await, [r#"{"code":"#, r#""61003"}"#, "trailers"]);
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_breaks_off_for_the_program_too() {
        let (code, body) = peeked(401, Chunks::new([Ok(r#"{"code":"#), Err("broken")])).await;
        assert_eq!(code, None);
        assert_eq!(read(body).await, [r#"{"code":"#, "error broken"]);
    }

    #[tokio::test]
    async fn a_good_or_long_answer_has_no_code() {
        let refused = || Chunks::new([Ok(r#"{"code":"61003"}"#)]);
        let (code, body) = peeked(200, refused()).await;
        assert_eq!((code, read(body).await.len()), (None, 1));

        let long = " ".repeat(LONGEST_ANSWER).leak();
        let chunks = Chunks::new([Ok(r#"{"code":"61003"}"#), Ok(&*long), Ok("end")]);
        let (code, body) = peeked(500, chunks).await;
        assert_eq!((code, read(body).await.len()), (None, 3));
    }
}
