//! Requests that are refused because of how their message is sent: not as gRPC, compressed in a way that the broker does
//! not read, too large, or malformed.
//!
//! tonic reads the messages, and refuses those without a reason that programs could act on. Here its refusals get
//! one, so that they are answered and recorded like all others.
//!
//! Messages may be compressed with gzip. They are decompressed up to the limit of their size, and no further.
//! Answers are never compressed. A token has too much entropy for it, and the size of a compressed answer
//! reveals how much of a secret equals the text beside it that others may choose, such as a name. Other answers are
//! small, or go to anybody, and compressing them would take the time of a thread that serves tokens.

use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use tonic::{Code, Status, body::Body};

use crate::services::token_provider::CallRefusal;

/// The header that names how the messages of a request are compressed.
const ENCODING: &str = "grpc-encoding";
/// The encodings of requests that the broker reads, other than none.
const READ_ENCODINGS: [&[u8]; 2] = [b"gzip", b"identity"];
/// The header of the details that all refusals of the broker have, and none of tonic's.
const DETAILS: &str = "grpc-status-details-bin";

/// Returns the HTTP status of a request that is not gRPC, and the rule that it violates. The status is the one that other
/// gRPC servers send. It keeps HTTP clients that know no gRPC from taking the answer for a success. `te: trailers` may be missing: proxies remove
/// it, and other servers do not require it.
pub(super) fn violation_of<B>(request: &Request<B>) -> Option<(StatusCode, &'static str)> {
    if request.method() != Method::POST {
        return Some((StatusCode::METHOD_NOT_ALLOWED, "its method must be POST"));
    }
    let types = request.headers().get_all(header::CONTENT_TYPE);
    if types.iter().next().is_none() || !types.iter().all(|value| is_grpc(value.as_bytes())) {
        let must = "its content-type must be application/grpc";
        return Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, must));
    }
    None
}

/// Returns whether a content type is that of gRPC, with any suffix for the format of the messages or parameters.
/// `application/grpc-web` is another protocol.
fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    content_type.split_at_checked(GRPC.len()).is_some_and(|(grpc, rest)| {
        grpc.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
    })
}

/// Checks by its headers that the broker can read a request.
///
/// # Errors
/// [`CallRefusal::NotGrpc`] or [`CallRefusal::EncodingNotSupported`].
pub(super) fn check<B>(request: &Request<B>) -> Result<(), CallRefusal> {
    if let Some((_, description)) = violation_of(request) {
        return Err(CallRefusal::NotGrpc { description });
    }
    check_encoding(request.headers())
}

/// Checks that the broker reads the encoding of a request with these headers.
///
/// # Errors
/// [`CallRefusal::EncodingNotSupported`], also when two encodings are named.
fn check_encoding(headers: &HeaderMap) -> Result<(), CallRefusal> {
    let mut encodings = headers.get_all(ENCODING).iter();
    match (encodings.next(), encodings.next()) {
        (None, _) => Ok(()),
        (Some(encoding), None) if READ_ENCODINGS.contains(&encoding.as_bytes()) => Ok(()),
        _ => Err(CallRefusal::EncodingNotSupported),
    }
}

/// Returns why tonic has refused a request before its RPC began; `None` for any other response.
pub(super) fn refusal_of(response: &Response<Body>) -> Option<CallRefusal> {
    let headers = response.headers();
    if headers.contains_key(DETAILS) {
        return None;
    }
    let status = Status::from_header_map(headers)?;
    match status.code() {
        Code::Unimplemented => Some(CallRefusal::UnknownMethod),
        Code::OutOfRange => Some(CallRefusal::MessageTooLarge),
        Code::ResourceExhausted => Some(CallRefusal::DecompressedTooLarge),
        // The description says which rule is violated, and quotes nothing of the message.
        Code::Internal => {
            Some(CallRefusal::MessageMalformed { description: status.message().to_owned() })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_must_be_posts_with_the_content_type_of_grpc() {
        let status = |method: &str, types: &[&str]| {
            let mut request = Request::builder().method(method);
            for value in types {
                request = request.header(header::CONTENT_TYPE, *value);
            }
            violation_of(&request.body(()).unwrap()).map(|(status, _)| status.as_u16())
        };
        for grpc in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc+json",
            "application/grpc;charset=utf-8",
            "application/grpc ; charset=utf-8",
            "Application/GRPC",
        ] {
            assert_eq!(status("POST", &[grpc]), None, "{grpc}");
        }
        for other in [
            &[][..],
            &[""],
            &["text/plain"],
            &["application/json"],
            &["application/grpc-web"],
            &["application/grpc-web+proto"],
            &["application/grpcfoo"],
            &["application/grp"],
            &["application/octet-stream"],
            &[" application/grpc"],
            &["application/grpc", "text/plain"],
        ] {
            assert_eq!(status("POST", other), Some(415), "{other:?}");
        }
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "post", "FOO"] {
            assert_eq!(status(method, &["application/grpc"]), Some(405), "{method}");
        }
    }

    #[test]
    fn requests_may_be_compressed_with_gzip_and_in_no_other_way() {
        let check = |encodings: &[&str]| {
            let mut headers = HeaderMap::new();
            for encoding in encodings {
                headers.append(ENCODING, encoding.parse().unwrap());
            }
            check_encoding(&headers)
        };
        for read in [&[][..], &["gzip"], &["identity"]] {
            assert_eq!(check(read), Ok(()), "{read:?}");
        }
        for other in [
            &["deflate"][..],
            &["zstd"],
            &["br"],
            &["snappy"],
            &["GZIP"],
            &["x-gzip"],
            &["gzip, gzip"],
            &["identity,gzip"],
            &[""],
            &["gzip", "gzip"],
            &["identity", "deflate"],
        ] {
            assert_eq!(check(other), Err(CallRefusal::EncodingNotSupported), "{other:?}");
        }
    }

    #[test]
    fn refusals_of_the_broker_keep_their_reason() {
        for refusal in [
            CallRefusal::MessageTooLarge,
            CallRefusal::Overloaded { retry_after: std::time::Duration::ZERO },
            CallRefusal::DeadlineExceeded,
        ] {
            assert_eq!(refusal_of(&Status::from(refusal).into_http()), None);
        }
        assert_eq!(refusal_of(&Response::new(Body::empty())), None);
        assert_eq!(refusal_of(&Status::not_found("no such service").into_http()), None);
    }
}
